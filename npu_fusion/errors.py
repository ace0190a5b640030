"""Every error this package raises on purpose derives from `NpuFusionError`."""

from __future__ import annotations


class NpuFusionError(Exception):
    """Base of all errors raised by npu_fusion."""


class ConfigError(NpuFusionError, ValueError):
    """A configuration names an unknown option, rule, target, mode or executor, or a value of the wrong type."""


class RuleError(NpuFusionError):
    """A rule is malformed, or is registered twice under one name in one config."""


class VerificationError(NpuFusionError, AssertionError):
    """`verify=True` found a fused op whose result differs from the subgraph it replaced by more than the rounding contract."""


class ReportError(NpuFusionError):
    """A report was asked for something that never ran under npu_fusion."""


class UnsupportedInputError(NpuFusionError):
    """The command line or `explain` was given something that it cannot load or trace, or a compiled model what it was not compiled for."""


class CollectiveError(NpuFusionError, RuntimeError):
    """A MoE collective was called in a way its group cannot serve, or a peer did not answer in time; says which rank."""
