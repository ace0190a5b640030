"""CPU kernels of inference attention over paged and quantised keys and values, and quantised outputs; what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lowerings.ascend.checks import check_kernel
from tests.lowerings.ascend.emulation.golden_attention import (
    SCALE,
    V1,
    V2,
    assert_close,
    assert_raises,
    causal_mask,
    fia,
    golden,
    laid_out,
    operands,
)

npu = torch.ops.npu

# -------------------------------------------------------------------- pages

KINDS = ("BnBsH", "BnNBsD", "NZ")


def pages(x: Tensor, table: Tensor, block_size: int, kind: str) -> Tensor:
    """Scatter [B, N, S, D] into a cache, whose other blocks hold NaN."""
    batch, heads, tokens, width = x.shape
    cache = torch.full((int(table.max()) + 1, heads, block_size, width), torch.nan).to(x.dtype)
    for b in range(batch):
        for j in range(tokens):
            cache[int(table[b, j // block_size]), :, j % block_size] = x[b, :, j]
    if kind == "BnBsH":
        return cache.transpose(1, 2).flatten(2).contiguous()
    if kind == "NZ":
        c = 32 // x.element_size()
        return cache.unflatten(-1, (width // c, c)).transpose(2, 3).contiguous()
    return cache


def block_table(batch: int, blocks: int) -> Tensor:
    """A scrambled table; its last column is never used."""
    ids = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(5)).view(batch, blocks)
    return torch.cat((ids, torch.full((batch, 1), -7)), dim=1).int()


@pytest.mark.parametrize(("kind", "layout"), [("BnBsH", "BSH"), ("BnBsH", "BNSD"), ("BnNBsD", "BNSD"), ("NZ", "BSND")])
@pytest.mark.parametrize(("queries", "block_size"), [(1, 16), (3, 128)])
def test_paged_decode_and_prefill(queries: int, block_size: int, kind: str, layout: str) -> None:
    q, k, v = operands(2, 4, 2, queries, 40)
    lengths, table = [17, 40], block_table(2, 3)
    arguments: dict[str, Any] = {"sparse_mode": 3, "atten_mask": causal_mask()} if queries > 1 else {}
    caches = [pages(x, table, block_size, kind) for x in (k, v)]
    out, lse = check_kernel(
        V1,
        laid_out(q, layout),
        *caches,
        num_heads=4,
        num_key_value_heads=2,
        scale=SCALE,
        input_layout=layout,
        block_table=table,
        block_size=block_size,
        actual_seq_lengths_kv=lengths,
        softmax_lse_flag=True,
        **arguments,
    )
    exact = golden(q, k, v, SCALE, lambda b, i, j: j <= i + lengths[b] - queries)
    assert_close(out, laid_out(exact.output, layout))
    assert_close(lse, exact.lse.unsqueeze(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_paged_lengths_of_packed_queries_are_not_cumulative(kind: str) -> None:
    q, k, v = operands(2, 4, 2, 3, 40, 64, torch.bfloat16)
    packed, lengths, table = torch.cat((q[0, :, :2], q[1]), 1).transpose(0, 1).contiguous(), [33, 18], block_table(2, 3)
    out, _ = check_kernel(
        V2,
        packed,
        *(pages(x, table, 16, kind) for x in (k, v)),
        num_query_heads=4,
        num_key_value_heads=2,
        softmax_scale=SCALE,
        input_layout="TND",
        block_table=table,
        block_size=16,
        actual_seq_qlen=[2, 5],
        actual_seq_kvlen=lengths,
        sparse_mode=3,
        atten_mask=causal_mask(),
    )
    for b, rows in enumerate((slice(0, 2), slice(2, 5))):
        queries = rows.stop - rows.start
        shift = lengths[b] - queries
        exact = golden(q[b : b + 1, :, :queries], k[b : b + 1], v[b : b + 1], SCALE, lambda _, i, j, shift=shift: j <= i + shift)
        assert_close(out[rows], exact.output[0].transpose(0, 1))


def test_latent_attention_over_pages() -> None:
    q, k, _ = operands(2, 4, 1, 1, 40, 512, torch.bfloat16)
    query_rope, key_rope, _ = operands(2, 4, 1, 1, 40, 64, torch.bfloat16)
    lengths, table = [17, 40], block_table(2, 3)
    cache = pages(k, table, 16, "BnBsH")
    out, _ = check_kernel(
        V1,
        q,
        cache,
        cache,
        query_rope=query_rope,
        key_rope=pages(key_rope, table, 16, "BnBsH"),
        num_heads=4,
        num_key_value_heads=1,
        scale=0.05,
        input_layout="BNSD_NBSD",
        block_table=table,
        block_size=16,
        actual_seq_lengths_kv=lengths,
    )
    exact = golden(torch.cat((q, query_rope), -1), torch.cat((k, key_rope), -1), k, 0.05, lambda b, i, j: j < lengths[b])
    assert_close(out, laid_out(exact.output, "NBSD"))


def test_masks_and_biases_of_pages_have_a_column_for_each_slot() -> None:
    q, k, v = operands(2, 2, 2, 1, 40)
    lengths, table = [17, 40], block_table(2, 3)
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:, 0] = False
    pse = torch.randn(1, 2, 1, 64).half()
    arguments = {"num_heads": 2, "input_layout": "BNSD", "block_table": table, "block_size": 16, "actual_seq_lengths_kv": lengths}
    caches = [pages(x, table, 16, "BnNBsD") for x in (k, v)]
    out = fia(q, *caches, **arguments, atten_mask=mask, pse_shift=pse)
    exact = golden(q, k, v, SCALE, lambda b, i, j: j < lengths[b] and not bool(mask[b, j]), bias=lambda b, h, i, j: float(pse[0, h, 0, j]))
    assert_close(out, exact.output)
    assert_raises("atten_mask must have shape", fia, q, *caches, **arguments, atten_mask=mask[:, :40])
    assert_raises("pse_shift must have shape", fia, q, *caches, **arguments, pse_shift=pse[..., :40])


def test_incre_over_pages() -> None:
    q, k, v = operands(2, 4, 2, 1, 40)
    lengths, table = [17, 40], block_table(2, 3)
    out = check_kernel(
        "npu::npu_incre_flash_attention",
        q,
        *(pages(x, table, 16, "BnNBsD") for x in (k, v)),
        num_heads=4,
        num_key_value_heads=2,
        scale_value=SCALE,
        input_layout="BNSD",
        block_table=table,
        block_size=16,
        actual_seq_lengths=lengths,
    )
    assert_close(out, golden(q, k, v, SCALE, lambda b, i, j: j < lengths[b]).output)


@pytest.mark.parametrize(
    ("queries", "arguments", "match"),
    [
        (1, {"block_size": 0}, "block_size must be within"),
        (1, {"block_size": 24}, "multiple of 16"),
        (1, {"block_size": 1024}, "block_size must be within"),
        (1, {"block_size": 32}, "hold 16 tokens, but block_size is 32"),
        (3, {}, "multiple of 128"),
        (1, {"block_table": torch.zeros(2, 3).long()}, "block_table must be int32"),
        (1, {"block_table": torch.zeros(3, 3).int()}, "must have 2 rows"),
        (1, {"block_table": torch.zeros(6).int()}, "2 dimensions"),
        (1, {"block_table": torch.zeros(2, 2).int()}, "must lie within 0 and 32"),
        (1, {"block_table": torch.full((2, 3), 6).int()}, "does not have"),
        (1, {"block_table": torch.full((2, 3), -1).int()}, "does not have"),
        (1, {"block_table": None}, "needs block_table"),
        (1, {"actual_seq_lengths_kv": None}, "is required with block_table"),
        (1, {"num_key_value_heads": 2}, "key has 4 heads"),
        (1, {"input_layout": "BSND"}, "goes with queries in BNSD"),
        (1, {"kv_padding_size": torch.tensor([1])}, "not supported with .*block_table"),
    ],
)
def test_wrong_pages_are_refused(queries: int, arguments: dict[str, Any], match: str) -> None:
    q, _, _ = operands(2, 4, 4, queries, 4)
    cache = torch.zeros(6, 4, 16, 32).half()
    given = {"block_table": torch.zeros(2, 3).int(), "block_size": 16, "actual_seq_lengths_kv": [17, 40], "input_layout": "BNSD"}
    arguments = {**given, **arguments}
    assert_raises(match, fia, laid_out(q, arguments["input_layout"]), cache, cache, num_heads=4, **arguments)


# -------------------------------------------------------------------- integer keys and values


def integers(x: Tensor, low: int = -128, high: int = 128) -> Tensor:
    return torch.randint(low, high, x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.int8)


def channel(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(8)) * 0.02 + 0.002).to(dtype)


B, N, KV, S, D = 2, 4, 2, 6, 32
SCALES = [  # mode, shape of the scale, its shape that broadcasts to [B, N, S, D]
    (0, (1,), ()),
    (0, (1, KV, 1, D), (1, KV, 1, D)),
    (0, (KV, D), (1, KV, 1, D)),
    (0, (KV, 1, D), (1, KV, 1, D)),
    (0, (1, KV * D), (1, KV, 1, D)),
    (0, (KV * D,), (1, KV, 1, D)),
    (1, (1, B, S), (B, 1, S, 1)),
    (1, (B, S), (B, 1, S, 1)),
    (2, (KV,), (1, KV, 1, 1)),
    (3, (B, KV, S), (B, KV, S, 1)),
]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("mode", "shape", "view"), SCALES)
def test_integer_keys_and_values(mode: int, shape: tuple[int, ...], view: tuple[int, ...], offset: bool) -> None:
    q, k, v = operands(B, N, KV, 1, S, D)
    k, v = integers(k), integers(v)
    kind = torch.float32 if mode in (1, 3) else torch.float16
    scale, shift = channel(shape, kind), (channel(shape, kind) * 1000 if offset else None)
    arguments = {"num_heads": N, "num_key_value_heads": KV, "input_layout": "BNSD"}
    quantised = {"antiquant_scale": scale, "antiquant_offset": shift, "antiquant_mode": mode}
    out = fia(q, k, v, **arguments, **{f"{who}_{name}": value for who in ("key", "value") for name, value in quantised.items()})
    floats = [((x.double() + (shift.double().view(view) if shift is not None else 0)) * scale.double().view(view)).half() for x in (k, v)]
    assert_close(out, golden(q, *floats, SCALE).output)
    names = {"dequant_scale": scale, "dequant_offset": shift}
    second = npu.npu_fused_infer_attention_score_v2(
        q,
        k,
        v,
        num_query_heads=N,
        num_key_value_heads=KV,
        input_layout="BNSD",
        softmax_scale=SCALE,
        key_quant_mode=mode,
        value_quant_mode=mode,
        **{f"{name}_{who}": value for who in ("key", "value") for name, value in names.items()},
    )
    assert torch.equal(second[0], out)


@pytest.mark.parametrize("mode", [4, 5])
def test_scales_in_pages(mode: int) -> None:
    q, k, v = operands(2, 4, 2, 1, 40)
    k, v = integers(k), integers(v)
    lengths, table = [17, 40], block_table(2, 2)
    factors = torch.rand(2, 1 if mode == 4 else 2, 40, 1, generator=torch.Generator().manual_seed(9)) * 0.02
    paged = pages(factors, table, 32, "BnNBsD").squeeze(-1)
    paged = paged.squeeze(1) if mode == 4 else paged
    out = check_kernel(
        V1,
        q,
        *(pages(x, table, 32, "BnNBsD") for x in (k, v)),
        num_heads=4,
        num_key_value_heads=2,
        scale=SCALE,
        input_layout="BNSD",
        block_table=table,
        block_size=32,
        actual_seq_lengths_kv=lengths,
        key_antiquant_scale=paged,
        value_antiquant_scale=paged,
        key_antiquant_mode=mode,
        value_antiquant_mode=mode,
    )[0]
    floats = [(x.double() * factors.double()).half() for x in (k, v)]
    assert_close(out, golden(q, *floats, SCALE, lambda b, i, j: j < lengths[b]).output)


@pytest.mark.parametrize("layout", ["BNSD", "BSH"])
def test_int4_in_int32(layout: str) -> None:
    q, k, v = operands(B, N, KV, 1, S, 64)
    k, v = integers(k, -8, 8), integers(v, -8, 8)

    def packed(x: Tensor) -> Tensor:
        nibbles = laid_out(x, layout).unflatten(-1, (-1, 8)).long() & 15
        total = sum(nibbles[..., i] << (4 * i) for i in range(8))
        return torch.where(total >= 2**31, total - 2**32, total).int()

    scale = channel((1,))
    out = check_kernel(
        V1,
        laid_out(q, layout),
        packed(k),
        packed(v),
        num_heads=N,
        num_key_value_heads=KV,
        scale=SCALE,
        input_layout=layout,
        key_antiquant_scale=scale,
        value_antiquant_scale=scale,
    )[0]
    exact = golden(q, *((x.double() * scale.double()).half() for x in (k, v)), SCALE)
    assert_close(out, laid_out(exact.output, layout))


@pytest.mark.parametrize(
    ("shape", "mode", "view"), [((2,), 0, (2,)), ((2, KV, 1, D), 0, (2, 1, KV, 1, D)), ((2, B, S), 1, (2, B, 1, S, 1))]
)
def test_scales_of_keys_and_values_in_one_tensor(shape: tuple[int, ...], mode: int, view: tuple[int, ...]) -> None:
    q, k, v = operands(B, N, KV, 1, S, D)
    k, v = integers(k), integers(v)
    scale = channel(shape, torch.float32 if mode else torch.float16)
    heads = {"num_heads": N, "num_key_value_heads": KV, "input_layout": "BNSD"}
    out = fia(q, k, v, **heads, antiquant_scale=scale, antiquant_mode=mode)
    factors = scale.double().view(view)
    exact = golden(q, (k.double() * factors[0]).half(), (v.double() * factors[1]).half(), SCALE)
    assert_close(out, exact.output)
    if mode == 0:
        incre = npu.npu_incre_flash_attention(q, k, v, **heads, scale_value=SCALE, antiquant_scale=scale)
        assert torch.equal(incre, out)


@pytest.mark.parametrize(
    ("queries", "arguments", "match"),
    [
        (1, {"value_antiquant_scale": None}, "must be given together"),
        (1, {"value_antiquant_mode": 1}, "float32"),
        (1, {"key_antiquant_mode": 6, "value_antiquant_mode": 6}, "within 0 and 5"),
        (1, {"key_antiquant_mode": 1}, "quantised alike"),
        (3, {"key_antiquant_mode": 2, "value_antiquant_mode": 2}, "within 0 and 1"),
        (1, {"key_antiquant_scale": torch.ones(3).half()}, "does not fit mode 0"),
        (1, {"key_antiquant_scale": torch.ones(1)}, "must be float16"),
        (1, {"key_antiquant_offset": torch.ones(1).half()}, "offsets of key and value"),
        (1, {"antiquant_scale": torch.ones(2).half()}, "not allowed beside"),
        (1, {"key_antiquant_mode": 4, "value_antiquant_mode": 4, "key_antiquant_scale": torch.ones(3, 16)}, "needs block_table"),
        (1, {"key_antiquant_scale": None, "value_antiquant_scale": None}, "dtypes must be equal"),
    ],
)
def test_wrong_scales_are_refused(queries: int, arguments: dict[str, Any], match: str) -> None:
    q, k, v = operands(B, N, KV, queries, S, D)
    given = {"key_antiquant_scale": torch.ones(1).half(), "value_antiquant_scale": torch.ones(1).half()}
    heads = {"num_heads": N, "num_key_value_heads": KV, "input_layout": "BNSD"}
    assert_raises(match, fia, q, integers(k), integers(v), **heads, **{**given, **arguments})


# -------------------------------------------------------------------- int8 outputs


@pytest.mark.parametrize(("shape", "offset"), [((1,), False), ((1,), True), ((4, 32), False), ((4, 32), True), ((1, 1, 128), False)])
@pytest.mark.parametrize("layout", ["BSH", "BNSD_BSND"])
def test_int8_outputs(layout: str, shape: tuple[int, ...], offset: bool) -> None:
    source, _, target = layout.partition("_")
    q, k, v = operands(2, 4, 2, 3, 5)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 60 + 20
    shift = torch.rand(shape) * 10 if offset else None
    laid = [laid_out(x, source) for x in (q, k, v)]
    heads = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": layout}
    out, _ = check_kernel(V1, *laid, **heads, scale=SCALE, quant_scale2=scale, quant_offset2=shift)
    assert out.dtype == torch.int8
    view = (1, 4, 1, 32) if scale.numel() > 1 else ()
    exact = golden(q, k, v, SCALE).output * scale.double().view(view) + (shift.double().view(view) if shift is not None else 0)
    exact = laid_out(exact.clamp(-128, 127), target or source)
    assert float((out.double() - exact).abs().max()) < 0.56  # half a step, and what rounding the weights adds
    assert bool((out == 127).any())


def test_wrong_scales_of_the_output_are_refused() -> None:
    q, k, v = operands(2, 4, 4, 3, 5)
    heads = {"num_heads": 4, "input_layout": "BNSD"}
    assert_raises("quant_scale2 must have 1 or 128", fia, q, k, v, **heads, quant_scale2=torch.ones(32))
    assert_raises("quant_scale2 must be float32", fia, q, k, v, **heads, quant_scale2=torch.ones(1).bfloat16())
    assert_raises("shape and dtype", fia, q, k, v, **heads, quant_scale2=torch.ones(1), quant_offset2=torch.ones(2))
