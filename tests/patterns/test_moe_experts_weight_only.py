"""Routed experts with four-bit matrices: spellings, look-alikes, numerics against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import FusionReport
from tests.patterns.support import fused_within_contract
from tests.patterns.test_moe_experts import BF16, EXPERTS, FP16, TOKENS, Experts, K, batched, grouped

HIDDEN, INNER, GROUP = 64, 32, 32
AWQ, STRAIGHT = [0, 16, 4, 20, 8, 24, 12, 28], [0, 4, 8, 12, 16, 20, 24, 28]
Unpack = Callable[[Tensor, Tensor, Tensor], Tensor]


def words(*sizes: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, sizes).to(torch.int32)


def inputs(dtype: torch.dtype = BF16, *, by_inputs: bool = False) -> list[Tensor]:
    """Tokens, ids, weights; then words, zero words and scales of gate_up and of down, with inputs before outputs."""
    torch.manual_seed(0)
    found = [torch.randn(TOKENS, HIDDEN).to(dtype), torch.rand(TOKENS, EXPERTS).topk(K).indices, torch.rand(TOKENS, K).to(dtype)]
    for rows, columns in ((HIDDEN, 2 * INNER), (INNER, HIDDEN)):
        groups = rows // GROUP
        packed = words(EXPERTS, rows // 8, columns) if by_inputs else words(EXPERTS, rows, columns // 8)
        scale = ((torch.rand(EXPERTS, groups, columns) + 0.5) / 4 / rows**0.5).to(dtype)
        found += [packed, words(EXPERTS, groups, columns // 8), scale]
    return found


# -------------------------------------------------------------------- spellings


def awq(packed: Tensor, zeros: Tensor, scale: Tensor) -> Tensor:
    """[E, inputs, outputs] of words of eight outputs."""
    shifts = torch.tensor(AWQ)
    codes = ((packed[..., None] >> shifts) & 15).flatten(-2)
    zero = ((zeros[..., None] >> shifts) & 15).flatten(-2).repeat_interleave(GROUP, 1)
    return (codes - zero) * scale.repeat_interleave(GROUP, 1)


def gptq(packed: Tensor, zeros: Tensor, scale: Tensor) -> Tensor:
    """[E, inputs, outputs] of words of eight inputs, the stored zero points being one less than what is subtracted."""
    shifts = torch.tensor(STRAIGHT)
    codes = ((packed.unsqueeze(2) >> shifts[:, None]) & 15).reshape(packed.shape[0], -1, packed.shape[2])
    zero = ((zeros.unsqueeze(-1) >> shifts) & 15).reshape(zeros.shape[0], zeros.shape[1], -1) + 1
    grouped = codes.view(codes.shape[0], -1, GROUP, codes.shape[-1]).to(scale.dtype) - zero.unsqueeze(2).to(scale.dtype)
    return (grouped * scale.unsqueeze(2)).reshape(codes.shape)


def layer(unpack: Unpack, experts: Experts = grouped) -> Callable[..., Tensor]:
    def experts_of_words(x: Tensor, ids: Tensor, w: Tensor, *packed: Tensor) -> Tensor:
        return experts(x, ids, w, unpack(*packed[:3]).mT, unpack(*packed[3:]).mT)

    return experts_of_words


def call_of(report: FusionReport) -> dict[str, Any]:
    [call] = [node for node in report.graph("fused").graph.nodes if "moe_experts_weight_only" in str(node.target)]
    return dict(call.kwargs)


@pytest.mark.parametrize(
    ("unpack", "experts", "dtype"), [(awq, grouped, BF16), (awq, batched, FP16), (gptq, grouped, BF16)], ids=["awq", "awq bmm", "gptq"]
)
def test_every_spelling_is_one_call(unpack: Unpack, experts: Experts, dtype: torch.dtype) -> None:
    report = fused_within_contract(layer(unpack, experts), *inputs(dtype, by_inputs=unpack is gptq))
    assert report.ops["moe_experts_weight_only"] == 1, [site.reason for site in report.missed]
    assert (report.idioms["experts"], report.idioms["glu"], report.idioms["dequantize"]) == (1, 1, 1)
    assert call_of(report)["packs_inputs"] is (unpack is gptq)
    assert list(call_of(report)["shifts"]) == (STRAIGHT if unpack is gptq else AWQ)


# -------------------------------------------------------------------- look-alikes


def other_order(packed: Tensor, zeros: Tensor, scale: Tensor) -> Tensor:
    """Two nibbles of a word are the same."""
    codes = ((packed[..., None] >> torch.tensor([0, 0, *AWQ[2:]])) & 15).flatten(-2)
    return codes * scale.repeat_interleave(GROUP, 1)


def other_experts(packed: Tensor, zeros: Tensor, scale: Tensor) -> Tensor:
    """The scales are those of the expert before."""
    return awq(packed, zeros, scale.roll(1, 0)) + 0 * scale.sum()


def scales_of_inputs(packed: Tensor, zeros: Tensor, scale: Tensor) -> Tensor:
    codes = ((packed[..., None] >> torch.tensor(AWQ)) & 15).flatten(-2)
    return codes * scale[:, 0].mean(-1)[:, None, None] * torch.arange(1, codes.shape[1] + 1)[:, None].to(scale.dtype) / codes.shape[1]


@pytest.mark.parametrize("unpack", [other_order, other_experts, scales_of_inputs])
def test_look_alikes_keep_their_matrices(unpack: Unpack) -> None:
    report = fused_within_contract(layer(unpack), *inputs())
    assert (report.ops["moe_experts"], report.ops["moe_experts_weight_only"]) == (1, 0)
