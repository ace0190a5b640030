"""Self-test cases of MLA before the attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .case import BF16, Arguments, Case, Inputs, Shape, case

HIDDEN, Q_LORA, NOPE, ROPE, LATENT = 7168, 1536, 128, 64, 512
PAGE, NZ = 128, 29


def cases() -> Iterator[Case]:
    """A matrix in another format; decode steps of few heads, in bf16, with int8 queries, and all in int8."""
    yield case("npu::npu_format_cast", _cast, BF16, (64, 128))
    yield case("npu::npu_format_cast", _cast, torch.int8, (64, 128))
    for op in ("npu::npu_mla_prolog_v3", "npu::npu_mla_prolog_v3_functional"):
        for mode in (0, 1, 2):
            yield case(op, _prolog, tokens=3, heads=2, mode=mode)


def _cast(inputs: Inputs, dtype: torch.dtype, shape: Shape) -> Arguments:
    tensor = inputs.integers(shape, 100, dtype) if dtype == torch.int8 else inputs.normal(shape, dtype)
    return {"input": tensor, "acl_format": NZ}


def _prolog(inputs: Inputs, tokens: int, heads: int, mode: int) -> Arguments:
    first, second = mode == 2, mode > 0
    cos, sin = inputs.angles((tokens, ROPE), BF16)
    weights = {
        "weight_dq": ((HIDDEN, Q_LORA), first),
        "weight_dkv_kr": ((HIDDEN, LATENT + ROPE), first),
        "weight_uq_qr": ((Q_LORA, heads * (NOPE + ROPE)), second),
    }
    arguments: dict[str, Any] = {name: _matrix(inputs, shape, whole) for name, (shape, whole) in weights.items()}
    if second:
        arguments["dequant_scale_w_uq_qr"] = _scales(inputs, (1, heads * (NOPE + ROPE)), Q_LORA)
    if first:
        arguments["dequant_scale_x"] = _scales(inputs, (tokens, 1), 1)
        arguments["dequant_scale_w_dq"] = _scales(inputs, (1, Q_LORA), HIDDEN)
        arguments["dequant_scale_w_dkv_kr"] = _scales(inputs, (1, LATENT + ROPE), HIDDEN)
    return {
        **arguments,
        "token_x": _matrix(inputs, (tokens, HIDDEN), first, std=1.0),
        "weight_uk": inputs.normal((heads, NOPE, LATENT), BF16, NOPE**-0.5),
        "rmsnorm_gamma_cq": inputs.near_one((Q_LORA,), BF16),
        "rmsnorm_gamma_ckv": inputs.near_one((LATENT,), BF16),
        "rope_sin": sin,
        "rope_cos": cos,
        "kv_cache": inputs.normal((2, PAGE, 1, LATENT), BF16),
        "kr_cache": inputs.normal((2, PAGE, 1, ROPE), BF16),
        "cache_index": inputs.places(tokens, 2 * PAGE),
        "weight_quant_mode": mode,
    }


def _matrix(inputs: Inputs, shape: Shape, whole: bool, std: float = 0.02) -> torch.Tensor:
    if not whole:
        return inputs.normal(shape, BF16, std)
    whole_numbers: torch.Tensor = (inputs.integers(shape, 255) - 127).to(torch.int8)
    return whole_numbers


def _scales(inputs: Inputs, shape: Shape, summed: int) -> torch.Tensor:
    """Such that sums of so many products come to about one."""
    scales: torch.Tensor = (1 + inputs.normal(shape, torch.float32, 0.1).abs()) / (73 * summed**0.5)
    return scales
