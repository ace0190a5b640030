"""Self-test cases of mixtures of experts: routers, and what routed experts are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from .case import BF16, FLOATS, FP16, FP32, HALVES, Arguments, Case, Inputs, case


def cases() -> Iterator[Case]:
    """Qwen3-MoE's and DeepSeek-V3's routers; rows sorted by expert, multiplied, and summed."""
    for dtype in FLOATS:
        for renorm in (0, 1):
            yield case("npu::npu_moe_gating_top_k_softmax_v2", _softmax, dtype, tokens=32, experts=128, k=8, renorm=renorm)
    for dtype in (BF16, FP32):
        yield case("npu::npu_moe_gating_top_k", _sigmoid, dtype, tokens=32, experts=256, k=8, groups=8, top_groups=4)
    yield case("npu::npu_moe_gating_top_k", _sigmoid, FP16, tokens=32, experts=128, k=6, groups=1, top_groups=1)
    for dtype in HALVES:
        plain = case("npu::npu_moe_init_routing_v2", _init, dtype, tokens=32, width=512, experts=16, k=4)
        yield replace(plain, meaningless=("expanded_scale",))
        yield case("npu::npu_grouped_matmul", _grouped, dtype, rows=96, inner=256, width=512, experts=4, bias=False, packed="rows")
        yield case("npu::npu_grouped_matmul", _grouped, dtype, rows=96, inner=256, width=512, experts=4, bias=True, packed="columns")
        yield case("npu::npu_moe_init_routing_v2", _init, dtype, tokens=32, width=512, experts=16, k=4, quant_mode=1)
        yield case("npu::npu_grouped_matmul", _grouped_int4, dtype, rows=96, inner=256, width=512, experts=4, groups=2)
        for packed in ("rows", "columns"):
            yield case("npu::npu_grouped_matmul", _grouped_int8, dtype, rows=96, inner=256, width=512, experts=4, packed=packed)
    yield case("npu::npu_grouped_matmul", _grouped_int8, torch.int32, rows=96, inner=256, width=512, experts=4, packed="columns")
    yield case("npu::npu_dequant_swiglu_quant", _dequant_swiglu, torch.int32, rows=96, width=512, experts=4)
    for dtype in FLOATS:
        yield case("npu::npu_moe_finalize_routing", _finalize, dtype, tokens=32, width=512, k=4)


def _apart(inputs: Inputs, tokens: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Scores of which no two of a token are equal, in any dtype."""
    rows = [inputs.places(experts, experts).to(torch.float32) for _ in range(tokens)]
    return ((torch.stack(rows) - experts / 2) / 32).to(dtype)


def _softmax(inputs: Inputs, dtype: torch.dtype, tokens: int, experts: int, k: int, renorm: int) -> Arguments:
    return {"x": _apart(inputs, tokens, experts, dtype), "k": k, "renorm": renorm}


def _sigmoid(inputs: Inputs, dtype: torch.dtype, tokens: int, experts: int, k: int, groups: int, top_groups: int) -> Arguments:
    modes = {"k_group": top_groups, "group_count": groups, "group_select_mode": 1, "norm_type": 1, "routed_scaling_factor": 2.5}
    return {"x": _apart(inputs, tokens, experts, dtype), "k": k, "bias": torch.zeros(experts, dtype=dtype), **modes}


def _init(inputs: Inputs, dtype: torch.dtype, tokens: int, width: int, experts: int, k: int, quant_mode: int = -1) -> Arguments:
    mode = {"expert_num": experts, "active_expert_range": [0, experts], "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    ids = torch.stack([inputs.places(k, experts, torch.int32) for _ in range(tokens)])
    return {"x": inputs.normal((tokens, width), dtype), "expert_idx": ids, **mode, "quant_mode": quant_mode}


def _grouped(inputs: Inputs, dtype: torch.dtype, rows: int, inner: int, width: int, experts: int, bias: bool, packed: str) -> Arguments:
    sizes = (experts, inner, width) if packed == "rows" else (experts, width, inner)
    weight = inputs.normal(sizes, dtype, scale=inner**-0.5)
    counts = torch.tensor([rows - 40, 0, 33, 7])
    given = {"bias": [inputs.normal((experts, width), FP32 if dtype == BF16 else dtype)]} if bias else {}
    groups = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 2}
    return {"x": [inputs.normal((rows, inner), dtype)], "weight": [weight if packed == "rows" else weight.mT], **given, **groups}


_NUMBERS = {torch.int32: 3, FP16: 5, BF16: 15}
"""Dtypes by their numbers in torch."""


def _counts(rows: int) -> torch.Tensor:
    return torch.tensor([rows - 40, 0, 33, 7])


def _codes(inputs: Inputs, shape: Sequence[int]) -> torch.Tensor:
    return (inputs.normal(shape, FP32) * 40).round().clamp(-128, 127).to(torch.int8)


def _scales(inputs: Inputs, shape: Sequence[int], size: float) -> torch.Tensor:
    return size * inputs.near_one(shape, FP32).abs()


def _grouped_int8(inputs: Inputs, dtype: torch.dtype, rows: int, inner: int, width: int, experts: int, packed: str) -> Arguments:
    """Sums in int32, or scaled by channel and by row."""
    sizes = (experts, inner, width) if packed == "rows" else (experts, width, inner)
    weight = _codes(inputs, sizes)
    given: dict[str, list[torch.Tensor]] = {}
    if dtype != torch.int32:
        given = {
            "scale": [_scales(inputs, (experts, width), 1e-3)],
            "per_token_scale": [_scales(inputs, (rows,), 1e-2)],
        }
    groups = {"group_list": _counts(rows), "group_list_type": 1, "group_type": 0, "split_item": 2, "output_dtype": _NUMBERS[dtype]}
    return {"x": [_codes(inputs, (rows, inner))], "weight": [weight if packed == "rows" else weight.mT], **given, **groups}


def _grouped_int4(inputs: Inputs, dtype: torch.dtype, rows: int, inner: int, width: int, experts: int, groups: int) -> Arguments:
    """Words of eight outputs, with scales of groups of inputs."""
    words = (inputs.integers((experts, inner, width // 8), 2**32) - 2**31).to(torch.int32)
    scale = (_scales(inputs, (experts, groups, width), 0.02)).to(dtype)
    given = {"antiquant_scale": [scale], "antiquant_offset": [torch.zeros_like(scale)]}
    mode = {"group_list": _counts(rows), "group_list_type": 1, "group_type": 0, "split_item": 2}
    return {"x": [inputs.normal((rows, inner), dtype)], "weight": [words], **given, **mode}


def _dequant_swiglu(inputs: Inputs, dtype: torch.dtype, rows: int, width: int, experts: int) -> Arguments:
    scales = {
        "weight_scale": _scales(inputs, (experts, width), 1e-3),
        "activation_scale": _scales(inputs, (rows,), 1e-2),
    }
    sums = inputs.normal((rows, width), FP32, scale=2.0**17).round().to(dtype)
    return {"x": sums, **scales, "group_index": _counts(rows), "activate_left": True, "quant_mode": 1}


def _finalize(inputs: Inputs, dtype: torch.dtype, tokens: int, width: int, k: int) -> Arguments:
    return {
        "expanded_permuted_rows": inputs.normal((tokens * k, width), dtype),
        "skip1": None,
        "skip2": None,
        "bias": None,
        "scales": inputs.normal((tokens, k), dtype),
        "expanded_src_to_dst_row": inputs.places(tokens * k, tokens * k, torch.int32),
        "export_for_source_row": None,
        "drop_pad_mode": 2,
    }
