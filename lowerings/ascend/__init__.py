"""The Ascend targets: ops of torch_npu, of ATB and of sgl-kernel-npu.

- `table/*.toml` is what is known of these ops, as data: schema, SoCs, dtypes, limits, whether a capture may hold them, each with its
  source. `table.py` reads it and checks calls against it.
- One module a family (`norm.py`, `rope.py`, ...) has the providers: how a semantic op becomes calls of these ops.
- `sgl.py` makes ops of those functions of sgl-kernel-npu that are none.
- `library.py` makes `torch.ops.npu.*` exist: torch_npu's own where it is installed, else defined from the table's schemas.
- `emulation/` has CPU kernels of the ops, so that an Ascend lowering can be run, and its numbers tested, without an NPU.
"""

from . import (
    attention,
    cache,
    capture_facts,
    experts,
    experts_int8,
    experts_weight_only,
    glu,
    matmul,
    mla,
    moe,
    moe_collectives,
    norm,
    norm_rope_cache,
    quant,
    rope,
    tensor_parallel,
    weight_only,
)

__all__ = [
    "attention",
    "cache",
    "capture_facts",
    "experts",
    "experts_int8",
    "experts_weight_only",
    "glu",
    "matmul",
    "mla",
    "moe",
    "moe_collectives",
    "norm",
    "norm_rope_cache",
    "quant",
    "rope",
    "tensor_parallel",
    "weight_only",
]
