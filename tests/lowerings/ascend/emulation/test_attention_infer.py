"""CPU kernels of FIA, both versions, against attention in float64: layouts, lengths and masks; what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lowerings.ascend.checks import check_kernel
from tests.lowerings.ascend.emulation.golden_attention import (
    SCALE,
    V1,
    assert_close,
    assert_raises,
    both,
    causal_mask,
    fia,
    golden,
    laid_out,
    operands,
    sparse,
)

# -------------------------------------------------------------------- layouts

PADDED = ["BSH", "BSND", "BNSD", "BNSD_BSND", "BSH_BNSD", "BSND_BNSD", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD"]


@pytest.mark.parametrize(("queries", "dtype"), [(1, torch.float16), (5, torch.bfloat16)])
@pytest.mark.parametrize("layout", PADDED)
def test_padded_layouts(layout: str, queries: int, dtype: torch.dtype) -> None:
    source, _, target = layout.partition("_")
    q, k, v = operands(2, 6, 2, queries, 7, dtype=dtype)
    exact = golden(q, k, v, SCALE)
    laid = [laid_out(x, source) for x in (q, k, v)]
    out, lse = both(*laid, num_heads=6, num_key_value_heads=2, input_layout=layout, fakes=True)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, laid_out(exact.output, target or source))
    assert_close(lse, exact.lse.unsqueeze(-1))


def test_nsd_has_batch_1() -> None:
    q, k, v = operands(1, 4, 4, 3, 5)
    out, _ = both(*(laid_out(x, "NSD") for x in (q, k, v)), num_heads=4, input_layout="NSD", fakes=True)
    assert_close(out, golden(q, k, v, SCALE).output[0])


def test_bsh_one_head_and_scale_one_are_the_defaults() -> None:
    q, k, v = operands(2, 1, 1, 3, 4)
    out, lse = check_kernel(V1, *(laid_out(x, "BSH") for x in (q, k, v)))
    assert_close(out, laid_out(golden(q, k, v, 1.0).output, "BSH"))
    assert lse.shape == (0,)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("layout", "width"),
    [*((layout, (64, 64)) for layout in ("TND", "NTD", "TND_NTD", "NTD_TND")), ("NTD", (192, 128)), ("TND", (192, 192))],
)
def test_packed_layouts(layout: str, width: tuple[int, int]) -> None:
    source, _, target = layout.partition("_")
    heads, kv_heads = (2, 2) if width[1] == 192 else (4, 2)
    q, k, v = operands(1, heads, kv_heads, 6, 9, width[0], torch.bfloat16, width[1])
    arguments = {"num_heads": heads, "num_key_value_heads": kv_heads, "actual_seq_lengths": [2, 2, 6], "actual_seq_lengths_kv": [3, 4, 9]}
    out, lse = both(*(laid_out(x, source) for x in (q, k, v)), **arguments, input_layout=layout, fakes=True)
    sequence = [0, 0, 2, 2, 2, 2]
    keys = [(0, 3), (3, 4), (4, 9)]
    exact = golden(q, k, v, SCALE, lambda b, i, j: keys[sequence[i]][0] <= j < keys[sequence[i]][1])
    assert_close(out, laid_out(exact.output, target or source))
    assert_close(lse, laid_out(exact.lse.unsqueeze(-1), "TND"), torch.float32)


@pytest.mark.parametrize("layout", ["SBH", "BNS", "", "BSND_TND", "bsnd"])
def test_other_layouts_are_refused(layout: str) -> None:
    q, k, v = operands(2, 2, 2, 3, 4)
    assert_raises("input_layout must be", fia, q, k, v, num_heads=2, input_layout=layout)


# -------------------------------------------------------------------- lengths


@pytest.mark.parametrize("queries", [1, 4])
def test_lengths_and_rows_beyond_them(queries: int) -> None:
    q, k, v = operands(3, 2, 2, queries, 6)
    lengths = [min(queries, 3), 0, 1] if queries > 1 else [1, 1, 1]
    out, lse = both(q, k, v, num_heads=2, input_layout="BNSD", actual_seq_lengths=lengths, actual_seq_lengths_kv=[6, 2, 0])
    exact = golden(q, k, v, SCALE, lambda b, i, j: i < lengths[b] and j < [6, 2, 0][b])
    assert_close(out, exact.output)
    assert_close(lse, exact.lse.unsqueeze(-1))
    assert bool((out[2] == 0).all())


def test_one_length_counts_for_all_and_surplus_lengths_do_not_count() -> None:
    q, k, v = operands(2, 2, 2, 4, 6)
    one = fia(q, k, v, num_heads=2, input_layout="BNSD", actual_seq_lengths_kv=[3])
    assert torch.equal(one, fia(q, k, v, num_heads=2, input_layout="BNSD", actual_seq_lengths_kv=[3, 3, 5, 99]))
    assert_close(one, golden(q, k, v, SCALE, lambda b, i, j: j < 3).output)


def test_length_of_one_query_has_no_effect() -> None:
    q, k, v = operands(2, 2, 2, 1, 6)
    assert torch.equal(
        fia(q, k, v, num_heads=2, input_layout="BNSD", actual_seq_lengths=[0]), fia(q, k, v, num_heads=2, input_layout="BNSD")
    )


def test_empty_operands() -> None:
    q, k, v = operands(2, 2, 2, 3, 4)
    out, lse = both(q, k[:, :, :0], v[:, :, :0], num_heads=2, input_layout="BNSD", fakes=True)
    assert bool((out == 0).all())
    assert bool((lse == torch.inf).all())
    out, lse = both(q[:, :, :0], k, v, num_heads=2, input_layout="BNSD")
    assert out.shape == (2, 2, 0, 32)
    assert lse.shape == (2, 2, 0, 1)


@pytest.mark.parametrize("lengths", [[5], [-1, 2], [1, 2], []])
def test_wrong_lengths_are_refused(lengths: list[int]) -> None:
    q, k, v = operands(3, 2, 2, 3, 4)
    assert_raises("actual_seq_lengths_kv must", fia, q, k, v, num_heads=2, input_layout="BNSD", actual_seq_lengths_kv=lengths)
    assert_raises("actual_seq_lengths must", fia, q, k, v, num_heads=2, input_layout="BNSD", actual_seq_lengths=lengths)


@pytest.mark.parametrize(
    ("queries", "keys", "match"),
    [
        (None, [4, 8], "actual_seq_lengths is required"),
        ([3, 6], None, "actual_seq_lengths_kv is required"),
        ([3, 5], [4, 8], "last entry of actual_seq_lengths must be"),
        ([3, 6], [4, 7], "last entry of actual_seq_lengths_kv must be"),
        ([4, 3, 6], [4, 5, 8], "cumulative"),
        ([3, 6], [2, 4, 8], "as many entries"),
    ],
)
def test_wrong_packed_lengths_are_refused(queries: Any, keys: Any, match: str) -> None:
    q, k, v = (laid_out(x, "TND") for x in operands(1, 2, 2, 6, 8, 64))
    assert_raises(match, fia, q, k, v, num_heads=2, input_layout="TND", actual_seq_lengths=queries, actual_seq_lengths_kv=keys)


# -------------------------------------------------------------------- masks


@pytest.mark.parametrize(("queries", "keys", "dtype"), [(5, 5, torch.bool), (4, 7, torch.int8), (7, 4, torch.uint8)])
@pytest.mark.parametrize(("mode", "pre", "following"), [(2, 1, 1), (3, 0, 0), (4, 2, 1), (4, 3, -1), (4, -1, 3)])
def test_compressed_masks(mode: int, pre: int, following: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    q, k, v = operands(1, 2, 1, queries, keys)
    arguments = {"num_heads": 2, "num_key_value_heads": 1, "input_layout": "BNSD", "sparse_mode": mode}
    out, lse = both(q, k, v, **arguments, atten_mask=causal_mask(dtype), pre_tokens=pre, next_tokens=following)
    exact = golden(q, k, v, SCALE, sparse(mode, pre, following, queries, keys))
    assert_close(out, exact.output)
    assert_close(lse, exact.lse.unsqueeze(-1))


@pytest.mark.parametrize("shape", [(1, 2048, 2048), (1, 1, 2048, 2048)])
def test_shapes_of_the_compressed_mask(shape: tuple[int, ...]) -> None:
    q, k, v = operands(1, 2, 2, 4, 4)
    arguments = {"num_heads": 2, "input_layout": "BNSD", "sparse_mode": 3}
    assert torch.equal(fia(q, k, v, **arguments, atten_mask=causal_mask().view(shape)), fia(q, k, v, **arguments, atten_mask=causal_mask()))


def test_causal_modes_count_lengths_not_sizes() -> None:
    q, k, v = operands(2, 2, 2, 5, 6)
    lengths, key_lengths = [3, 5], [6, 5]
    out = fia(
        q,
        k,
        v,
        num_heads=2,
        input_layout="BNSD",
        sparse_mode=3,
        atten_mask=causal_mask(),
        actual_seq_lengths=lengths,
        actual_seq_lengths_kv=key_lengths,
    )
    exact = golden(q, k, v, SCALE, lambda b, i, j: i < lengths[b] and j <= i + key_lengths[b] - lengths[b])
    assert_close(out, exact.output)


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (2, 5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (2, 1, 6, 16), (8, 8)])
@pytest.mark.parametrize("mode", [0, 1])
def test_full_masks(mode: int, shape: tuple[int, ...]) -> None:
    q, k, v = operands(2, 2, 2, 5, 7)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[..., 2] = False
    rows = mask.reshape(-1, *shape[-2:])
    arguments = {"num_heads": 2, "input_layout": "BNSD", "sparse_mode": mode, "pre_tokens": 3, "next_tokens": 4}
    out, lse = both(q, k, v, **arguments, atten_mask=mask)
    band = sparse(mode, 3, 4, 5, 7)
    exact = golden(q, k, v, SCALE, lambda b, i, j: band(b, i, j) and not bool(rows[b % rows.shape[0], i, j]))
    assert_close(out, exact.output)
    assert_close(lse, exact.lse.unsqueeze(-1))


@pytest.mark.parametrize("shape", [(3, 6), (3, 1, 6), (3, 1, 1, 6), (3, 1, 1, 8)])
def test_masks_of_one_query(shape: tuple[int, ...]) -> None:
    q, k, v = operands(3, 2, 2, 1, 6)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = False
    out, _ = both(q, k, v, num_heads=2, input_layout="BNSD", atten_mask=mask)
    rows = mask.reshape(3, -1)
    assert_close(out, golden(q, k, v, SCALE, lambda b, i, j: not bool(rows[b, j])).output)


def test_sparse_modes_of_one_query() -> None:
    q, k, v = operands(2, 2, 2, 1, 6)
    arguments = {"num_heads": 2, "input_layout": "BNSD", "atten_mask": causal_mask()}
    plain = fia(q, k, v, num_heads=2, input_layout="BNSD")
    assert torch.equal(fia(q, k, v, **arguments, sparse_mode=3), plain)
    assert torch.equal(fia(q, k, v, **arguments, sparse_mode=4, pre_tokens=5, next_tokens=0), plain)
    assert_raises("the operator ignores it", fia, q, k, v, **arguments, sparse_mode=4, pre_tokens=4, next_tokens=0)
    assert_raises("the operator ignores it", fia, q, k, v, **arguments, sparse_mode=2)


def test_without_a_mask_nothing_is_hidden() -> None:
    q, k, v = operands(1, 2, 2, 4, 4)
    plain = fia(q, k, v, num_heads=2, input_layout="BNSD")
    assert torch.equal(fia(q, k, v, num_heads=2, input_layout="BNSD", pre_tokens=0, next_tokens=0), plain)


def test_rows_that_a_mask_hides_as_a_whole() -> None:
    q, k, v = operands(1, 2, 2, 3, 4)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1] = True
    arguments = {"num_heads": 2, "input_layout": "BNSD", "sparse_mode": 1, "atten_mask": mask}
    exact = golden(q, k, v, SCALE, lambda b, i, j: i != 1)
    for precise in (2, 3):
        out, lse = both(q, k, v, **arguments, inner_precise=precise)
        assert_close(out, exact.output)
        assert_close(lse, exact.lse.unsqueeze(-1))
    for precise in (0, 1):
        averaged = fia(q, k, v, **arguments, inner_precise=precise)[:, :, 1]
        assert_close(averaged, v.double().mean(2))


MASK_ERRORS = [
    (1, None, "atten_mask is required"),
    (3, None, "atten_mask is required"),
    (3, torch.ones(5, 7).bool(), "must have shape .2048, 2048"),
    (2, torch.zeros(2048, 2048).bool(), "must be 1 above the diagonal"),
    (4, torch.ones(2048, 2048).bool(), "must be 1 above the diagonal"),
    (3, torch.ones(2048, 2048).bool().tril(), "must be 1 above the diagonal"),
    (3, torch.ones(2, 2048, 2048).bool(), "must have shape"),
    (0, torch.ones(5, 6).bool(), "must have shape"),
    (0, torch.ones(4, 7).bool(), "must have shape"),
    (0, torch.ones(3, 5, 7).bool(), "must have shape"),
    (0, torch.ones(2, 2, 5, 7).bool(), "must have shape"),
    (0, torch.ones(7).bool(), "2, 3 or 4 dimensions"),
    (0, torch.ones(5, 7), "atten_mask must be bool, int8, uint8"),
    (5, causal_mask(), "sparse_mode must be"),
    (-1, None, "sparse_mode must be"),
]


@pytest.mark.parametrize(("mode", "mask", "match"), MASK_ERRORS)
def test_wrong_masks_are_refused(mode: int, mask: Tensor | None, match: str) -> None:
    q, k, v = operands(2, 2, 2, 5, 7)
    assert_raises(match, fia, q, k, v, num_heads=2, input_layout="BNSD", sparse_mode=mode, atten_mask=mask)


def test_an_empty_window_is_refused() -> None:
    q, k, v = operands(2, 2, 2, 5, 7)
    for mode, mask in ((0, torch.zeros(5, 7).bool()), (4, causal_mask())):
        arguments = {"sparse_mode": mode, "atten_mask": mask, "pre_tokens": -2, "next_tokens": 1}
        assert_raises("negative", fia, q, k, v, num_heads=2, input_layout="BNSD", **arguments)


@pytest.mark.parametrize("mode", [0, 3, 4])
def test_packed_masks(mode: int) -> None:
    q, k, v = operands(1, 2, 2, 6, 9, 64)
    ends, key_ends = [2, 6], [4, 9]
    mask = {"atten_mask": causal_mask()} if mode else {}
    out, _ = both(
        *(laid_out(x, "TND") for x in (q, k, v)),
        num_heads=2,
        input_layout="TND",
        sparse_mode=mode,
        pre_tokens=1,
        next_tokens=0,
        actual_seq_lengths=ends,
        actual_seq_lengths_kv=key_ends,
        **mask,
    )

    def sees(b: int, i: int, j: int) -> bool:
        first, start, queries, keys = (0, 0, 2, 4) if i < 2 else (2, 4, 4, 5)
        inside = 0 <= j - start < keys
        return inside and (mode == 0 or sparse(mode, 1, 0, queries, keys)(0, i - first, j - start))

    assert_close(out, laid_out(golden(q, k, v, SCALE, sees).output, "TND"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"atten_mask": torch.zeros(6, 9).bool()}, "atten_mask needs sparse_mode 3 or 4"),
        ({"sparse_mode": 1, "atten_mask": torch.zeros(6, 9).bool()}, "sparse_mode must be 0, 3 or 4"),
        ({"sparse_mode": 2, "atten_mask": causal_mask()}, "sparse_mode must be 0, 3 or 4"),
        ({"sparse_mode": 3, "atten_mask": causal_mask(), "actual_seq_lengths_kv": [1, 9]}, "needs as many"),
        ({"pse_shift": torch.zeros(1, 2, 6, 9).half()}, "pse_shift is not supported with packed"),
        ({"quant_scale2": torch.ones(1)}, "quant_scale2 is not supported with packed"),
        ({"query_padding_size": torch.zeros(1).long()}, "not supported with packed"),
    ],
)
def test_what_packed_tokens_do_not_allow(arguments: dict[str, Any], match: str) -> None:
    q, k, v = (laid_out(x, "TND") for x in operands(1, 2, 2, 6, 9, 64))
    lengths = {"actual_seq_lengths": [2, 6], "actual_seq_lengths_kv": [4, 9]}
    assert_raises(match, fia, q, k, v, num_heads=2, input_layout="TND", **{**lengths, **arguments})


@pytest.mark.parametrize(("width", "heads", "layout"), [((32, 32), 2, "TND"), ((192, 192), 4, "TND"), ((192, 192), 2, "NTD")])
def test_packed_widths_that_are_refused(width: tuple[int, int], heads: int, layout: str) -> None:
    q, k, v = (laid_out(x, layout) for x in operands(1, heads, 2, 6, 9, width[0], torch.float16, width[1]))
    lengths = {"actual_seq_lengths": [6], "actual_seq_lengths_kv": [9]}
    assert_raises("head dimension", fia, q, k, v, num_heads=heads, num_key_value_heads=2, input_layout=layout, **lengths)


# -------------------------------------------------------------------- wrong operands


def test_wrong_operands_are_refused() -> None:
    q, k, v = operands(2, 4, 2, 3, 5)
    heads = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "BNSD"}
    assert_raises("query must be float16, bfloat16", fia, q.float(), k.float(), v.float(), **heads)
    assert_raises("dtypes must be equal", fia, q, k.bfloat16(), v, **heads)
    assert_raises("query must have 4 dimensions", fia, q[0], k, v, **heads)
    assert_raises("key must have 4 dimensions", fia, q, k[0], v[0], **heads)
    assert_raises("query has 4 heads, but num_heads is 2", fia, q, k, v, num_heads=2, input_layout="BNSD")
    assert_raises("key has 2 heads", fia, q, k, v, num_heads=4, input_layout="BNSD")
    assert_raises("must be a multiple of num_key_value_heads", fia, q, k, v, **{**heads, "num_key_value_heads": 3})
    assert_raises("num_heads must be positive", fia, q, k, v, **{**heads, "num_heads": 0})
    assert_raises("one head dimension", fia, q[..., :16], k, v, **heads)
    assert_raises("must be a multiple of 16", fia, q[..., :24], k[..., :24], v[..., :24], **heads)
    assert_raises("one shape", fia, q, k, v[:, :, :4], **heads)
    assert_raises("one batch", fia, q, k[:1], v[:1], **heads)
    assert_raises("inner_precise", fia, q, k, v, **heads, inner_precise=4)
    assert_raises("inner_precise", fia, q[:, :, :1], k, v, **heads, inner_precise=2)
    wide = operands(1, 65, 1, 3, 5, 16)
    assert_raises("at most 64", fia, *wide, num_heads=65, num_key_value_heads=1, input_layout="BNSD")
    assert_raises("at most 16 queries", fia, *operands(1, 2, 2, 17, 5), num_heads=2, input_layout="BNSD_NBSD")
    assert_raises("pse_shift must have shape", fia, q, k, v, **heads, pse_shift=torch.zeros(2, 1, 3, 5).half())
    assert_raises("pse_shift is torch.float32", fia, q, k, v, **heads, pse_shift=torch.zeros(2, 4, 3, 5))


def test_a_last_dimension_that_heads_do_not_divide_is_refused() -> None:
    q, k, v = (laid_out(x, "BSH") for x in operands(2, 2, 2, 3, 5))
    assert_raises("not a multiple", fia, q, k, v, num_heads=3)
