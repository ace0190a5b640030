"""CPU kernels of npu_prompt_flash_attention and npu_incre_flash_attention; and no argument of attention for inference is ignored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lowerings.ascend.checks import check_kernel
from tests.lowerings.ascend.emulation.golden_attention import (
    SCALE,
    assert_close,
    assert_raises,
    causal_mask,
    fia,
    golden,
    laid_out,
    operands,
    sparse,
)

npu = torch.ops.npu
PROMPT, INCRE = "npu::npu_prompt_flash_attention", "npu::npu_incre_flash_attention"


# -------------------------------------------------------------------- npu_prompt_flash_attention, npu_incre_flash_attention


def prompt(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    return check_kernel(PROMPT, q, k, v, **{"scale_value": SCALE, **arguments})


@pytest.mark.parametrize(
    ("layout", "mode"), [("BSH", 0), ("BSND", 1), ("BNSD", 2), ("BNSD_BSND", 3), ("BNSD", 4), ("BNSD", 10), ("BNSD", 13)]
)
def test_prompt(layout: str, mode: int) -> None:
    source, _, target = layout.partition("_")
    q, k, v = operands(2, 4, 2, 4, 6)
    plain = mode % 10
    mask = torch.zeros(4, 6, dtype=torch.uint8) if plain < 2 else causal_mask()
    out = prompt(
        *(laid_out(x, source) for x in (q, k, v)),
        num_heads=4,
        num_key_value_heads=2,
        input_layout=layout,
        sparse_mode=mode,
        atten_mask=mask,
        pre_tokens=2,
    )
    exact = golden(q, k, v, SCALE, sparse(plain, 2, 0, 4, 6))  # next_tokens is 0 by default
    assert_close(out, laid_out(exact.output, target or source))


def test_prompt_without_a_mask_hides_nothing() -> None:
    q, k, v = operands(2, 2, 2, 4, 6)
    out = prompt(q, k, v, num_heads=2, input_layout="BNSD", actual_seq_lengths=[4, 2], actual_seq_lengths_kv=[6, 3])
    lengths = [(4, 6), (2, 3)]
    assert_close(out, golden(q, k, v, SCALE, lambda b, i, j: i < lengths[b][0] and j < lengths[b][1]).output)


def test_prompt_of_packed_tokens_and_pse() -> None:
    q, k, v = operands(1, 2, 2, 4, 4, 128)
    packed = [laid_out(x, "TND") for x in (q, k, v)]
    out = prompt(*packed, num_heads=2, input_layout="TND", actual_seq_lengths=[4], actual_seq_lengths_kv=[4])
    assert_close(out, laid_out(golden(q, k, v, SCALE).output, "TND"))
    pse = torch.randn(1, 2, 4, 4).half()
    out = prompt(q, k, v, num_heads=2, input_layout="BNSD", pse_shift=pse)
    assert_close(out, golden(q, k, v, SCALE, bias=lambda b, h, i, j: float(pse[0, h, i, j])).output)


@pytest.mark.parametrize("name", ["padding_mask", "deq_scale1", "quant_scale1", "deq_scale2", "quant_offset2"])
def test_prompt_refuses(name: str) -> None:
    q, k, v = operands(1, 2, 2, 4, 4)
    assert_raises(name, npu.npu_prompt_flash_attention, q, k, v, num_heads=2, input_layout="BNSD", **{name: torch.ones(1)})


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
def test_incre(layout: str) -> None:
    q, k, v = operands(2, 4, 2, 1, 6)
    pse = torch.randn(1, 4, 1, 6).half()
    mask = torch.tensor([[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.int8)
    out = check_kernel(
        INCRE,
        *(laid_out(x, layout) for x in (q, k, v)),
        num_heads=4,
        num_key_value_heads=2,
        scale_value=SCALE,
        input_layout=layout,
        actual_seq_lengths=[6, 4],
        atten_mask=mask,
        pse_shift=pse,
    )
    lengths = [6, 4]
    exact = golden(q, k, v, SCALE, lambda b, i, j: j < lengths[b] and not bool(mask[b, j]), bias=lambda b, h, i, j: float(pse[0, h, 0, j]))
    assert_close(out, laid_out(exact.output, layout))


def test_incre_refuses() -> None:
    q, k, v = operands(2, 2, 2, 3, 6)
    call = npu.npu_incre_flash_attention
    assert_raises("one token", call, q, k, v, num_heads=2, input_layout="BNSD")
    for name in ("padding_mask", "dequant_scale1", "quant_scale1", "dequant_scale2", "antiquant_offset", "quant_offset2"):
        assert_raises(name, call, q[:, :, :1], k, v, num_heads=2, input_layout="BNSD", **{name: torch.ones(1)})
    assert_raises("inner_precise", call, q[:, :, :1], k, v, num_heads=2, input_layout="BNSD", inner_precise=2)
    assert_raises("kv_padding_size needs", call, q[:, :, :1], k, v, num_heads=2, input_layout="BNSD", kv_padding_size=torch.tensor([1]))


# -------------------------------------------------------------------- no argument is ignored

BASE: dict[str, Any] = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "BNSD", "scale": SCALE}
ALTERED: dict[str, dict[str, Any]] = {
    "pse_shift": {"pse_shift": torch.arange(24.0).view(1, 1, 4, 6).expand(1, 4, 4, 6).contiguous().half()},
    "atten_mask": {"atten_mask": torch.ones(4, 6).bool().triu(1)},
    "actual_seq_lengths": {"actual_seq_lengths": [2]},
    "actual_seq_lengths_kv": {"actual_seq_lengths_kv": [3]},
    "quant_scale2": {"quant_scale2": torch.ones(1)},
    "query_padding_size": {"query_padding_size": torch.tensor([1]), "actual_seq_lengths": [2]},
    "kv_padding_size": {"kv_padding_size": torch.tensor([1]), "actual_seq_lengths_kv": [2]},
    "key_shared_prefix": {"key_shared_prefix": torch.ones(1, 2, 3, 32).half(), "value_shared_prefix": torch.ones(1, 2, 3, 32).half()},
    "scale": {"scale": 0.3},
    "sparse_mode": {"sparse_mode": 3, "atten_mask": causal_mask()},
}
TENSORS = [
    "dequant_scale1",
    "quant_scale1",
    "dequant_scale2",
    "quant_offset2",
    "antiquant_scale",
    "antiquant_offset",
    "key_antiquant_scale",
    "key_antiquant_offset",
    "value_antiquant_scale",
    "value_antiquant_offset",
    "block_table",
    "value_shared_prefix",
    "query_rope",
    "key_rope",
    "key_rope_antiquant_scale",
]
NUMBERS = ["antiquant_mode", "key_antiquant_mode", "value_antiquant_mode", "block_size", "inner_precise"]


@pytest.mark.parametrize("name", sorted(ALTERED))
def test_arguments_that_change_the_result(name: str) -> None:
    q, k, v = operands(1, 4, 2, 4, 6)
    assert not torch.equal(fia(q, k, v, **{**BASE, **ALTERED[name]}), fia(q, k, v, **BASE))


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_refused_by_themselves(name: str) -> None:
    q, k, v = operands(1, 4, 2, 4, 6)
    assert_raises(" ", fia, q, k, v, **BASE, **{name: torch.ones(1)})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_refused_by_themselves(name: str) -> None:
    q, k, v = operands(1, 4, 2, 4, 6)
    assert_raises(name, fia, q, k, v, **BASE, **{name: 7})


@pytest.mark.parametrize("mode", [0, 4])
def test_tokens_count_with_a_mask(mode: int) -> None:
    q, k, v = operands(1, 4, 2, 4, 6)
    arguments = {**BASE, "sparse_mode": mode, "atten_mask": causal_mask() if mode else torch.zeros(4, 6).bool()}
    results = [fia(q, k, v, **arguments, **tokens) for tokens in ({}, {"pre_tokens": 1}, {"next_tokens": 1})]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_every_other_argument_of_the_second_version_is_refused() -> None:
    q, k, v = operands(1, 2, 2, 4, 6)
    call = npu.npu_fused_infer_attention_score_v2
    heads = {"num_query_heads": 2, "input_layout": "BNSD"}
    for name in ("dequant_scale_query", "dequant_scale_key_rope", "quant_scale_p", "quant_offset_out", "dequant_offset_key"):
        assert_raises(" ", call, q, k, v, **heads, **{name: torch.ones(1)})
    kinds = ("query", "key", "value", "query_rope", "key_rope", "key_shared_prefix", "value_shared_prefix", "dequant_scale_query")
    for name in (*kinds, "dequant_scale_key", "dequant_scale_value", "dequant_scale_key_rope", "out"):
        assert_raises(f"{name}_dtype", call, q, k, v, **heads, **{f"{name}_dtype": 1})
    for name in ("query_quant_mode", "key_quant_mode", "value_quant_mode"):
        assert_raises(name, call, q, k, v, **heads, **{name: 1})


def test_scale_is_not_derived_from_the_head_dimension() -> None:
    q, k, v = operands(1, 2, 2, 4, 6)
    own = fia(q, k, v, num_heads=2, input_layout="BNSD", scale=1 / math.sqrt(32))
    assert_close(own, golden(q, k, v, 1 / math.sqrt(32)).output)
