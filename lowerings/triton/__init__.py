"""The Triton kernels of kernels/ as torch ops, and the providers that call them: on NVIDIA, and on Ascend where triton-ascend is installed.

- `define.py` makes a torch op of a function that launches kernels; `checks.py` has what their argument checks share.
- One module a family (`norm.py`, `rope.py`, ...) has its ops `torch.ops.npu_fusion_triton.*` and its providers.

Without Triton nothing is registered, and the other providers of a target are tried.
"""

import importlib
import importlib.util

FAMILIES = (
    "norm",
    "gating",
    "permute",
    "conv1d",
    "glu",
    "glu_quant",
    "w4a16",
    "weight_only",
    "int8_matmul",
    "rope",
    "rope_norm",
    "quant",
    "norm_quant",
    "quantised",
    "attention",
    "moe",
    "experts",
    "experts_int8",
    "experts_weight_only",
)


def load() -> bool:
    """Register the ops and providers where Triton is installed; whether it is."""
    if importlib.util.find_spec("triton") is None:
        return False
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
    return True
