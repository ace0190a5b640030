"""CPU kernels of FIA against attention in float64: position bias, sinks, padding, shared prefix, rope parts; what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.ascend.emulation.attention import core
from tests.lowerings.ascend.checks import check_kernel
from tests.lowerings.ascend.emulation.golden_attention import (
    SCALE,
    V1,
    V2,
    assert_close,
    assert_raises,
    both,
    causal_mask,
    fia,
    golden,
    laid_out,
    operands,
)

npu = torch.ops.npu


# -------------------------------------------------------------------- pse_shift, sink, padding, prefix


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_pse_shift_is_added_after_the_scale(batch: int, queries: int) -> None:
    q, k, v = operands(2, 2, 1, queries, 6)
    pse = torch.randn(batch, 2, queries, 8, generator=torch.Generator().manual_seed(2)).half()
    out, lse = both(q, k, v, num_heads=2, num_key_value_heads=1, input_layout="BNSD", pse_shift=pse)
    exact = golden(q, k, v, SCALE, bias=lambda b, h, i, j: float(pse[b % batch, h, i, j]))
    assert_close(out, exact.output)
    assert_close(lse, exact.lse.unsqueeze(-1))


@pytest.mark.parametrize("layout", ["TND", "NTD_TND"])
def test_learnable_sink(layout: str) -> None:
    source = layout.partition("_")[0]
    q, k, v = operands(1, 4, 2, 5, 5, 64, torch.bfloat16)
    sink = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.bfloat16)
    out, lse = check_kernel(
        V2,
        *(laid_out(x, source) for x in (q, k, v)),
        num_query_heads=4,
        num_key_value_heads=2,
        softmax_scale=SCALE,
        input_layout=layout,
        actual_seq_qlen=[5],
        actual_seq_kvlen=[5],
        learnable_sink=sink,
        return_softmax_lse=True,
    )
    exact = golden(q, k, v, SCALE, sink=sink)
    assert_close(out, laid_out(exact.output, "TND"))
    assert_close(lse, laid_out(exact.lse.unsqueeze(-1), "TND"), torch.float32)


@pytest.mark.parametrize(
    ("sink", "layout", "match"),
    [
        (torch.zeros(2), "TND", "learnable_sink must be bfloat16"),
        (torch.zeros(3).bfloat16(), "TND", "must have shape"),
        (torch.zeros(2).bfloat16(), "NTD", "needs input_layout TND"),
    ],
)
def test_wrong_sinks_are_refused(sink: Tensor, layout: str, match: str) -> None:
    q, k, v = (laid_out(x, layout) for x in operands(1, 2, 2, 4, 4, 64, torch.bfloat16))
    arguments = {"num_query_heads": 2, "input_layout": layout, "actual_seq_qlen": [4], "actual_seq_kvlen": [4], "learnable_sink": sink}
    assert_raises(match, npu.npu_fused_infer_attention_score_v2, q, k, v, **arguments)


def test_padding_on_the_left() -> None:
    q, k, v = operands(2, 2, 2, 6, 8)
    lengths, key_lengths = [3, 5], [4, 6]
    out, lse = check_kernel(
        V1,
        q,
        k,
        v,
        num_heads=2,
        scale=SCALE,
        input_layout="BNSD",
        sparse_mode=3,
        atten_mask=causal_mask(),
        actual_seq_lengths=lengths,
        actual_seq_lengths_kv=key_lengths,
        query_padding_size=torch.tensor([1]),
        kv_padding_size=torch.tensor([2]),
        softmax_lse_flag=True,
    )

    def sees(b: int, i: int, j: int) -> bool:
        row, column = i - (5 - lengths[b]), j - (6 - key_lengths[b])
        return 0 <= row < lengths[b] and 0 <= column < key_lengths[b] and column <= row + key_lengths[b] - lengths[b]

    exact = golden(q, k, v, SCALE, sees)
    assert_close(out, exact.output)
    assert_close(lse, exact.lse.unsqueeze(-1))


def test_padding_on_the_left_of_one_query() -> None:
    q, k, v = operands(2, 2, 2, 1, 8)
    padding = {"actual_seq_lengths_kv": [6, 7], "kv_padding_size": torch.tensor([2])}
    out = fia(q, k, v, num_heads=2, input_layout="BNSD", **padding)
    assert_close(out, golden(q, k, v, SCALE, lambda b, i, j: b == 0 and j < 6).output)  # the second begins before its row: zero
    negative = {"actual_seq_lengths_kv": [3], "kv_padding_size": torch.tensor([-4])}
    out = fia(q, k, v, num_heads=2, input_layout="BNSD", **negative)
    assert_close(out, golden(q, k, v, SCALE, lambda b, i, j: j >= 5).output)


@pytest.mark.parametrize(
    ("queries", "arguments", "match"),
    [
        (4, {"kv_padding_size": torch.tensor([1])}, "kv_padding_size needs"),
        (4, {"query_padding_size": torch.tensor([1])}, "query_padding_size needs"),
        (1, {"query_padding_size": torch.tensor([1]), "actual_seq_lengths": [1]}, "no effect"),
        (4, {"kv_padding_size": torch.tensor([3]), "actual_seq_lengths_kv": [4]}, "leaves"),
        (4, {"kv_padding_size": torch.tensor([1, 1]), "actual_seq_lengths_kv": [4]}, "shape"),
        (4, {"kv_padding_size": torch.tensor([1.0]), "actual_seq_lengths_kv": [4]}, "int64"),
    ],
)
def test_wrong_paddings_are_refused(queries: int, arguments: dict[str, Any], match: str) -> None:
    q, k, v = operands(1, 2, 2, queries, 6)
    assert_raises(match, fia, q, k, v, num_heads=2, input_layout="BNSD", **arguments)


@pytest.mark.parametrize("layout", ["BNSD", "BSH", "BSND"])
@pytest.mark.parametrize("queries", [1, 3])
def test_shared_prefix(queries: int, layout: str) -> None:
    q, k, v = operands(2, 2, 2, queries, 4)
    _, prefix_key, prefix_value = operands(1, 2, 2, queries, 5)
    arguments: dict[str, Any] = {"actual_shared_prefix_len": [3], "actual_seq_lengths_kv": [4, 2]}
    if queries > 1:
        arguments |= {"sparse_mode": 3, "atten_mask": causal_mask()}
    out = fia(
        *(laid_out(x, layout) for x in (q, k, v)),
        num_heads=2,
        input_layout=layout,
        key_shared_prefix=laid_out(prefix_key, layout),
        value_shared_prefix=laid_out(prefix_value, layout),
        **arguments,
    )
    keys, values = (torch.cat((p[:, :, :3].expand(2, -1, -1, -1), x), 2) for p, x in ((prefix_key, k), (prefix_value, v)))
    lengths = [7, 5]
    exact = golden(q, keys, values, SCALE, lambda b, i, j: j < lengths[b] and j <= i + lengths[b] - queries)
    assert_close(out, laid_out(exact.output, layout))


def test_masks_of_a_shared_prefix_begin_with_its_columns() -> None:
    q, k, v = operands(1, 2, 2, 3, 4)
    _, prefix_key, prefix_value = operands(1, 2, 2, 3, 5)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[:, 0] = False
    prefix = {"key_shared_prefix": prefix_key, "value_shared_prefix": prefix_value}
    out = fia(q, k, v, num_heads=2, input_layout="BNSD", sparse_mode=1, atten_mask=mask, **prefix)
    keys, values = torch.cat((prefix_key, k), 2), torch.cat((prefix_value, v), 2)
    assert_close(out, golden(q, keys, values, SCALE, lambda b, i, j: not bool(mask[i, j])).output)
    assert_raises("must have shape", fia, q, k, v, num_heads=2, input_layout="BNSD", sparse_mode=1, atten_mask=mask[:, :8], **prefix)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"value_shared_prefix": None}, "must be given together"),
        ({"key_shared_prefix": torch.zeros(2, 2, 5, 32).half()}, "batch 1"),
        ({"value_shared_prefix": torch.zeros(1, 2, 4, 32).half()}, "one shape"),
        ({"key_shared_prefix": torch.zeros(1, 2, 5, 32)}, "dtypes must be equal"),
        ({"actual_shared_prefix_len": [6]}, "actual_shared_prefix_len must"),
        ({"actual_shared_prefix_len": [1, 1]}, "1 entry"),
    ],
)
def test_wrong_prefixes_are_refused(arguments: dict[str, Any], match: str) -> None:
    q, k, v = operands(2, 2, 2, 3, 4)
    prefix = {"key_shared_prefix": torch.zeros(1, 2, 5, 32).half(), "value_shared_prefix": torch.zeros(1, 2, 5, 32).half()}
    assert_raises(match, fia, q, k, v, num_heads=2, input_layout="BNSD", **{**prefix, **arguments})


# -------------------------------------------------------------------- rope parts (MLA)


@pytest.mark.parametrize(("width", "layout"), [(512, "BNSD"), (512, "BSND_NBSD"), (128, "BSH"), (128, "BNSD_BSND")])
@pytest.mark.parametrize("queries", [1, 3])
def test_rope_parts_of_padded_tokens(queries: int, width: int, layout: str) -> None:
    source, _, target = layout.partition("_")
    kv_heads = 1 if width == 512 else 2
    q, k, v = operands(2, 4, kv_heads, queries, 5, width, torch.bfloat16)
    query_rope, key_rope, _ = operands(2, 4, kv_heads, queries, 5, 64, torch.bfloat16)
    mask = {"sparse_mode": 3, "atten_mask": causal_mask()} if queries > 1 else {}
    out, _ = both(
        *(laid_out(x, source) for x in (q, k, v)),
        query_rope=laid_out(query_rope, source),
        key_rope=laid_out(key_rope, source),
        num_heads=4,
        num_key_value_heads=kv_heads,
        input_layout=layout,
        scale=0.05,
        softmax_lse_flag=width == 128,
        **mask,
    )
    exact = golden(
        torch.cat((q, query_rope), -1), torch.cat((k, key_rope), -1), v, 0.05, lambda b, i, j: j <= i + 5 - queries or queries == 1
    )
    assert_close(out, laid_out(exact.output, target or source))


def test_rope_parts_of_packed_tokens() -> None:
    q, k, v = operands(1, 4, 2, 5, 5, 128)
    query_rope, key_rope, _ = operands(1, 4, 2, 5, 5, 64)
    out, _ = both(
        *(laid_out(x, "TND") for x in (q, k, v)),
        query_rope=laid_out(query_rope, "TND"),
        key_rope=laid_out(key_rope, "TND"),
        num_heads=4,
        num_key_value_heads=2,
        input_layout="TND",
        actual_seq_lengths=[5],
        actual_seq_lengths_kv=[5],
        scale=0.07,
    )
    exact = golden(torch.cat((q, query_rope), -1), torch.cat((k, key_rope), -1), v, 0.07)
    assert_close(out, laid_out(exact.output, "TND"))


def test_a_window_counts_for_one_query_with_rope() -> None:
    q, k, v = operands(1, 4, 1, 1, 6, 512)
    query_rope, key_rope, _ = operands(1, 4, 1, 1, 6, 64)
    out = fia(
        q,
        k,
        v,
        query_rope=query_rope,
        key_rope=key_rope,
        num_heads=4,
        num_key_value_heads=1,
        input_layout="BNSD",
        scale=0.05,
        sparse_mode=4,
        atten_mask=causal_mask(),
        pre_tokens=2,
        next_tokens=0,
    )
    exact = golden(torch.cat((q, query_rope), -1), torch.cat((k, key_rope), -1), v, 0.05, lambda b, i, j: j >= 3)
    assert_close(out, exact.output)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"key_rope": None}, "must be given together"),
        ({"query_rope": torch.zeros(1, 4, 3, 32).half()}, "head dimension of query_rope must be 64"),
        ({"key_rope": torch.zeros(1, 1, 4, 64).half()}, "key_rope must have the tokens"),
        ({"query_rope": torch.zeros(1, 4, 3, 64)}, "dtypes must be equal"),
        ({"softmax_lse_flag": True}, "log-sum-exp"),
        ({"pse_shift": torch.zeros(1, 4, 3, 5).half()}, "pse_shift is not supported"),
        ({"sparse_mode": 2, "atten_mask": causal_mask()}, "sparse_mode must be 0, 3 or 4"),
        ({"quant_scale2": torch.ones(1)}, "quant_scale2 is not supported"),
        ({"key_rope_antiquant_scale": torch.ones(1)}, "key_rope_antiquant_scale"),
    ],
)
def test_what_rope_parts_do_not_allow(arguments: dict[str, Any], match: str) -> None:
    q, k, v = operands(1, 4, 1, 3, 5, 512)
    ropes = {"query_rope": torch.zeros(1, 4, 3, 64).half(), "key_rope": torch.zeros(1, 1, 5, 64).half()}
    assert_raises(match, fia, q, k, v, num_heads=4, num_key_value_heads=1, input_layout="BNSD", **{**ropes, **arguments})


# -------------------------------------------------------------------- tree masks


def test_tree_masks_hide_keys_among_the_last() -> None:
    q, k, v = operands(2, 4, 1, 3, 5, 512)
    query_rope, key_rope, _ = operands(2, 4, 1, 3, 5, 64)
    tree = torch.tensor([[[0, 1, 1], [0, 0, 1], [0, 1, 0]], [[0, 1, 1], [1, 0, 1], [0, 0, 0]]], dtype=torch.uint8)
    arguments = {"num_query_heads": 4, "num_key_value_heads": 1, "softmax_scale": 0.05, "sparse_mode": 9}
    ropes = {"query_rope": query_rope, "key_rope": key_rope}
    out = npu.npu_fused_infer_attention_score_v2(q, k, v, **ropes, **arguments, input_layout="BNSD", atten_mask=tree)[0]
    keys = torch.cat((k, key_rope), -1)
    exact = golden(torch.cat((q, query_rope), -1), keys, v, 0.05, lambda b, i, j: j < 2 or not bool(tree[b, i, j - 2]))
    assert_close(out, exact.output)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, query_rope, key_rope)]
    lengths = {"actual_seq_qlen": [3, 6], "actual_seq_kvlen": [5, 10]}
    names = dict(zip(("query", "key", "value", "query_rope", "key_rope"), packed, strict=True))
    flat = npu.npu_fused_infer_attention_score_v2(**names, **arguments, **lengths, input_layout="TND", atten_mask=tree.reshape(-1))[0]
    assert torch.equal(flat, out.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize(
    ("rope", "mask", "match"),
    [
        (False, torch.zeros(1, 3, 3).bool(), "needs query_rope"),
        (True, None, "atten_mask is required"),
        (True, torch.zeros(3, 3).bool(), "must have shape"),
    ],
)
def test_wrong_trees_are_refused(rope: bool, mask: Tensor | None, match: str) -> None:
    q, k, v = operands(1, 4, 1, 3, 5, 512)
    ropes = {"query_rope": torch.zeros(1, 4, 3, 64).half(), "key_rope": torch.zeros(1, 1, 5, 64).half()} if rope else {}
    heads = {"num_query_heads": 4, "num_key_value_heads": 1, "input_layout": "BNSD", "sparse_mode": 9}
    assert_raises(match, npu.npu_fused_infer_attention_score_v2, q, k, v, **ropes, **heads, atten_mask=mask)


# -------------------------------------------------------------------- many heads


def test_heads_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(1, 6, 3, 4, 5)
    mask, pse = torch.ones(4, 5).bool().triu(2), torch.randn(1, 6, 4, 5).half()
    arguments = {"num_heads": 6, "num_key_value_heads": 3, "input_layout": "BNSD", "atten_mask": mask, "pse_shift": pse}
    whole = fia(q, k, v, **arguments)
    monkeypatch.setattr(core, "_SCORES", 2 * 2 * 4 * 5)  # two of the three heads of key
    assert_close(fia(q, k, v, **arguments), whole.double())
