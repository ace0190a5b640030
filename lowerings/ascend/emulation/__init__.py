"""CPU kernels of the Ascend ops: importing this package registers one for every op of the table, under dispatch key CPU.

They follow the operators' documents and kernel sources, not our use of them: accumulation in fp32, the points where the operator rounds,
defaults, optional outputs, layouts. Every argument of a schema is honoured, or refused with an `EmulationError` that names it.

Where torch_npu is not installed the ops' fake kernels are registered as well.
"""

from . import (
    attention,
    cache,
    experts,
    glu,
    kv_rmsnorm_rope_cache,
    matmul,
    mla,
    moe,
    moe_collectives,
    norm,
    qkv_rms_norm_rope_cache,
    quant,
    quant_matmul,
    rope,
    tensor_parallel,
    weight_only,
)
from .registry import EmulationError, emulated_ops

__all__ = [
    "EmulationError",
    "attention",
    "cache",
    "emulated_ops",
    "experts",
    "glu",
    "kv_rmsnorm_rope_cache",
    "matmul",
    "mla",
    "moe",
    "moe_collectives",
    "norm",
    "qkv_rms_norm_rope_cache",
    "quant",
    "quant_matmul",
    "rope",
    "tensor_parallel",
    "weight_only",
]
