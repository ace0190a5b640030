"""What benchmarks/kernels.py measures: each kernel with its inputs, the plain PyTorch for Inductor, and libraries that compute the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import npu_fusion  # noqa: F401  registers the ops

ops = torch.ops.npu_fusion_triton
BF16 = torch.bfloat16
Inputs = Callable[[int, str], tuple[Any, ...]]


@dataclass(frozen=True)
class Subject:
    """One kernel at one width.

    Attributes:
        name: the kernel and its width.
        inputs: makes one set of arguments for a number of rows, on a device.
        ours: the Triton op, with `cores`.
        plain: the same in plain PyTorch, for Inductor.
        libraries: what else computes the same here, by name.
        rows: the numbers of rows at which it is measured, where these are not the usual ones.
        bytes_needed: the bytes that a call has to read and write, where that is not every argument and result once.
    """

    name: str
    inputs: Inputs
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    libraries: Callable[[], dict[str, Callable[..., Any]]] = dict
    rows: tuple[int, ...] | None = None
    bytes_needed: Callable[[tuple[Any, ...]], int] | None = None


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists, in order."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in tensors_in(value)] if isinstance(values, (tuple, list)) else []


def random(*sizes: int, device: str, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(sizes, device=device).to(dtype)


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return plain_rms_norm(total, weight), total


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def _liger_rms_norm() -> dict[str, Callable[..., Any]]:
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return {"liger": lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)}


def matrices(count: int, hidden: int, vectors: int = 0) -> Inputs:
    """Makes `count` matrices [rows, hidden] and `vectors` vectors [hidden]."""

    def make(rows: int, device: str) -> tuple[Any, ...]:
        sizes = [(rows, hidden)] * count + [(hidden,)] * vectors
        return tuple(random(*size, device=device) for size in sizes)

    return make


def rms_norm(x: Tensor, weight: Tensor, cores: int) -> Any:
    return ops.rms_norm(x, weight, 1e-6, cores=cores)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, cores: int) -> Any:
    return ops.add_rms_norm(x, residual, weight, 1e-6, cores=cores)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, cores: int) -> Any:
    return ops.layer_norm(x, weight, bias, 1e-6, cores=cores)


def _norms() -> Iterator[Subject]:
    for hidden in (2048, 4096, 7168):
        yield Subject(f"rms_norm {hidden}", matrices(1, hidden, 1), rms_norm, plain_rms_norm, _liger_rms_norm)
        yield Subject(f"add_rms_norm {hidden}", matrices(2, hidden, 1), add_rms_norm, plain_add_rms_norm)
        yield Subject(f"layer_norm {hidden}", matrices(1, hidden, 2), layer_norm, plain_layer_norm)


def quantized(y: Tensor) -> tuple[Tensor, Tensor]:
    """int8 by a scale for each row."""
    wide = y.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return torch.round(wide / scale).to(torch.int8), scale.squeeze(-1)


def plain_rms_norm_quant(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return quantized(plain_rms_norm(x.float(), weight))


def plain_add_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    return *quantized(plain_rms_norm(total.float(), weight)), total


def rms_norm_quant(x: Tensor, weight: Tensor, cores: int) -> Any:
    return ops.rms_norm_quant(x, weight, 1e-6, cores=cores)[:2]


def add_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor, cores: int) -> Any:
    q, scale, _, total = ops.add_rms_norm_quant(x, residual, weight, 1e-6, cores=cores)
    return q, scale, total


def dynamic_quantize(x: Tensor, cores: int) -> Any:
    return ops.dynamic_quantize(x, cores=cores)


def _quants() -> Iterator[Subject]:
    for hidden in (4096, 7168):
        yield Subject(f"dynamic_quantize {hidden}", matrices(1, hidden), dynamic_quantize, quantized)
        yield Subject(f"rms_norm_quant {hidden}", matrices(1, hidden, 1), rms_norm_quant, plain_rms_norm_quant)
        yield Subject(f"add_rms_norm_quant {hidden}", matrices(2, hidden, 1), add_rms_norm_quant, plain_add_rms_norm_quant)


def plain_swiglu(merged: Tensor) -> Tensor:
    gate, up = merged.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def plain_swiglu_quant(merged: Tensor) -> tuple[Tensor, Tensor]:
    return quantized(plain_swiglu(merged))


def swiglu(merged: Tensor, cores: int) -> Any:
    return ops.glu(merged, None, cores=cores)


def swiglu_quant(merged: Tensor, cores: int) -> Any:
    return ops.glu_quant(merged, None, cores=cores)


def _units() -> Iterator[Subject]:
    for width in (2048, 8192, 18432):
        yield Subject(f"swiglu {width}", matrices(1, 2 * width), swiglu, plain_swiglu)
        yield Subject(f"swiglu_quant {width}", matrices(1, 2 * width), swiglu_quant, plain_swiglu_quant)


HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cores: int) -> Any:
    return ops.rotary([q, k], cos, sin, cores=cores)


def plain_qkv_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (HEADS + 2 * KV_HEADS, HEAD_DIM))
    q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    return _rotated(plain_rms_norm(q, q_weight), cos, sin), _rotated(plain_rms_norm(k, k_weight), cos, sin), v.clone()


def qkv_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, cores: int) -> Any:
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return ops.qkv_norm_rotary(qkv, q_weight, k_weight, cos, sin, 1e-6, **sizes, cores=cores)


def _tables(rows: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin [1, rows, 1, D] of as many positions."""
    angles = torch.arange(rows, device=device)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
    angles = torch.cat((angles, angles), -1)[None, :, None]
    return angles.cos().to(BF16), angles.sin().to(BF16)


