"""Attention on Ascend: which op in which layout takes a call, what it is told of the mask, why another does not, and the numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from npu_fusion import FusionConfig, GraphRecord
from npu_fusion.lower import REFERENCE, lower_graph
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.attention import attention, mla_attention
from tests.graphs import aten_graph
from tests.lowerings.ascend.checks import Lowered, lower_call
from tests.parameters import dtypes_and_shapes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALVES = (BF16, FP16)
FIA, FIA_V2, FUSION = "npu.npu_fused_infer_attention_score", "npu.npu_fused_infer_attention_score_v2", "npu.npu_fusion_attention_v3"
BATCH, HEADS, KV_HEADS, DIM = 3, 4, 2, 32
SYMBOLS = (BATCH, 5, 6, 7, 9)  # the sizes that become symbols in dynamic graphs: the batch, and lengths
COPIES = ("aten.clone", "aten.copy_", "aten.contiguous", "aten.cat")


def heads(
    tokens: int, count: int = KV_HEADS, dim: int = DIM, *, dtype: torch.dtype = BF16, stored: str = "BSND", batch: int = BATCH
) -> Tensor:
    """[B, N, S, D], in one of the two memory layouts that occur."""
    generator = torch.Generator().manual_seed(tokens + 7 * count)
    x = torch.randn(batch, tokens, count, dim, generator=generator).to(dtype).transpose(1, 2)
    return x if stored == "BSND" else x.contiguous()


def operands(queries: int, keys: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        heads(queries, HEADS, **options),
        heads(keys, **options),
        heads(keys + 1, **options)[:, :, :keys].clone(memory_format=torch.preserve_format),
    )


def symbolic(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Fake tensors with symbols for batch sizes and lengths, equal ones for equal sizes, and static heads and head sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(x: Tensor) -> Tensor:
        sizes = [DimDynamic.DUCK if size in SYMBOLS else DimDynamic.STATIC for size in x.shape]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))

    return [fake(x) for x in inputs]


def run(found: Lowered, *inputs: Tensor) -> Tensor:
    result = found.gm(*inputs)
    return result[0] if isinstance(result, (list, tuple)) else result


def checked(fn: Callable[..., Tensor], *inputs: Tensor, dynamic: bool = False, **options: Any) -> Lowered:
    """The call of `fn`, lowered; its numbers are within the contract, and its metadata is as predicted."""
    found = lower_call(fn, *(symbolic(inputs) if dynamic else inputs), **options)
    actual, eager = run(found, *inputs), fn(*inputs)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    assert (actual.shape, actual.dtype) == (eager.shape, eager.dtype)
    assert_within_contract(actual, eager, fn(*wide), eager.dtype)
    return found


def call_of(found: Lowered, provider: str) -> Node:
    """The one call of the op that took the semantic call."""
    assert found.provider == provider, found.reason
    [call] = [node for node in found.gm.graph.nodes if str(node.target).startswith(f"{provider}.")]
    return call


def copies(found: Lowered) -> list[str]:
    return [op for op in found.targets() if op in COPIES]


# -------------------------------------------------------------------- layouts


@dtypes_and_shapes(HALVES)
def test_views_of_projections_need_no_copy(dtype: torch.dtype, dynamic: bool) -> None:
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2), *operands(5, 9, dtype=dtype), dynamic=dynamic)
    call = call_of(found, FIA)
    assert call.kwargs["input_layout"] == "BSND"
    assert (call.kwargs["num_heads"], call.kwargs["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert "atten_mask" not in call.kwargs
    assert not copies(found)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_one_query_beside_a_head_major_cache_needs_no_copy(dynamic: bool) -> None:
    q, (k, v) = heads(1, HEADS), operands(5, 9, stored="BNSD")[1:]
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2), q, k, v, dynamic=dynamic)
    assert call_of(found, FIA).kwargs["input_layout"] == "BNSD"
    assert not copies(found)


def test_a_prompt_beside_a_head_major_cache_costs_a_copy_of_the_query() -> None:
    q, (k, v) = heads(5, HEADS), operands(5, 9, stored="BNSD")[1:]
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2), q, k, v)
    assert call_of(found, FIA).kwargs["input_layout"] == "BNSD_BSND"
    assert copies(found) == ["aten.clone"]


def test_the_merge_of_heads_is_a_view() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.2).transpose(1, 2).reshape(BATCH, 5, -1)

    assert not copies(checked(fn, *operands(5, 9)))


def test_the_front_of_a_cache_is_the_cache_and_a_length() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
        length = new.shape[0]
        return attention(q, k[:, :, :length], v[:, :, :length], scale=0.2, is_causal=True, causal_offset=length - q.shape[2])

    q, k, v = operands(5, 16, stored="BNSD")
    found = checked(fn, q, k, v, torch.zeros(9), dynamic=True)
    call = call_of(found, FIA)
    [length] = call.kwargs["actual_seq_lengths_kv"]
    assert isinstance(length, Node)
    assert call.kwargs["sparse_mode"] == 3
    assert call.args[1].meta["val"].shape[2] == 16
    assert not copies(found)


def test_results_of_another_dtype() -> None:
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2, out_dtype=FP32), *operands(5, 9))
    assert found.targets()[-1] == "aten._to_copy"


# -------------------------------------------------------------------- causality and windows


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("queries", "keys", "offset", "mode"),
    [(7, 7, "none", 3), (6, 9, "end", 3), (6, 9, "none", 2), (9, 6, "none", 2), (9, 6, "end", 3)],
    ids=["square", "bottom_right", "top_left", "top_left_tall", "bottom_right_tall"],
)
def test_causality_is_a_mode_with_one_constant(queries: int, keys: int, offset: str, mode: int, dynamic: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (q[:, ::2], q[:, 1::2]) if queries == keys else (k, v)
        shift = k.shape[2] - q.shape[2] if offset == "end" else 0
        return attention(q, k, v, scale=0.2, is_causal=True, causal_offset=shift)

    call = call_of(checked(fn, *operands(queries, keys), dynamic=dynamic), FIA)
    assert call.kwargs["sparse_mode"] == mode
    assert call.kwargs["atten_mask"].op == "get_attr"


def test_all_layers_share_the_constant() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = attention(q, k, v, scale=0.2, is_causal=True)
        return attention(first, k, v, scale=0.2, is_causal=True)

    gm = aten_graph(fn, *operands(5, 5))
    config = FusionConfig(target="ascend910b", emulate=True)
    lower_graph(gm, config, GraphRecord(config))
    assert len(list(gm.buffers())) == 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("causal", "after"), [(True, 0), (False, None)], ids=["causal", "window_only"])
def test_a_window_is_a_band(causal: bool, after: int | None, dynamic: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.2, is_causal=causal, causal_offset=k.shape[2] - q.shape[2], window=3)

    call = call_of(checked(fn, *operands(6, 9), dynamic=dynamic), FIA)
    assert (call.kwargs["sparse_mode"], call.kwargs["pre_tokens"], call.kwargs.get("next_tokens")) == (4, 2, after)


def test_a_window_that_hides_nothing_is_causality() -> None:
    call = call_of(checked(lambda q, k, v: attention(q, k, v, scale=0.2, is_causal=True, window=64), *operands(7, 7)), FIA)
    assert call.kwargs["sparse_mode"] == 3


def test_a_window_over_one_query_is_a_mask() -> None:
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2, is_causal=True, causal_offset=8, window=3), *operands(1, 9))
    call = call_of(found, FIA)
    assert "sparse_mode" not in call.kwargs
    assert call.kwargs["atten_mask"].meta["val"].shape == (BATCH, 1, 1, 9)
    assert "aten.masked_fill" not in found.targets()  # the last key is always visible


def test_one_query_that_sees_every_key_has_no_mask() -> None:
    call = call_of(checked(lambda q, k, v: attention(q, k, v, scale=0.2, is_causal=True, causal_offset=8), *operands(1, 9)), FIA)
    assert "atten_mask" not in call.kwargs


@pytest.mark.parametrize("offset", [2, -2], ids=["right", "left"])
def test_an_offset_of_no_corner(offset: int) -> None:
    """Aligned to neither corner: a band, or a mask where the first queries see no key."""
    call = call_of(checked(lambda q, k, v: attention(q, k, v, scale=0.2, is_causal=True, causal_offset=offset), *operands(7, 7)), FIA)
    assert call.kwargs.get("sparse_mode", 0) == (4 if offset > 0 else 0)


# -------------------------------------------------------------------- masks


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (BATCH, 1, 1, 9), (5, 9), (BATCH, 1, 5, 9)], ids=str)
def test_bool_masks_hide_where_they_are_false(shape: tuple[int, ...], dynamic: bool) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    found = checked(lambda q, k, v, m: attention(q, k, v, scale=0.2, mask=m), *operands(5, 9), mask, dynamic=dynamic)
    call = call_of(found, FIA)
    assert (call.kwargs["inner_precise"], call.kwargs.get("sparse_mode", 0)) == (2, 0)


@pytest.mark.parametrize("queries", [1, 5])
def test_rows_that_are_hidden_as_a_whole_are_zero(queries: int) -> None:
    mask = torch.ones(BATCH, 1, queries, 9, dtype=torch.bool)
    mask[1] = False
    inputs = (*operands(queries, 9), mask)
    found = checked(lambda q, k, v, m: attention(q, k, v, scale=0.2, mask=m), *inputs)
    call_of(found, FIA)
    assert not run(found, *inputs)[1].any()


def test_a_mask_beside_causality() -> None:
    mask = torch.rand(BATCH, 1, 1, 9) < 0.7
    found = checked(lambda q, k, v, m: attention(q, k, v, scale=0.2, mask=m, is_causal=True, causal_offset=4), *operands(5, 9), mask)
    assert "sparse_mode" not in call_of(found, FIA).kwargs


def test_a_mask_for_each_head() -> None:
    mask = torch.rand(BATCH, HEADS, 5, 9) < 0.7
    found = checked(lambda q, k, v, m: attention(q, k, v, scale=0.2, mask=m), *operands(5, 9), mask)
    call_of(found, FUSION)
    assert "it takes one mask for all heads" in found.reason


def test_a_decode_step_of_a_static_cache_needs_nothing_but_the_mask() -> None:
    """The position is where the cache is written: it is not negative, and key 0 is visible."""

    def fn(q: Tensor, k: Tensor, v: Tensor, new: Tensor, position: Tensor) -> Tensor:
        index = torch.arange(1) + position
        k, v = k.index_copy(2, index, new), v.index_copy(2, index, new)
        mask = torch.arange(k.shape[2])[None, None, None, :] <= index[None, None, :, None]
        return attention(q, k, v, scale=0.2, mask=mask.expand(BATCH, 1, 1, -1))

    q, (k, v) = heads(1, HEADS), operands(5, 9, stored="BNSD")[1:]
    found = checked(fn, q, k, v, heads(1), torch.tensor(4))
    assert call_of(found, FIA).kwargs["input_layout"] == "BNSD"
    assert "aten.masked_fill" not in found.targets()


def test_a_position_of_unknown_sign_may_hide_every_key() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.2, mask=torch.arange(k.shape[2])[None, :] <= position)

    for position in (-1, 3):
        found = checked(fn, *operands(1, 9), torch.tensor([position]))
        assert "aten.masked_fill" in found.targets()


# -------------------------------------------------------------------- masks that are added


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("rows", [1, BATCH])
def test_finite_biases_are_added(rows: int, queries: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.2, mask=torch.where(visible, 0.0, torch.finfo(BF16).min).to(q.dtype))

    visible = torch.rand(rows, 1, queries, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[..., 0] = True
    call = call_of(checked(fn, *operands(queries, 9), visible), FIA)
    assert call.kwargs["pse_shift"].meta["val"].shape == (rows, HEADS, queries, 9)


@pytest.mark.parametrize("queries", [1, 5])
def test_a_bias_that_hides_is_a_mask_where_every_query_sees_a_key(queries: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = torch.arange(9)[None, :] <= torch.arange(queries)[:, None]
        hidden = torch.full((), torch.finfo(BF16).min, dtype=BF16)
        return attention(q, k, v, scale=0.2, mask=torch.where(visible, torch.zeros((), dtype=BF16), hidden))

    call = call_of(checked(fn, *operands(queries, 9)), FIA)
    assert "atten_mask" in call.kwargs
    assert "pse_shift" not in call.kwargs


@pytest.mark.parametrize("columns", [1, HEADS])
@pytest.mark.parametrize("queries", [1, 5])
def test_biases_may_hold_infinities(queries: int, columns: int) -> None:
    bias = torch.randn(BATCH, columns, queries, 9, generator=torch.Generator().manual_seed(2))
    bias = bias.masked_fill(torch.rand(bias.shape, generator=torch.Generator().manual_seed(3)) < 0.4, -math.inf).to(BF16)
    bias[0, 0, 0] = -math.inf
    found = checked(lambda q, k, v, m: attention(q, k, v, scale=0.2, mask=m), *operands(queries, 9), bias)
    call_of(found, FIA)
    assert found.targets().count("aten.masked_fill") == 1


def test_biases_of_a_wider_dtype_stay_wide() -> None:
    found = checked(lambda q, k, v, m: attention(q, k, v, scale=0.2, mask=m), *operands(5, 9), torch.randn(5, 9))
    assert found.provider == REFERENCE
    assert "it adds a mask of torch.bfloat16 to the logits, the model's is torch.float32" in found.reason


# -------------------------------------------------------------------- lengths and pages


def test_lengths_on_the_device_are_a_mask_and_hide_even_nan() -> None:
    q, k, v = operands(5, 9)
    k[1, :, 4:] = v[1, :, 4:] = math.nan
    lengths = torch.tensor([9, 4, 1])
    found = lower_call(lambda q, k, v, n: attention(q, k, v, scale=0.2, kv_lengths=n), q, k, v, lengths)
    call_of(found, FIA)
    expected = attention(q, k, v, scale=0.2, kv_lengths=lengths)
    exact = attention(q.double(), k.double(), v.double(), scale=0.2, kv_lengths=lengths)
    assert_within_contract(run(found, q, k, v, lengths), expected, exact, BF16)


def test_lengths_of_the_host_are_a_list() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, *rows: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.2, kv_lengths=torch.cat([torch.full((1,), row.shape[0]) for row in rows]))

    found = checked(fn, *operands(5, 9), torch.zeros(6), torch.zeros(3), torch.zeros(7), dynamic=True)
    lengths = call_of(found, FIA).kwargs["actual_seq_lengths_kv"]
    assert [type(length) for length in lengths] == [Node] * BATCH


def pages(size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    cache = torch.randn(6, KV_HEADS, size, DIM, generator=generator).to(BF16)
    return cache, cache.flip(0).contiguous(), torch.tensor([[4, 1], [0, 5], [3, 2]], dtype=torch.int32)


@pytest.mark.parametrize("queries", [1, 5])
def test_pages_with_lengths_of_the_host(queries: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, table: Tensor, a: Tensor) -> Tensor:
        lengths = torch.full((BATCH,), a.shape[0])
        return attention(q, k, v, scale=0.2, kv_lengths=lengths, block_table=table)

    call = call_of(checked(fn, heads(queries, HEADS), *pages(128), torch.zeros(200)), FIA)
    assert (call.kwargs["block_size"], call.kwargs["block_table"].op) == (128, "placeholder")


@pytest.mark.parametrize("size", [16, 128])
def test_pages_that_the_op_cannot_take_are_gathered(size: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.2, kv_lengths=lengths, block_table=table)

    found = checked(fn, heads(5, HEADS), *pages(size), torch.tensor([size + 3, 7, size]))
    assert "block_table" not in call_of(found, FIA).kwargs
    assert "lengths that the host knows" in found.reason


# -------------------------------------------------------------------- sinks


def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int = 0) -> Tensor:
    return attention(q, k, v, scale=0.2, is_causal=True, causal_offset=k.shape[2] - q.shape[2], window=window, sinks=sinks)


@pytest.mark.parametrize("queries", [1, 6, 9])
@pytest.mark.parametrize("window", [0, 3])
def test_sinks_of_packed_tokens(window: int, queries: int) -> None:
    found = checked(functools.partial(with_sinks, window=window), *operands(queries, 9, dim=64), torch.randn(HEADS).to(BF16))
    call = call_of(found, FIA_V2)
    assert call.kwargs["input_layout"] == "TND"
    assert not copies(found)
    assert (call.kwargs["actual_seq_qlen"], call.kwargs["actual_seq_kvlen"]) == ([queries, 2 * queries, 3 * queries], [9, 18, 27])
    assert call.kwargs.get("sparse_mode", 0) == (4 if window else 3 if queries > 1 else 0)


def test_packed_tokens_with_lengths_that_are_symbols() -> None:
    def fn(q: Tensor, sinks: Tensor) -> Tensor:
        return with_sinks(q, q[:, ::2], q[:, 1::2], sinks)

    found = checked(fn, heads(7, HEADS, dim=64, batch=2), torch.randn(HEADS).to(BF16), dynamic=True)
    assert all(isinstance(end, Node) for end in call_of(found, FIA_V2).kwargs["actual_seq_qlen"])


def test_packed_tokens_need_a_batch_size() -> None:
    found = checked(functools.partial(with_sinks, window=0), *operands(6, 9, dim=64), torch.randn(HEADS).to(BF16), dynamic=True)
    call_of(found, FUSION)
    assert "the batch size is symbolic" in found.reason


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [(FP16, 64, "query is float16, not bfloat16"), (BF16, 32, "query[2] is 32, not 64"), (FP32, 64, "query is float32, not float16")],
    ids=["fp16", "small", "fp32"],
)
def test_sinks_that_packed_tokens_do_not_have(dtype: torch.dtype, dim: int, reason: str) -> None:
    inputs = operands(7, 7, dim=dim, dtype=dtype)
    found = checked(lambda q, k, v, s: attention(q, k, v, scale=0.2, is_causal=True, sinks=s), *inputs, torch.randn(HEADS).to(dtype))
    assert call_of(found, FUSION).kwargs["sink"] is not None
    assert reason in found.reason
    assert "it has no sinks" in found.reason


def test_sinks_beside_a_mask() -> None:
    mask = torch.rand(BATCH, 1, 5, 9) < 0.7
    found = checked(
        lambda q, k, v, m, s: attention(q, k, v, scale=0.2, mask=m, sinks=s), *operands(5, 9, dim=64), mask, torch.randn(HEADS).to(BF16)
    )
    call_of(found, FUSION)
    assert "no mask but a structure" in found.reason


@pytest.mark.parametrize(("scale", "provider"), [(0.125, FUSION), (0.2, REFERENCE)])
def test_sinks_beside_a_bias(scale: float, provider: str) -> None:
    bias, sinks = torch.randn(BATCH, 1, 5, 9).to(BF16), torch.randn(HEADS).to(BF16)
    found = checked(lambda q, k, v, m, s: attention(q, k, v, scale=scale, mask=m, sinks=s), *operands(5, 9, dim=64), bias, sinks)
    assert found.provider == provider


# -------------------------------------------------------------------- what FIA does not take


@pytest.mark.parametrize("queries", [1, 5])
def test_fp32(queries: int) -> None:
    inputs = operands(queries, 9, dtype=FP32)
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2, is_causal=True, causal_offset=k.shape[2] - q.shape[2]), *inputs)
    call_of(found, FUSION)
    assert "query is float32, not float16 or bfloat16" in found.reason


def test_values_that_are_narrower_than_keys() -> None:
    q, k, v = heads(5, HEADS, 48), heads(9, HEADS, 48), heads(9, HEADS, 32)
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2), q, k, v)
    call_of(found, FUSION)
    assert "they must be equal" in found.reason


def test_heads_of_192_with_values_of_128_are_packed() -> None:
    q, k, v = heads(5, HEADS, 192), heads(9, HEADS, 192), heads(9, HEADS, 128)
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.1, is_causal=True, causal_offset=k.shape[2] - q.shape[2]), q, k, v)
    assert call_of(found, FIA_V2).kwargs["actual_seq_kvlen"] == [9, 18, 27]
    assert not copies(found)


def test_head_sizes_that_are_no_multiple_of_16() -> None:
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2), *operands(5, 9, dim=24))
    call_of(found, FUSION)
    assert "query[3] is 24, not known to be a multiple of 16" in found.reason


def test_softcaps_are_nobody_s() -> None:
    found = checked(lambda q, k, v: attention(q, k, v, scale=0.2, softcap=5.0), *operands(5, 9))
    assert (found.provider, "it has no softcap" in found.reason) == (REFERENCE, True)


def test_other_socs_run_the_reference() -> None:
    found = lower_call(lambda q, k, v: attention(q, k, v, scale=0.2), *operands(5, 9), target="ascend950")
    assert found.provider == REFERENCE


# -------------------------------------------------------------------- latent attention


def latent(*tensors: Tensor) -> Tensor:
    return mla_attention(*tensors, scale=0.1, is_causal=True, causal_offset=tensors[2].shape[2] - tensors[0].shape[2])


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize(("nope", "rope", "value", "provider"), [(64, 128, 128, FIA_V2), (32, 16, 48, FIA), (32, 16, 32, FUSION)], ids=str)
def test_latent_attention_on_joined_parts(nope: int, rope: int, value: int, provider: str, shared: bool) -> None:
    inputs = [heads(5, HEADS, nope), heads(5, HEADS, rope), heads(9, HEADS, nope), heads(9, 1 if shared else HEADS, rope)]
    found = checked(latent, *inputs, heads(9, HEADS, value))
    call_of(found, provider)
    assert copies(found) == ["aten.cat"] * 2 + ["aten.clone"] * 2 * (provider == FUSION)  # values and result: BNSD only


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
def test_latent_attention_on_parts_that_lie_apart(shared: bool) -> None:
    inputs = [heads(5, HEADS, 128), heads(5, HEADS, 64), heads(9, HEADS, 128), heads(9, 1 if shared else HEADS, 64)]
    found = checked(latent, *inputs, heads(9, HEADS, 128))
    assert {"query_rope", "key_rope"} <= call_of(found, FIA_V2).kwargs.keys()
    assert copies(found) == ["aten.clone"] * shared  # one head for all


def test_latent_attention_on_parts_that_lie_together() -> None:
    query, key_value, k_rope = heads(5, HEADS, 192), heads(9, HEADS, 256), heads(9, 1, 64)
    found = checked(latent, query[..., :128], query[..., 128:], key_value[..., :128], k_rope, key_value[..., 128:])
    assert "query_rope" not in call_of(found, FIA_V2).kwargs
    assert copies(found) == ["aten.cat"] * 2 + ["aten.clone"]  # of the values


@pytest.mark.parametrize("queries", [1, 3])
def test_absorbed_attention_reads_the_latent_as_it_is(queries: int) -> None:
    def absorbed(q_nope: Tensor, q_rope: Tensor, cache: Tensor, k_rope: Tensor) -> Tensor:
        offset = cache.shape[2] - q_nope.shape[2]
        return mla_attention(q_nope, q_rope, cache, k_rope, cache, scale=0.04, is_causal=queries > 1, causal_offset=offset)

    stored = {"stored": "BNSD"}
    inputs = [heads(queries, HEADS, 512, **stored), heads(queries, HEADS, 64, **stored), heads(9, 1, 512), heads(9, 1, 64)]
    found = checked(absorbed, *inputs)
    call = call_of(found, FIA)
    assert call.kwargs["num_key_value_heads"] == 1
    assert {"query_rope", "key_rope"} <= call.kwargs.keys()
    assert ("atten_mask" in call.kwargs) == (queries > 1)
    assert copies(found) == ["aten.clone"] * (queries > 1)  # of the result, which is handed out token by token


def test_absorbed_attention_of_other_sizes_is_refused() -> None:
    def absorbed(q_nope: Tensor, q_rope: Tensor, cache: Tensor, k_rope: Tensor) -> Tensor:
        return mla_attention(q_nope, q_rope, cache, k_rope, cache, scale=0.1)

    found = lower_call(absorbed, heads(1, HEADS, 256), heads(1, HEADS, 64), heads(9, 1, 256), heads(9, 1, 64))
    assert "it takes a latent of 512 and positions of 64, the model has [256, 64]" in found.reason


def test_dynamic_graphs_serve_other_sizes() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scale=0.2, is_causal=True, causal_offset=k.shape[2] - q.shape[2], window=4)

    found = checked(fn, *operands(5, 9), dynamic=True)
    other = operands(6, 11, batch=2)
    assert_within_contract(run(found, *other), fn(*other), fn(*(x.double() for x in other)), BF16)
