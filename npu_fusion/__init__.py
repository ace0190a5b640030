"""npu_fusion: recognises the idioms of a plain PyTorch model and runs them as fused ops.

torch.compile(model, backend="npu_fusion")
print(npu_fusion.explain(model, example_input))
"""

from . import ops, patterns
from .backend import npu_fusion_backend, register, reload_weights
from .config import FusionConfig
from .errors import ConfigError, NpuFusionError, ReportError, RuleError, UnsupportedInputError, VerificationError
from .explain import explain
from .lowerings import ascend as _ascend  # noqa: F401  registers its providers
from .lowerings import triton as _triton
from .lowerings.ascend.graph_compilers import npugraph_ex_options, torchair_config
from .lowerings.inductor import inductor_options
from .pipeline import fuse
from .record import GraphRecord, Site
from .report import FusionReport, report
from .rule import Call, GroupRule, Reject, Rule, register_rule, rule

_triton.load()
register()

__all__ = [
    "Call",
    "ConfigError",
    "FusionConfig",
    "FusionReport",
    "GraphRecord",
    "GroupRule",
    "NpuFusionError",
    "Reject",
    "ReportError",
    "Rule",
    "RuleError",
    "Site",
    "UnsupportedInputError",
    "VerificationError",
    "explain",
    "fuse",
    "inductor_options",
    "npu_fusion_backend",
    "npugraph_ex_options",
    "ops",
    "patterns",
    "register_rule",
    "reload_weights",
    "report",
    "rule",
    "torchair_config",
]
