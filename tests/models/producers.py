"""Models that somebody quantised, and latent attention as authors write it: what benchmarks/coverage.py measures besides the zoo.

Each producer is a block with a norm and a gated MLP, of linears in one way of quantising; or a step of latent attention. How often each
idiom occurs in it is known by construction and stands beside it. Numbers are compared with eager's, not with float64: a value that rounds
to another whole number is no error of anybody's.

    model, inputs = build("W8A8 by hand", torch.bfloat16, "decode")
    PRODUCERS["W8A8 by hand"].sites             # Counter(rms_norm=1, glu=1, quantize=2, ...)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)

from tests.int4 import AWQ, GPTQ, pack
from tests.patterns.mla_models import Absorbed, Attending, Sizes, angles, index_copied, rotate_pairs, rotate_pairs_to_halves

HIDDEN, INNER, GROUP, LENGTH = 128, 256, 32, 32
Linear = Callable[[int, int, torch.dtype], nn.Module]

# -------------------------------------------------------------------- linears by hand


class DynamicInt8(nn.Module):
    """W8A8 with a scale for each token: `_int_mm`, or a product of int32 matrices."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, *, int_mm: bool = True) -> None:
        super().__init__()
        self.int_mm = int_mm
        self.weight = nn.Parameter(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(outputs) * 0.02 / inputs**0.5 + 1e-4, requires_grad=False)

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-8) / 127.0
        return torch.round(x.float() / scale).clamp(-128, 127).to(torch.int8), scale

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        q, scale = self.quantized(rows)
        sums = torch._int_mm(q, self.weight.t()) if self.int_mm else q.to(torch.int32) @ self.weight.t().to(torch.int32)
        return (sums.float() * scale * self.scale).to(x.dtype).view(*x.shape[:-1], -1)


class StaticInt8(DynamicInt8):
    """The same with one scale for all tokens, calibrated before, and a bias of whole numbers."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs, dtype)
        self.input_scale = nn.Parameter(torch.tensor(0.031), requires_grad=False)
        self.quant_bias = nn.Parameter(torch.randint(-500, 500, (outputs,), dtype=torch.int32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        q = (rows / self.input_scale).round().clamp(-128, 127).to(torch.int8)
        sums = torch._int_mm(q, self.weight.t()) + self.quant_bias
        return (sums * (self.input_scale * self.scale)).to(x.dtype).view(*x.shape[:-1], -1)


class Outliers(DynamicInt8):
    """LLM.int8() without its outliers: whole numbers by absmax, scales multiplied before they are divided by 127 * 127."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        absmax = rows.float().abs().amax(dim=1, keepdim=True)
        q = torch.round(rows.float() * (127.0 / absmax)).to(torch.int8)
        sums = torch._int_mm(q, self.weight.t())
        return (sums.float() * (absmax * (self.scale * 127.0).unsqueeze(0)) * (1.0 / (127.0 * 127.0))).to(x.dtype).view(*x.shape[:-1], -1)


class ChannelInt8(nn.Module):
    """Weights alone of int8, dequantised before the product (compressed-tensors) or scaled after it."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, *, after: bool = False) -> None:
        super().__init__()
        self.after = after
        self.weight = nn.Parameter(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter((torch.rand(outputs, 1) * 0.02 / inputs**0.5 + 1e-4).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            return F.linear(x, self.weight.to(x.dtype)) * self.weight_scale.squeeze(-1)
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale)


class Awq(nn.Module):
    """AutoAWQ's gemm layout in plain torch: words along the outputs, in AWQ's order of nibbles."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        groups = inputs // GROUP
        self.register_buffer("qweight", pack(torch.randint(0, 16, (inputs, outputs)), AWQ))
        self.register_buffer("qzeros", pack(torch.randint(0, 16, (groups, outputs)), AWQ))
        self.register_buffer("scales", (torch.rand(groups, outputs) * 0.02 / inputs**0.5 + 1e-3).to(dtype))
        self.register_buffer("shifts", torch.tensor(AWQ), persistent=False)

    def unpack(self, words: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, device=words.device)
        nibbles = torch.bitwise_right_shift(words[:, :, None], shifts[None, None, :]).to(torch.int8)
        order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device=words.device)
        return torch.bitwise_and(nibbles[:, :, order].reshape(words.shape[0], -1), 0xF)

    def forward(self, x: Tensor) -> Tensor:
        weight, zeros = self.unpack(self.qweight), self.unpack(self.qzeros)
        zeros = zeros.repeat_interleave(GROUP, dim=0)
        scales = self.scales.repeat_interleave(GROUP, dim=0)
        return torch.matmul(x, ((weight - zeros) * scales).to(x.dtype))


