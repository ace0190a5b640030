"""Rules, one file a family: what to look for in a graph, when it is safe, and which semantic op takes its place."""

if __name__ != "npu_fusion.patterns":
    raise ImportError("import npu_fusion.patterns: the folder at the top of the checkout is the same code under a name of its own")

from . import (
    attention,  # noqa: F401
    experts,  # noqa: F401
    experts_dense,  # noqa: F401
    experts_gathered,  # noqa: F401
    experts_int8,  # noqa: F401
    experts_int8_gathered,  # noqa: F401
    experts_loop,  # noqa: F401
    experts_weight_only,  # noqa: F401
    glu,  # noqa: F401
    int4_linear,  # noqa: F401
    matmul,  # noqa: F401
    mla,  # noqa: F401
    mla_absorbed,  # noqa: F401
    mla_preprocess,  # noqa: F401
    moe,  # noqa: F401
    moe_collectives,  # noqa: F401
    norm,  # noqa: F401
    norm_quant,  # noqa: F401
    quant,  # noqa: F401
    quant_given,  # noqa: F401
    quant_linear,  # noqa: F401
    quant_zero,  # noqa: F401
    rope,  # noqa: F401
    rope_norm,  # noqa: F401
    tensor_parallel,  # noqa: F401
    weight_only,  # noqa: F401
)
