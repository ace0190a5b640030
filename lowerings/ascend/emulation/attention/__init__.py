"""CPU kernels of the attention ops: FIA (v1, v2), prompt and incre flash attention, fusion attention (v1, v2, v3).

`core.py` has what they share: layouts, lengths, sparse bands and the computation; `infer.py` and `train.py` are the engines of the two
families.
"""

from . import flash, fused_infer, fusion

__all__ = ["flash", "fused_infer", "fusion"]
