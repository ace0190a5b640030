"""CPU kernels of npu_fusion_attention, versions 1, 2 and 3, against attention in float64; what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lowerings.ascend.checks import check_kernel
from tests.lowerings.ascend.emulation.golden_attention import (
    Golden,
    Sees,
    assert_close,
    assert_raises,
    causal_mask,
    golden,
    laid_out,
    operands,
)

npu = torch.ops.npu
NAMES = ("npu::npu_fusion_attention", "npu::npu_fusion_attention_v2", "npu::npu_fusion_attention_v3")
SCALE = 0.2
LOWEST, HIGHEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max


def version(number: int, **arguments: Any) -> dict[str, Any]:
    """The arguments as a version calls them."""
    if number == 2:
        arguments = {name.replace("tockens", "tokens"): argument for name, argument in arguments.items()}
    if number == 3:
        arguments = {name: torch.tensor(value) if name.startswith("actual") else value for name, value in arguments.items()}
    return arguments


def fusion(q: Tensor, k: Tensor, v: Tensor, heads: int, layout: str = "BNSD", *, fakes: bool = False, **arguments: Any) -> tuple[Any, ...]:
    """All versions, which must agree; the results of the first."""
    results = []
    for number, name in enumerate(NAMES, 1):
        own = version(number, **{"scale": SCALE, **arguments})
        call = getattr(npu, name.split("::")[1])
        results.append(check_kernel(name, q, k, v, heads, layout, **own) if fakes else call(q, k, v, heads, layout, **own))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0][:4], other[:4], strict=True))
    return results[0]


def assert_fusion(actual: tuple[Any, ...], exact: Golden, layout: str = "BNSD", dtype: torch.dtype = torch.float32) -> None:
    """Output, maximum and sum are those of float64."""
    assert_close(actual[0], laid_out(exact.output, layout))
    for statistics, rows in ((actual[1], exact.maximum), (actual[2], exact.total)):
        assert statistics.dtype == torch.float32
        assert statistics.shape == (*rows.shape, 8)
        assert_close(statistics, rows.unsqueeze(-1).expand(*rows.shape, 8), torch.float32)


# -------------------------------------------------------------------- layouts and dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "BNSD"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    q, k, v = operands(2, 4, 2, 3, 5, 24, dtype)
    result = fusion(*(laid_out(x, layout) for x in (q, k, v)), 4, layout, fakes=dtype == torch.float16)
    assert result[0].dtype == result[3].dtype == dtype
    assert result[3].shape == (0,)
    assert_fusion(result, golden(q, k, v, SCALE), layout)


@pytest.mark.parametrize("layout", ["BSH", "BNSD", "bsnd"])
def test_values_may_be_narrower_than_keys(layout: str) -> None:
    q, k, v = operands(2, 4, 2, 3, 5, 24, torch.float32, 8)
    result = fusion(*(laid_out(x, layout.upper()) for x in (q, k, v)), 4, layout, fakes=True)
    assert_fusion(result, golden(q, k, v, SCALE), layout.upper())


def test_the_last_results_are_ints_or_tensors() -> None:
    q, k, v = operands(2, 4, 2, 3, 5, 24)
    assert npu.npu_fusion_attention(q, k, v, 4, "BNSD", seed=3, offset=4)[4:] == (3, 4, 2 * 4 * 3 * 5)
    assert npu.npu_fusion_attention_v2(q, k, v, 4, "BNSD", seed=3, offset=4)[4:] == (3, 4, 2 * 4 * 3 * 5)
    seed, offset = npu.npu_fusion_attention_v3(q, k, v, 4, "BNSD")[4:]
    assert (seed.shape, seed.dtype, offset.shape, offset.dtype) == ((1,), torch.int64, (1,), torch.int64)


def packed_sees(ends: list[int], key_ends: list[int], inner: Any = None) -> Sees:
    """Within its own sequence, and there as `inner(number, i, j, queries, keys)` says."""

    def sees(_: int, i: int, j: int) -> bool:
        number = sum(i >= end for end in ends)
        first, start = ([0, *ends][number], [0, *key_ends][number])
        queries, keys = ends[number] - first, key_ends[number] - start
        return 0 <= j - start < keys and (inner is None or inner(number, i - first, j - start, queries, keys))

    return sees


@pytest.mark.parametrize("softmax_layout", ["", "TND"])
def test_packed_tokens(softmax_layout: str) -> None:
    q, k, v = operands(1, 4, 2, 6, 9, 24)
    ends, key_ends = [2, 2, 6], [3, 4, 9]
    packed = [laid_out(x, "TND") for x in (q, k, v)]
    result = fusion(*packed, 4, "TND", fakes=True, actual_seq_qlen=ends, actual_seq_kvlen=key_ends, softmax_layout=softmax_layout)
    exact = golden(q, k, v, SCALE, packed_sees(ends, key_ends))
    assert_close(result[0], laid_out(exact.output, "TND"))
    for statistics, rows in ((result[1], exact.maximum), (result[2], exact.total)):
        wide = rows.unsqueeze(-1).expand(*rows.shape, 8)
        if softmax_layout:
            expected = laid_out(wide, "TND")
        else:  # sequence by sequence, each [N, S, 8]
            expected = torch.cat([wide[0, :, 0:2].reshape(-1), wide[0, :, 2:6].reshape(-1)]).view(6, 4, 8)
        assert_close(statistics, expected, torch.float32)


def test_sequences_at_the_end_may_take_no_part() -> None:
    q, k, v = operands(1, 2, 2, 6, 9, 24)
    packed = [laid_out(x, "TND") for x in (q, k, v)]
    out = fusion(*packed, 2, "TND", actual_seq_qlen=[2, 4, 0], actual_seq_kvlen=[3, 7, 0], softmax_layout="TND")[0]
    exact = golden(q[:, :, :4], k[:, :, :7], v[:, :, :7], SCALE, packed_sees([2, 4], [3, 7]))
    assert_close(out[:4], laid_out(exact.output, "TND"))
    assert bool((out[4:] == 0).all())


# -------------------------------------------------------------------- masks


def sparse(mode: int, pre: int, following: int, queries: int, keys: int, prefix: int = 0) -> Sees:
    shift = keys - queries

    def sees(b: int, i: int, j: int) -> bool:
        return {
            0: i - pre <= j <= i + following,
            1: True,
            2: j <= i,
            3: j <= i + shift,
            4: i + shift - pre <= j <= i + shift + following,
            5: j <= i + shift or j < prefix,
        }[mode]

    return sees


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (4, 7), (7, 4)])
@pytest.mark.parametrize(("mode", "pre", "following"), [(2, 1, 1), (3, 0, 0), (4, 2, 1)])
def test_compressed_masks(mode: int, pre: int, following: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    q, k, v = operands(1, 2, 1, queries, keys, 24)
    result = fusion(q, k, v, 2, sparse_mode=mode, atten_mask=causal_mask(dtype), pre_tockens=pre, next_tockens=following)
    exact = golden(q, k, v, SCALE, sparse(mode, pre, following, queries, keys))
    assert_close(result[0], exact.output)
    empty = exact.maximum == -torch.inf
    assert bool((result[1][empty] == LOWEST).all())
    assert bool((result[2][empty] == HIGHEST).all())
    assert_close(result[1][~empty][:, 0], exact.maximum[~empty])


@pytest.mark.parametrize("shape", [(5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (2, 2, 5, 7)])
@pytest.mark.parametrize("mode", [0, 1])
def test_full_masks(mode: int, shape: tuple[int, ...]) -> None:
    q, k, v = operands(2, 2, 1, 5, 7, 24)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[..., 2] = False
    full = mask.expand(2, 2, 5, 7)
    result = fusion(q, k, v, 2, sparse_mode=mode, atten_mask=mask, pre_tockens=3, next_tockens=4, fakes=mode == 0)
    band = sparse(mode, 3, 4, 5, 7)
    for head in range(2):
        exact = golden(q[:, head : head + 1], k, v, SCALE, lambda b, i, j, h=head: band(b, i, j) and not bool(full[b, h, i, j]))
        assert_close(result[0][:, head : head + 1], exact.output)


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4])
def test_without_a_mask_nothing_is_hidden(mode: int) -> None:
    q, k, v = operands(1, 2, 2, 4, 4, 24)
    result = fusion(q, k, v, 2, sparse_mode=mode, pre_tockens=0, next_tockens=0)
    assert_fusion(result, golden(q, k, v, SCALE))


@pytest.mark.parametrize("mode", [5, 6])
def test_prefix(mode: int) -> None:
    q, k, v = operands(2, 2, 2, 4, 6, 24)
    prefix = [3, 6]
    if mode == 6:
        mask = torch.cat((causal_mask(), torch.arange(2048).expand(1024, -1) >= 1024))
    else:
        mask = torch.tensor([[[[not sparse(5, 0, 0, 4, 6, p)(0, i, j) for j in range(6)] for i in range(4)]] for p in prefix])
    result = fusion(q, k, v, 2, sparse_mode=mode, atten_mask=mask, prefix=prefix)
    exact = golden(q, k, v, SCALE, lambda b, i, j: j <= i + 2 or j < prefix[b])
    assert_fusion(result, exact)


@pytest.mark.parametrize("shape", [(4, 5), (6, 9)])
def test_full_masks_of_packed_tokens(shape: tuple[int, int]) -> None:
    q, k, v = operands(1, 2, 2, 6, 9, 24)
    ends, key_ends = [2, 6], [4, 9]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:, ::4] = False
    result = fusion(
        *(laid_out(x, "TND") for x in (q, k, v)),
        2,
        "TND",
        actual_seq_qlen=ends,
        actual_seq_kvlen=key_ends,
        atten_mask=mask,
        sparse_mode=1,
    )

    def inner(number: int, i: int, j: int, queries: int, keys: int) -> bool:
        row, column = (i, j) if shape == (4, 5) else (i + [0, *ends][number], j + [0, *key_ends][number])
        return not bool(mask[row, column])

    assert_close(result[0], laid_out(golden(q, k, v, SCALE, packed_sees(ends, key_ends, inner)).output, "TND"))


@pytest.mark.parametrize("mode", [2, 3, 4, 7, 8])
def test_causal_masks_of_packed_tokens(mode: int) -> None:
    q, k, v = operands(1, 2, 2, 7, 12, 24)
    ends, key_ends = [2, 4, 7], [4, 8, 12]
    result = fusion(
        *(laid_out(x, "TND") for x in (q, k, v)),
        2,
        "TND",
        actual_seq_qlen=ends,
        actual_seq_kvlen=key_ends,
        atten_mask=causal_mask(),
        sparse_mode=mode,
        pre_tockens=8 if mode in (7, 8) else 1,
        next_tockens=-1 if mode in (7, 8) else 0,
    )

    def inner(number: int, i: int, j: int, queries: int, keys: int) -> bool:
        if (mode, number) in ((7, 2), (8, 0)):
            return sparse(4, 8, -1, queries, keys)(0, i, j)
        return sparse({7: 3, 8: 2}.get(mode, mode), 1, 0, queries, keys)(0, i, j)

    assert_close(result[0], laid_out(golden(q, k, v, SCALE, packed_sees(ends, key_ends, inner)).output, "TND"))


def test_rows_that_a_mask_hides_as_a_whole() -> None:
    q, k, v = operands(1, 2, 2, 3, 4, 24, torch.float32)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1] = True
    result = fusion(q, k, v, 2, sparse_mode=1, atten_mask=mask, inner_precise=2)
    assert_close(result[0], golden(q, k, v, SCALE, lambda b, i, j: i != 1).output)
    assert bool((result[1][:, :, 1] == LOWEST).all())
    assert bool((result[2][:, :, 1] == HIGHEST).all())
    result = fusion(q, k, v, 2, sparse_mode=1, atten_mask=mask)
    assert_close(result[0][:, :, 1], v.double().mean(2))


FULL = torch.zeros(4, 6, dtype=torch.bool)
WRONG_MASKS = [
    ({"atten_mask": FULL.to(torch.int8)}, "atten_mask must be bool, uint8"),
    ({"atten_mask": FULL[:3]}, "must have shape"),
    ({"atten_mask": torch.zeros(1, 4, 6).bool()}, "must have shape"),
    ({"atten_mask": torch.zeros(1, 2, 4, 6).bool()}, "must have shape"),
    ({"atten_mask": FULL, "sparse_mode": 3}, "must have shape .2048, 2048"),
    ({"atten_mask": ~causal_mask(), "sparse_mode": 2}, "above the diagonal"),
    ({"atten_mask": torch.zeros(3072, 2048).bool(), "sparse_mode": 6, "prefix": [6, 6]}, "above the diagonal"),
    ({"atten_mask": torch.cat((causal_mask(), causal_mask()[:1024])), "sparse_mode": 6, "prefix": [6, 6]}, "last 1024 rows"),
    ({"atten_mask": FULL, "sparse_mode": 5}, "prefix goes with"),
    ({"atten_mask": FULL, "prefix": [6, 6]}, "prefix goes with"),
    ({"atten_mask": FULL, "sparse_mode": 5, "prefix": [6]}, "entry for each"),
    ({"atten_mask": FULL, "sparse_mode": 5, "prefix": [1, 6]}, "within 2 and 6"),
    ({"sparse_mode": 5, "prefix": [6, 6]}, "needs atten_mask"),
    ({"atten_mask": FULL, "sparse_mode": 7}, "sparse_mode must be"),
    ({"sparse_mode": 9}, "sparse_mode must be"),
    ({"atten_mask": FULL, "pre_tockens": -3, "next_tockens": 1}, "negative"),
]


@pytest.mark.parametrize(("arguments", "match"), WRONG_MASKS)
def test_wrong_masks_are_refused(arguments: dict[str, Any], match: str) -> None:
    q, k, v = operands(2, 2, 2, 4, 6, 24)
    for number, name in enumerate(NAMES, 1):
        call = getattr(npu, name.split("::")[1])
        if arguments["atten_mask"].shape == (1, 2, 4, 6) if "atten_mask" in arguments else False:
            q, k, v = (x.expand(2, *x.shape[1:]) for x in (q[:1], k[:1], v[:1]))
        assert_raises(match, call, q, k, v, 2, "BNSD", **version(number, **arguments))


# -------------------------------------------------------------------- position bias, sink, dropout, rope parts


@pytest.mark.parametrize("shape", [(2, 2, 3, 5), (1, 2, 3, 5), (2, 2, 1, 5), (1, 2, 1, 5)])
def test_pse_is_added_before_the_scale(shape: tuple[int, ...]) -> None:
    q, k, v = operands(2, 2, 1, 3, 5, 24)
    pse = torch.randn(shape, generator=torch.Generator().manual_seed(2)).half()
    full = pse.expand(2, 2, 3, 5)
    bias = {"bias": lambda b, h, i, j: float(full[b, h, i, j])}
    assert_fusion(fusion(q, k, v, 2, pse=pse), golden(q, k, v, SCALE, **bias, bias_before_scale=True))
    after = check_kernel(NAMES[1], q, k, v, 2, "BNSD", scale=SCALE, pse=pse, pse_type=0)
    assert_fusion(after, golden(q, k, v, SCALE, **bias))


@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_slopes(shape: tuple[int, ...], kind: int) -> None:
    q, k, v = operands(3, 2, 1, 4, 4, 24)
    slopes = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.1
    full = slopes.expand(3, 2)
    power = 1 if kind == 2 else 0.5
    result = npu.npu_fusion_attention_v2(q, k, v, 2, "BNSD", scale=SCALE, pse=slopes, pse_type=kind, q_start_idx=[5], kv_start_idx=[3])
    exact = golden(q, k, v, SCALE, bias=lambda b, h, i, j: -float(full[b, h]) * abs(j + 3 - i - 5) ** power)
    assert_fusion(result, exact)


@pytest.mark.parametrize("rows", [True, False])
def test_pse_of_packed_tokens(rows: bool) -> None:
    q, k, v = operands(1, 2, 2, 6, 9, 24)
    ends, key_ends = [2, 6], [4, 9]
    parts = [torch.randn(2, queries if rows else 1, keys).half() for queries, keys in ((2, 4), (4, 5))]
    pse = torch.cat([part.reshape(-1) for part in parts])
    packed = [laid_out(x, "TND") for x in (q, k, v)]
    out = fusion(*packed, 2, "TND", actual_seq_qlen=ends, actual_seq_kvlen=key_ends, pse=pse)[0]

    def bias(_: int, h: int, i: int, j: int) -> float:
        number = int(i >= 2)
        return float(parts[number][h, (i - 2 * number) if rows else 0, j - 4 * number])

    exact = golden(q, k, v, SCALE, packed_sees(ends, key_ends), bias=bias, bias_before_scale=True)
    assert_close(out, laid_out(exact.output, "TND"))


def test_sink() -> None:
    q, k, v = operands(2, 2, 1, 3, 5, 24)
    sink = torch.tensor([-1.0, 2.0])
    assert_fusion(fusion(q, k, v, 2, sink=sink), golden(q, k, v, SCALE, sink=sink))


def test_dropout_mask() -> None:
    q, k, v = operands(1, 2, 2, 4, 8, 24)
    bits = torch.rand(1, 2, 4, 8, generator=torch.Generator().manual_seed(4)) < 0.7
    mask = (bits.reshape(-1, 8).long() << torch.arange(8)).sum(-1).to(torch.uint8)
    exact = golden(q, k, v, SCALE, weight=lambda b, h, i, j: float(bits[b, h, i, j]) / 0.7)
    for name in NAMES[:2]:
        assert_fusion(check_kernel(name, q, k, v, 2, "BNSD", scale=SCALE, keep_prob=0.7, dropout_mask=mask), exact)


def test_rope_parts() -> None:
    q, k, v = operands(1, 4, 2, 5, 5, 128)
    query_rope, key_rope, _ = operands(1, 4, 2, 5, 5, 64)
    packed = {n: laid_out(x, "TND") for n, x in {"query": q, "key": k, "value": v, "query_rope": query_rope, "key_rope": key_rope}.items()}
    arguments = {"head_num": 4, "input_layout": "TND", "scale": 0.07, "actual_seq_qlen": [5], "actual_seq_kvlen": [5]}
    out = npu.npu_fusion_attention_v2(**packed, **arguments)[0]
    exact = golden(torch.cat((q, query_rope), -1), torch.cat((k, key_rope), -1), v, 0.07)
    assert_close(out, laid_out(exact.output, "TND"))
    assert_raises("given together", npu.npu_fusion_attention_v2, **{**packed, "key_rope": None}, **arguments)
    assert_raises("only supported with", npu.npu_fusion_attention_v2, q, k, v, 4, "BNSD", query_rope=query_rope, key_rope=key_rope)


WRONG = [
    ({"padding_mask": torch.ones(1)}, "padding_mask"),
    ({"pse": torch.zeros(2, 2, 4, 6)}, "pse is torch.float32"),
    ({"pse": torch.zeros(2, 1, 4, 6).half()}, "pse must have shape"),
    ({"pse": torch.zeros(1, 2, 1024, 6).half()}, "1024 rows"),
    ({"sink": torch.zeros(2).half()}, "sink must be float32"),
    ({"sink": torch.zeros(4)}, "sink must have shape"),
    ({"keep_prob": 0.0}, "keep_prob value must be in range"),
    ({"keep_prob": 1.5}, "keep_prob value must be in range"),
    ({"keep_prob": 0.9}, "random generator"),
    ({"inner_precise": 3}, "inner_precise must be"),
    ({"softmax_layout": "TND"}, "softmax_layout=TND"),
    ({"softmax_layout": "BSH"}, "softmax_layout must be"),
    ({"actual_seq_qlen": [8], "actual_seq_kvlen": [12]}, "only supported with input_layout=TND"),
]


@pytest.mark.parametrize(("arguments", "match"), WRONG)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    q, k, v = operands(2, 2, 2, 4, 6, 24)
    for number, name in enumerate(NAMES, 1):
        assert_raises(match, getattr(npu, name.split("::")[1]), q, k, v, 2, "BNSD", **version(number, **arguments))


WRONG_OF_THE_SECOND = [
    ({"pse_type": 4}, "pse_type must be"),
    ({"pse_type": 0}, "pse_type=0 needs pse"),
    ({"pse_type": 2, "pse": torch.ones(2)}, "as many queries as keys"),
    ({"pse_type": 2, "pse": torch.ones(3)}, "pse must have shape"),
    ({"q_start_idx": [1]}, "need pse_type"),
    ({"kv_start_idx": [1, 2]}, "1 entry"),
    ({"dropout_mask": torch.ones(12).to(torch.uint8)}, "keep_prob below 1"),
    ({"dropout_mask": torch.ones(11).to(torch.uint8), "keep_prob": 0.5}, "at least 96 bits"),
    ({"dropout_mask": torch.ones(12), "keep_prob": 0.5}, "dropout_mask must be uint8"),
]


@pytest.mark.parametrize(("arguments", "match"), WRONG_OF_THE_SECOND)
def test_wrong_arguments_of_the_second_version_are_refused(arguments: dict[str, Any], match: str) -> None:
    q, k, v = operands(2, 2, 2, 4, 6, 24)
    assert_raises(match, npu.npu_fusion_attention_v2, q, k, v, 2, "BNSD", **arguments)


@pytest.mark.parametrize("name", [name.split("::")[1] for name in NAMES])
def test_wrong_operands_are_refused(name: str) -> None:
    q, k, v = operands(2, 4, 2, 4, 6, 24)
    call = getattr(npu, name)
    assert_raises("head_num must > 0", call, q, k, v, 0, "BNSD")
    assert_raises("input_layout should be", call, q, k, v, 4, "NTD")
    assert_raises("head_num is 2", call, q, k, v, 2, "BNSD")
    assert_raises("query must have 3 dimensions", call, q, k, v, 4, "BSH")
    assert_raises("must be float16, bfloat16, float32", call, q.double(), k.double(), v.double(), 4, "BNSD")
    assert_raises("dtypes must be equal", call, q, k, v.float(), 4, "BNSD")
    assert_raises("must be a multiple of the 2 heads", call, q[:, :3], k, v, 3, "BNSD")
    assert_raises("Dq = Dk >= Dv", call, q[..., :16], k, v, 4, "BNSD")
    assert_raises("one shape", call, q, k, v[:, :, :5], 4, "BNSD")
    assert_raises("one batch", call, q, k[:1], v[:1], 4, "BNSD")
    packed = [laid_out(x[:1], "TND") for x in (q, k, v)]
    assert_raises("cannot be empty", call, *packed, 4, "TND")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"actual_seq_kvlen": [9]}, "must be the same"),
        ({"actual_seq_qlen": [4, 7]}, "last entry of actual_seq_qlen"),
        ({"actual_seq_qlen": [4, 3]}, "cumulative"),
        ({"sparse_mode": 5, "prefix": [9, 9]}, "sparse_mode must be"),
        ({"sparse_mode": 3, "atten_mask": causal_mask(), "actual_seq_kvlen": [1, 9]}, "needs as many"),
        ({"atten_mask": torch.zeros(5, 5).bool()}, "must have shape"),
        ({"pse": torch.zeros(7).half()}, "pse must have 18 or"),
    ],
)
def test_what_packed_tokens_do_not_allow(arguments: dict[str, Any], match: str) -> None:
    q, k, v = (laid_out(x, "TND") for x in operands(1, 2, 2, 6, 9, 24))
    lengths = {"actual_seq_qlen": [2, 6], "actual_seq_kvlen": [4, 9]}
    for number, name in enumerate(NAMES, 1):
        assert_raises(match, getattr(npu, name.split("::")[1]), q, k, v, 2, "TND", **version(number, **{**lengths, **arguments}))


# -------------------------------------------------------------------- no argument is ignored


@pytest.mark.parametrize(
    "arguments",
    [
        {"pse": torch.arange(6.0).expand(1, 2, 4, 6).contiguous().half()},
        {"atten_mask": torch.ones(4, 6).bool().triu(1)},
        {"scale": 0.3},
        {"sink": torch.ones(2)},
        {"sparse_mode": 3, "atten_mask": causal_mask()},
        {"pre_tockens": 1, "atten_mask": FULL},
        {"next_tockens": 1, "atten_mask": FULL},
        {"sparse_mode": 5, "atten_mask": FULL, "prefix": [4]},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_arguments_that_change_the_result(arguments: dict[str, Any]) -> None:
    q, k, v = operands(1, 2, 2, 4, 6, 24)
    assert not torch.equal(fusion(q, k, v, 2, **arguments)[0], fusion(q, k, v, 2)[0])