def _rope_inputs(rows: int, device: str) -> tuple[Any, ...]:
    """q and k [1, rows, heads, D], as a projection leaves them."""
    q, k = (random(1, rows, heads, HEAD_DIM, device=device) for heads in (HEADS, KV_HEADS))
    return q, k, *_tables(rows, device)


def _qkv_inputs(rows: int, device: str) -> tuple[Any, ...]:
    qkv = random(1, rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=device)
    return qkv, random(HEAD_DIM, device=device), random(HEAD_DIM, device=device), *_tables(rows, device)


def _rotations() -> Iterator[Subject]:
    name = f"{HEADS}+{KV_HEADS} x {HEAD_DIM}"
    yield Subject(f"rope {name}", _rope_inputs, rope, plain_rope)
    yield Subject(f"split_qkv_norm_rope {name}", _qkv_inputs, qkv_norm_rope, plain_qkv_norm_rope)


GROUP = 128


def _packed(inputs: int, outputs: int) -> Inputs:
    """x, our words, scales, and the words of AWQ; in fp16 on a CPU, whose interpreter cannot multiply bf16."""

    def make(rows: int, device: str) -> tuple[Any, ...]:
        dtype = BF16 if device == "cuda" else torch.float16
        awq = torch.randint(-(2**31), 2**31 - 1, (inputs, outputs // 8), dtype=torch.int32, device=device)
        words = ops.w4a16_repack_awq(awq, group_size=GROUP, cores=132)
        scales = 0.01 * random(inputs // GROUP, outputs, device=device, dtype=dtype).abs() + 0.01
        return random(rows, inputs, device=device, dtype=dtype), words, scales, awq

    return make


def plain_w4a16(x: Tensor, words: Tensor, scales: Tensor, awq: Tensor) -> Tensor:
    """Dequantise, then multiply."""
    shifts = torch.tensor((0, 16, 4, 20, 8, 24, 12, 28), device=x.device)  # nibble of each of eight columns
    numbers = ((awq[:, :, None] >> shifts) & 15).flatten(1) - 8
    weight = (numbers.to(x.dtype).unflatten(0, (-1, GROUP)) * scales[:, None]).flatten(0, 1)
    return torch.matmul(x, weight)


def w4a16(x: Tensor, words: Tensor, scales: Tensor, awq: Tensor, cores: int) -> Any:
    return ops.w4a16_linear(x, words, scales, group_size=GROUP, cores=cores, matrix_cores=cores)


def _four_bits() -> Iterator[Subject]:
    for inputs, outputs in ((768, 2048), (2048, 1536), (4096, 4096)):
        name = f"w4a16 {inputs} x {outputs}"
        yield Subject(name, _packed(inputs, outputs), w4a16, plain_w4a16, rows=(1, 2, 4, 8), bytes_needed=_packed_bytes)


def _packed_bytes(arguments: tuple[Any, ...]) -> int:
    """The words and scales, which are read once."""
    _, words, scales, _ = arguments
    return int(words.numel() * words.element_size() + scales.numel() * scales.element_size())


SUBJECTS: list[Subject] = [*_norms(), *_quants(), *_units(), *_rotations(), *_four_bits()]