class Gptq(nn.Module):
    """AutoGPTQ's layout in plain torch, without act-order: words along the inputs, zero points less one."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        groups = inputs // GROUP
        self.register_buffer("qweight", pack(torch.randint(0, 16, (outputs, inputs)), GPTQ).t().contiguous())
        self.register_buffer("qzeros", pack(torch.randint(0, 15, (groups, outputs)), GPTQ))
        self.register_buffer("scales", (torch.rand(groups, outputs) * 0.02 / inputs**0.5 + 1e-3).to(dtype))
        self.register_buffer("wf", torch.arange(0, 32, 4, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = self.qweight.shape[0] * 8, self.qweight.shape[1]
        zeros = torch.bitwise_right_shift(self.qzeros.unsqueeze(2).expand(-1, -1, 8), self.wf.unsqueeze(0))
        zeros = torch.bitwise_and(zeros + 0, 15).reshape(-1, 1, outputs) + 1
        weight = torch.bitwise_right_shift(self.qweight.unsqueeze(1).expand(-1, 8, -1), self.wf.view(1, -1, 1))
        weight = torch.bitwise_and(weight, 15).reshape(-1, GROUP, outputs)
        weight = (self.scales.reshape(-1, 1, outputs) * (weight - zeros)).reshape(inputs, outputs)
        return torch.matmul(x, weight.to(x.dtype))


class Hqq(nn.Module):
    """HQQ's: two halves of the rows of groups in one byte, floating zero points."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        count = inputs * outputs // GROUP
        self.register_buffer("packed", torch.randint(0, 256, (count // 2, GROUP), dtype=torch.uint8))
        self.register_buffer("zero", (torch.rand(count, 1) * 2 + 7).to(dtype))
        self.register_buffer("scale", (torch.rand(count, 1) * 0.02 / inputs**0.5 + 1e-3).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.cat(((self.packed & 0xF0) >> 4, self.packed & 0x0F), 0).to(x.dtype)
        return x @ ((codes - self.zero) * self.scale).reshape(self.shape).t()


# -------------------------------------------------------------------- blocks


class Block(nn.Module):
    """RMSNorm, residual add and a gated MLP of such linears."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.rand(HIDDEN) + 0.5).to(dtype), requires_grad=False)
        self.gate, self.up, self.down = linear(HIDDEN, INNER, dtype), linear(HIDDEN, INNER, dtype), linear(INNER, HIDDEN, dtype)

    def norm(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        h = self.norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


def _plain(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(inputs, outputs, dtype=dtype)


@dataclass(frozen=True)
class Producer:
    """A way to quantise, or to write latent attention.

    Attributes:
        make: the model for a dtype.
        sites: how often each idiom occurs in it.
    """

    make: Callable[[torch.dtype], nn.Module]
    sites: Counter[str]


def _sites(**more: int) -> Counter[str]:
    return Counter({"rms_norm": 1, "residual_add": 1, "glu": 1, "dequantize": 3, "quantized_linear": 3, **more})


def _torchao(config: Any, **sites: int) -> Producer:
    def make(dtype: torch.dtype) -> nn.Module:
        model = Block(_plain, dtype)
        quantize_(model, config)
        return model

    return Producer(make, _sites(**sites))


def _by_hand(linear: Linear, **sites: int) -> Producer:
    return Producer(lambda dtype: Block(linear, dtype), _sites(**sites))


def _latent(kind: type[Absorbed], *, int8: bool, **sites: int) -> Producer:
    write = index_copied if kind is Attending else None
    rotate = rotate_pairs_to_halves if kind is Attending else rotate_pairs
    quantised = {"quantize": 2, "dequantize": 3, "quantized_linear": 3} if int8 else {}
    counts = Counter({"mla": 1, "rms_norm": 2, "rope": 2, **quantised, **sites})
    return Producer(lambda dtype: kind(Sizes(), rotate, dtype, int8=int8, write=write), counts)


_INT4_GROUPS = PerGroup(GROUP)
PRODUCERS: dict[str, Producer] = {
    "torchao int8 dynamic": _torchao(Int8DynamicActivationInt8WeightConfig(), quantize=2),
    "torchao int8 dynamic, one scale": _torchao(Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()), quantize=2),
    "torchao int8 weights": _torchao(Int8WeightOnlyConfig()),
    "torchao float8 weights": _torchao(Float8WeightOnlyConfig()),
    "torchao int4 weights in int8": _torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=_INT4_GROUPS)),
    "torchao int8 weights, intx": _torchao(IntxWeightOnlyConfig()),
    "torchao int8 dynamic, int4 weights": _torchao(
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=_INT4_GROUPS), quantize=2, dequantize=5
    ),  # its activations are dequantised again, too
    "W8A8 by hand": _by_hand(DynamicInt8, quantize=2),
    "W8A8 by hand, int32 matmul": _by_hand(lambda *sizes: DynamicInt8(*sizes, int_mm=False), quantize=2),
    "W8A8 by hand, static": _by_hand(StaticInt8, quantize=3),  # each linear has a scale of its own
    "LLM.int8() by hand": _by_hand(Outliers, quantize=2),
    "int8 weights by hand": _by_hand(ChannelInt8),
    "int8 weights by hand, scaled after": _by_hand(lambda *sizes: ChannelInt8(*sizes, after=True)),
    "AWQ by hand": _by_hand(Awq),
    "GPTQ by hand": _by_hand(Gptq),
    "HQQ by hand": _by_hand(Hqq),
    "MLA preprocess": _latent(Absorbed, int8=False),
    "MLA preprocess, W8A8": _latent(Absorbed, int8=True),
    "MLA step": _latent(Attending, int8=False, attention=1, mla_attention=1),
    "MLA step, W8A8": _latent(Attending, int8=True, attention=1, mla_attention=1),
}


def build(name: str, dtype: torch.dtype, phase: str, batch: int, sequence: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A producer's model, and the arguments of a pass over `sequence` tokens a row (prefill) or one (decode)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PRODUCERS[name].make(dtype).eval().requires_grad_(False)
        tokens = sequence if phase == "prefill" else 1
        if not isinstance(model, Absorbed):
            return model, tuple(torch.randn(batch, tokens, HIDDEN).to(dtype) for _ in range(2))
        sizes = model.sizes
        inputs = (torch.randn(batch, tokens, sizes.hidden).to(dtype), *angles(batch, tokens, sizes.rope, dtype))
        if isinstance(model, Attending):
            caches = tuple(torch.randn(batch, LENGTH, size).to(dtype) for size in (sizes.latent, sizes.rope))
            inputs = (*inputs, torch.arange(LENGTH - tokens, LENGTH), *caches)
        return model, inputs
