"""Rotary embeddings on Ascend: which provider takes a call, why another does not, and the numbers of what it becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.lower import REFERENCE
from npu_fusion.lowerings.ascend import sgl
from npu_fusion.ops.rope import qk_norm_rotary, qkv_norm_rotary, rotary
from tests.lowerings.ascend.checks import DTYPES, Lowered, lower_and_check, lower_call
from tests.parameters import dtypes_and_shapes

BF16, FP16, FP32 = DTYPES
B, S = 3, 5
VIEWS = ("aten.view", "aten.reshape", "aten.transpose", "aten.slice", "aten.unsqueeze", "aten.expand", "aten.sym_size")
PREPARATION = ("aten.cos", "aten.sin", "aten.relu", "aten.t", "aten.mm")
APPLY, MROPE, MUL, INTERLEAVE = "npu.npu_apply_rotary_pos_emb", "npu.npu_mrope", "npu.npu_rotary_mul", "npu.npu_interleave_rope"
SPLIT = "npu_fusion_sgl.split_qkv_rmsnorm_rope"


def ops(found: Lowered) -> list[str]:
    """The ops that compute, without views, and without those that made the inputs of the semantic op."""
    return [op for op in found.targets() if op not in (*VIEWS, *PREPARATION)]


def halves(theta: Tensor, kind: str) -> Tensor:
    """Angles for each channel from those for each pair."""
    if kind == "pair":
        return theta
    return torch.cat((theta, theta), -1) if kind == "half" else torch.stack((theta, theta), -1).flatten(-2)


def rotated(
    dtype: torch.dtype = BF16,
    *,
    heads: Sequence[int] = (4, 2),
    size: int = 64,
    width: int | None = None,
    table: torch.dtype | None = None,
    kind: str = "half",
    batch: int = 1,
    fresh: bool = True,
    tokens_first: bool = True,
    dynamic: bool = False,
    config: Any = None,
    **arguments: Any,
) -> Lowered:
    """rotary of tensors [B, N, S, size], views of [B, S, N, size] where `tokens_first`; made in the graph where `fresh`.

    The tables [batch, 1, S, ...] in dtype `table` have an entry a pair (`kind="pair"`) or a channel, in the order of a layout.
    """
    xs = [torch.randn(B, S, n * size, dtype=dtype) for n in heads]
    full = halves(3 * torch.rand(batch, S, (width or size) // 2), kind)
    last = full.shape[-1]
    if width is not None:
        arguments["rotary_dim"] = width

    def seen(x: Tensor, n: int) -> Tensor:
        x = torch.relu(x) if fresh else x
        return x.view(*x.shape[:2], n, size).transpose(1, 2) if tokens_first else x.view(x.shape[0], n, x.shape[1], size)

    def call(options: dict[str, Any]) -> Callable[..., list[Tensor]]:
        def fn(cos: Tensor, sin: Tensor, *given: Tensor) -> list[Tensor]:
            cos, sin = (table.view(*table.shape[:2], last).unsqueeze(1) for table in (cos, sin))
            return rotary([seen(x, n) for x, n in zip(given, heads, strict=True)], cos, sin, **options)

        return fn

    tables = [full.cos().to(table or dtype), full.sin().to(table or dtype)]
    exact = {name: value for name, value in arguments.items() if name != "out_dtype"}
    return lower_and_check(call(arguments), call(exact), *tables, *xs, dynamic=dynamic, **(config or {}))


# -------------------------------------------------------------------- npu_apply_rotary_pos_emb


@dtypes_and_shapes([BF16, FP32])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", ["half", "pair"])
def test_q_and_k_are_rotated_in_place_by_one_launch(kind: str, size: int, dtype: torch.dtype, dynamic: bool) -> None:
    found = rotated(dtype, size=size, kind=kind, batch=B, dynamic=dynamic)
    assert (found.provider, found.reason) == (APPLY, "")
    assert ops(found) == ["aten.cat"] * 2 * (kind == "pair") + [APPLY]


def test_tables_of_one_batch_are_written_out() -> None:
    assert ops(rotated(batch=1)) == ["aten.clone", "aten.clone", APPLY]


def test_the_sign_is_taken_into_the_table() -> None:
    assert ops(rotated(batch=B, sign=-1)) == ["aten.neg", APPLY]


def test_tables_of_higher_precision_are_not_rounded() -> None:
    found = rotated(BF16, table=FP32, batch=B)
    assert ops(found) == ["aten._to_copy", "aten._to_copy", APPLY, "aten._to_copy", "aten._to_copy"]
    assert ops(rotated(BF16, table=FP32, batch=B, out_dtype=FP32)) == ["aten._to_copy", "aten._to_copy", APPLY]
    assert ops(rotated(FP32, table=BF16, batch=B)) == ["aten._to_copy", "aten._to_copy", APPLY]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fresh": False}, "it writes over q and k, which are read elsewhere, or not made in this graph"),
        ({"tokens_first": False}, "q and k do not lie token by token"),
        ({"dtype": FP16}, "it rounds each product to torch.float16, the model keeps it in fp32"),
        ({"size": 96}, "query[3] is 96, not 64 or 128"),
        ({"width": 32}, "it rotates all channels, the model the leading ones"),
        ({"layout": "interleaved", "kind": "interleaved"}, "rotary_mode='interleave', not 'half'"),
    ],
)
def test_what_cannot_be_rotated_in_place(change: dict[str, Any], reason: str) -> None:
    found = rotated(**{"batch": B, **change})
    assert f"{APPLY}: {reason}" in found.reason
    assert found.provider == MUL


def _read_again(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, which: str) -> list[Tensor]:
    q, k = torch.relu(x), torch.relu(y)
    out = rotary([q.transpose(1, 2), (q if which == "twice" else k).transpose(1, 2)], cos, sin)
    return [*out, q + 1] if which == "later" else [*out, q[0]] if which == "view" else out


@pytest.mark.parametrize("which", ["later", "view", "twice"])
def test_what_is_read_again_is_not_written_over(which: str) -> None:
    x = torch.randn(B, S, 4, 64, dtype=BF16)
    theta = halves(torch.rand(B, 1, S, 32), "half")
    fn: Callable[..., list[Tensor]] = lambda *args: _read_again(*args, which)  # noqa: E731
    found = lower_and_check(fn, fn, x, x + 1, theta.cos().to(BF16), theta.sin().to(BF16))
    assert found.provider == MUL
    assert "it writes over q and k" in found.reason


def test_what_was_written_over_is_made_anew() -> None:
    """The second call takes the fp32 copies of the same tensors, which the first one has written over."""
    x = torch.randn(B, S, 2, 64, dtype=BF16)
    theta = halves(torch.rand(B, 1, S, 32), "half")

    class Twice(nn.Module):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
            q, k = torch.relu(x).transpose(1, 2), torch.tanh(x).transpose(1, 2)
            first = rotary([q, k], cos, sin)
            return [*first, *rotary([q, k], cos, -sin)]

    compiled = torch.compile(Twice(), backend="npu_fusion", options={"emulate": True})
    actual, expected = compiled(x, theta.cos(), theta.sin()), Twice()(x, theta.cos(), theta.sin())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_ascend950_takes_more(layout: str) -> None:
    found = rotated(size=96, layout=layout, kind=layout, batch=1, config={"target": "ascend950"})
    assert found.provider == APPLY


# -------------------------------------------------------------------- npu_mrope


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("batch", [1, B])
def test_q_and_k_by_tables_of_one_entry_a_pair(batch: int, layout: str, dtype: torch.dtype, dynamic: bool) -> None:
    found = rotated(dtype, size=32, layout=layout, kind="pair", batch=batch, dynamic=dynamic)
    assert found.provider == MROPE
    assert [op for op in ops(found) if op not in ("aten.arange", "aten.mul", "aten.clone")] == ["aten.cat", MROPE]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_leading_channels_alone(layout: str) -> None:
    assert ops(rotated(size=64, width=32, layout=layout, kind="pair", fresh=False)) == ["aten.cat", MROPE]


@pytest.mark.parametrize("kind", ["cat", "stack", "repeat_interleave"])
def test_tables_that_the_graph_made_of_one_entry_a_pair_are_halved(kind: str) -> None:
    layout = "half" if kind == "cat" else "interleaved"

    def fn(x: Tensor, y: Tensor, theta: Tensor) -> list[Tensor]:
        full = theta.repeat_interleave(2, -1) if kind == "repeat_interleave" else halves(theta, layout)
        cos, sin = (full.cos() * 0.5).to(x.dtype).unsqueeze(1), (full.sin() * 0.5).to(x.dtype).unsqueeze(1)
        return rotary([x.transpose(1, 2), y.transpose(1, 2)], cos, sin, layout=layout)

    inputs = torch.randn(B, S, 4, 64, dtype=BF16), torch.randn(B, S, 2, 64, dtype=BF16), torch.rand(1, S, 32)
    assert lower_and_check(fn, fn, *inputs).provider == MROPE


@pytest.mark.parametrize("kind", ["half", "interleaved"])
def test_tables_that_repeat_in_the_other_order_are_not(kind: str) -> None:
    def fn(x: Tensor, y: Tensor, theta: Tensor) -> list[Tensor]:
        full = halves(theta, "interleaved" if kind == "half" else "half")
        return rotary([x.transpose(1, 2), y.transpose(1, 2)], full.cos()[:, None], full.sin()[:, None], layout=kind)

    assert lower_and_check(fn, fn, torch.randn(B, S, 4, 64), torch.randn(B, S, 2, 64), torch.rand(1, S, 32)).provider == MUL


@pytest.mark.parametrize("change", ["shift", "other"])
def test_tables_whose_halves_may_differ_are_not(change: str) -> None:
    def fn(x: Tensor, y: Tensor, theta: Tensor, shift: Tensor) -> list[Tensor]:
        full = torch.cat((theta, theta + 1 if change == "other" else theta), -1)
        full = full + shift if change == "shift" else full
        return rotary([x.transpose(1, 2), y.transpose(1, 2)], full.cos()[:, None], full.sin()[:, None])

    inputs = torch.randn(B, S, 4, 64), torch.randn(B, S, 2, 64), torch.rand(1, S, 32), torch.rand(64)
    assert lower_and_check(fn, fn, *inputs).provider == MUL


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "half"}, "it takes one entry a pair of channels"),
        ({"size": 48}, "alignment: "),
        ({"heads": (128, 1)}, "one token in the unified buffer: query[1] is 8192"),
        ({"tokens_first": False}, "q and k do not lie token by token"),
    ],
)
def test_what_npu_mrope_does_not_take(change: dict[str, Any], reason: str) -> None:
    found = rotated(**{"kind": "pair", "fresh": False, **change})
    assert f"{MROPE}: {reason}" in found.reason
    assert found.provider == MUL


# -------------------------------------------------------------------- npu_rotary_mul


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("batch", [1, B])
def test_one_tensor_is_one_launch(batch: int, layout: str, dtype: torch.dtype, dynamic: bool) -> None:
    found = rotated(dtype, heads=(3,), layout=layout, kind=layout, batch=batch, dynamic=dynamic)
    assert (found.provider, found.reason) == (MUL, "")
    assert ops(found) == ["aten.clone"] * 2 * (dynamic and batch == 1) + [MUL]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_tensors_that_lie_heads_first_are_not_moved(layout: str) -> None:
    found = rotated(heads=(3,), layout=layout, kind=layout, tokens_first=False)
    assert ops(found) == [MUL]
    assert "aten.transpose" not in found.targets()


def test_leading_halves_stand_between_a_slice_and_a_cat() -> None:
    assert ops(rotated(heads=(3,), size=64, width=32)) == [MUL, "aten.cat"]


def test_leading_neighbours_are_rotated_with_all_by_padded_tables() -> None:
    found = rotated(heads=(3,), size=64, width=32, layout="interleaved", kind="interleaved")
    assert ops(found) == ["aten.constant_pad_nd", "aten.constant_pad_nd", MUL]


def test_leading_channels_in_float32() -> None:
    found = rotated(heads=(3,), size=64, width=32, table=FP32)
    assert ops(found) == ["aten._to_copy", MUL, "aten._to_copy", "aten.cat"]


@pytest.mark.parametrize("shape", [(S, 3, 64), (3, S, 64), (S, 64), (B, S, 64)])
def test_tensors_of_fewer_dimensions(shape: tuple[int, ...]) -> None:
    theta = torch.rand(*((S, 1) if shape == (S, 3, 64) else (B, S) if shape[0] == B else (S,)), 32)
    full = halves(theta, "half")
    fn: Callable[..., list[Tensor]] = lambda x, cos, sin: rotary([x], cos, sin)  # noqa: E731
    assert lower_and_check(fn, fn, torch.randn(shape), full.cos(), full.sin()).provider == MUL


def test_tables_of_single_heads_are_left_to_the_reference() -> None:
    full = halves(torch.rand(1, 3, S, 32), "half")
    fn: Callable[..., list[Tensor]] = lambda x, cos, sin: rotary([x], cos, sin)  # noqa: E731
    found = lower_call(fn, torch.randn(B, 3, S, 64), full.cos(), full.sin())
    assert found.provider == REFERENCE
    assert "the tables differ from head to head" in found.reason


def test_float64_is_left_to_the_reference() -> None:
    found = rotated(torch.float64)
    assert found.provider == REFERENCE
    assert "it takes no torch.float64" in found.reason


# -------------------------------------------------------------------- mla


@dtypes_and_shapes([BF16, FP16])
@pytest.mark.parametrize("kind", ["half", "pair"])
def test_neighbours_in_and_halves_out(kind: str, dtype: torch.dtype, dynamic: bool) -> None:
    found = rotated(dtype, heads=(4, 1), layout="mla", kind=kind, batch=B, dynamic=dynamic)
    assert (found.provider, found.reason) == (INTERLEAVE, "")
    assert ops(found) == ["aten.cat"] * 2 * (kind == "pair") + [INTERLEAVE] * 2


def test_of_other_widths_they_are_moved_apart_first() -> None:
    found = rotated(heads=(4, 1), size=32, layout="mla", batch=B)
    assert found.provider == f"aten.permute + {MUL}"
    assert ops(found) == ["aten.clone", MUL] * 2
    assert "x[3] is 32, not 64" in found.reason


# -------------------------------------------------------------------- with norms


def normed(
    dtype: torch.dtype = BF16,
    *,
    size: int = 64,
    weight: torch.dtype | None = BF16,
    heads_first: bool = True,
    config: Any = None,
    **arguments: Any,
) -> Lowered:
    """qk_norm_rotary of [B, S, N, size] with `heads_first`, or of such tensors moved before."""
    xs = [torch.randn(B, S, n * size, dtype=dtype) for n in (4, 2)]
    weights = [] if weight is None else [0.2 * torch.randn(size, dtype=weight) + (not arguments.get("weight_offset")) for _ in xs]
    full = halves(3 * torch.rand(B, S, size // 2), "half")

    def call(options: dict[str, Any]) -> Callable[..., Any]:
        def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *given: Tensor) -> Any:
            q, k = (x.view(*x.shape[:2], n, size) for x, n in ((q, 4), (k, 2)))
            q, k = (x if heads_first else x.transpose(1, 2) for x in (q, k))
            cos, sin = (table.view(*table.shape[:2], size).unsqueeze(1) for table in (cos, sin))
            pair = [weight.view(size) for weight in given] or [None, None]
            return qk_norm_rotary(q, k, *pair, cos, sin, 1e-5, heads_first=heads_first, **options)

        return fn

    exact = {name: value for name, value in arguments.items() if name != "round_dtype"}
    return lower_and_check(call(arguments), call(exact), *xs, full.cos().to(dtype), full.sin().to(dtype), *weights, **(config or {}))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_norms_and_rotation_are_three_launches(dtype: torch.dtype, heads_first: bool, dynamic: bool) -> None:
    found = normed(dtype, weight=dtype, heads_first=heads_first, config={"dynamic": dynamic})
    assert found.provider == f"norms + {APPLY}"
    assert ops(found) == ["npu.npu_rms_norm", "npu.npu_rms_norm", APPLY]


@pytest.mark.parametrize(
    ("arguments", "norms"),
    [
        ({"weight_offset": 1}, ["npu.npu_gemma_rms_norm"] * 2),
        ({"weight_offset": 1, "weight": FP32}, ["aten.add", "npu.npu_rms_norm"] * 2),
        ({"weight": FP32}, ["npu.npu_rms_norm"] * 2),
        ({"weight": None}, ["npu.npu_rms_norm"] * 2),
        ({"round_dtype": BF16}, ["npu.npu_rms_norm"] * 2),
    ],
)
def test_kinds_of_norm(arguments: dict[str, Any], norms: list[str]) -> None:
    assert ops(normed(**arguments)) == [*norms, APPLY]


def test_the_norm_may_come_last() -> None:
    assert ops(normed(norm_last=True, size=32)) == [MUL, MUL, "npu.npu_rms_norm", "npu.npu_rms_norm"]


def test_what_the_model_rounds_before_the_weight_stays_rounded_in_exact() -> None:
    found = normed(round_dtype=BF16, config={"rounding": "exact"})
    assert found.provider == REFERENCE
    assert "it keeps the normalised heads before the weight in fp32" in found.reason


# -------------------------------------------------------------------- merged projections


def split(
    dtype: torch.dtype = BF16,
    *,
    heads: tuple[int, int] = (4, 2),
    size: int = 64,
    norm: bool = True,
    kind: str = "half",
    table: torch.dtype | None = None,
    config: Any = None,
    dynamic: bool = False,
    dry_run: bool = False,
    **arguments: Any,
) -> Lowered:
    qkv = torch.randn(B, S, (heads[0] + 2 * heads[1]) * size, dtype=dtype)
    weights = [0.2 * torch.randn(size, dtype=dtype) + (not arguments.get("weight_offset")) for _ in range(2 * norm)]
    full = halves(3 * torch.rand(1, S, arguments.get("rotary_dim", size) // 2), kind)
    channels, last = qkv.shape[-1], full.shape[-1]
    options = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": size, "norm": norm, **arguments}

    def fn(qkv: Tensor, cos: Tensor, sin: Tensor, *given: Tensor) -> Any:
        cos, sin = (table.view(*table.shape[:2], last).unsqueeze(1) for table in (cos, sin))
        pair = [weight.view(size) for weight in given] or [None, None]
        return qkv_norm_rotary(qkv.view(*qkv.shape[:2], channels), *pair, cos, sin, 1e-5, **options)

    inputs = qkv, full.cos().to(table or dtype), full.sin().to(table or dtype), *weights
    if dry_run:
        return lower_call(fn, *inputs, dry_run=True, emulate=False, **(config or {}))
    return lower_and_check(fn, fn, *inputs, dynamic=dynamic, **(config or {}))


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm": False},
        {"rotary_dim": 32},
        {"kind": "pair", "layout": "interleaved"},
        {"weight_offset": 1},
        {"sign": -1},
        {"table": FP32},
    ],
    ids=str,
)
def test_a_merged_projection_is_one_launch(arguments: dict[str, Any], dtype: torch.dtype, dynamic: bool) -> None:
    found = split(dtype, dynamic=dynamic, **arguments)
    assert (found.provider, found.reason) == (SPLIT, "")
    assert ops(found).count(SPLIT) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 48}, "head_dim=48"),
        ({"heads": (3, 2)}, "no multiple of that of key heads"),
        ({"layout": "interleaved", "kind": "interleaved"}, "it takes one entry a pair of neighbours"),
        ({"config": {"target": "ascend950"}}, ""),
    ],
)
def test_other_projections_are_split_first(change: dict[str, Any], reason: str) -> None:
    found = split(**change)
    assert found.provider.startswith("split + ")
    assert reason in found.reason


def test_parts_of_a_projection_are_rotated_where_they_are() -> None:
    found = split(norm=False, kind="pair", config={"target": "ascend910b", "rounding": "fp32_internal"}, heads=(3, 2))
    assert found.provider == f"split + {MROPE}"
    assert [op for op in ops(found) if op != "aten.clone"] == ["aten.cat", MROPE]


def test_without_sgl_kernel_npu_it_is_split_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgl, "installed", lambda: False)
    assert split(dry_run=True).provider == SPLIT

    def fn(qkv: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return qkv_norm_rotary(qkv, None, None, cos, sin, 0.0, num_heads=2, num_kv_heads=1, head_dim=64, norm=False)

    found = lower_call(fn, torch.randn(B, S, 256), torch.rand(S, 64), torch.rand(S, 64), emulate=False)
    assert found.provider.startswith("split + ")
    assert "sgl-kernel-npu is not installed" in found.reason
