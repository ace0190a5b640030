"""`FusionConfig`: everything a user can set, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .rule import AnyRule

TARGETS = ("auto", "ascend910b", "ascend910_93", "ascend950", "cuda", "cpu")
ROUNDINGS = ("fp32_internal", "exact")
EXECUTORS = ("auto", "eager", "graph", "inductor", "npugraph_ex", "torchair")
MODES: dict[str | None, dict[str, str]] = {None: {}, "default": {}, "reduce-overhead": {"executor": "graph"}}


@dataclass(frozen=True)
class FusionConfig:
    """Options of `torch.compile(model, backend="npu_fusion", options={...})`, as a frozen, checked value.

    Args:
        target: what the graph is compiled for; `auto` takes it from the inputs' device.
        rounding: `fp32_internal` lets a fused op keep fp32 longer than the model does; `exact` fuses only where it rounds at the same
            points.
        executor: `eager` runs the rewritten FX graph, `graph` captures it and replays it (CUDA graphs, NPU graphs); `inductor`,
            `npugraph_ex` and `torchair` hand it on to these compilers. `auto` is Inductor on CUDA and `eager` elsewhere: that a graph is
            captured is asked for, as in torch.compile, because it costs memory and ties caches to their addresses.
        executor_options: options for the compiler that the executor hands the graph to, by name, e.g. `{"static_kernel_compile": True}` for
            npugraph_ex, `{"mode": "reduce-overhead"}` for torchair, Inductor's configuration for Inductor.
        capture_limit: how many captures, of different sizes or addresses, are kept of one graph; beyond it the graph runs eagerly.
        rules: names of the only built-in rules to use, in place of all of them.
        disable: names of rules not to use.
        extra_rules: users' own rules, see `npu_fusion.register_rule`.
        verify: run every replaced subgraph beside its fused op on the first real inputs, and raise `VerificationError` on a mismatch.
        emulate: run an Ascend lowering on CPU tensors; where Triton's interpreter is asked for (TRITON_INTERPRET=1), a CUDA one too.
        merge_weights: let linears that share an input be merged into one where a rule needs it.
        keep_prepared_weights: keep packed weights, scales and zero points as kernels want them beside the model's own, in place of laying
            them out at every call: faster, for the memory of such weights once more. Writes that PyTorch does not count, to `weight.data`
            say, then need `npu_fusion.reload_weights`.
        read_index_buffers: let rules read, when a graph is compiled, small integer buffers that say how weights are packed and grouped
            (`g_idx`, tables of shifts). A call for which they hold other numbers runs the graph unfused.

    Raises:
        ConfigError: an unknown target, rounding, executor or rule, or a value of the wrong type; the message lists what is known.
        RuleError: two rules in force have one name.
    """

    target: str = "auto"
    rounding: str = "fp32_internal"
    executor: str = "auto"
    rules: tuple[str, ...] | None = None
    disable: tuple[str, ...] = ()
    extra_rules: tuple[AnyRule, ...] = ()
    verify: bool = False
    emulate: bool = False
    merge_weights: bool = True
    keep_prepared_weights: bool = False
    read_index_buffers: bool = True
    executor_options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    capture_limit: int = 64

    def __post_init__(self) -> None:
        _check_choice("target", self.target, TARGETS)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_choice("executor", self.executor, EXECUTORS)
        for name in ("verify", "emulate", "merge_weights", "keep_prepared_weights", "read_index_buffers"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"option {name!r} takes True or False, not {getattr(self, name)!r}")
        object.__setattr__(self, "executor_options", _as_pairs("executor_options", self.executor_options))
        if self.executor_options and self.executor in ("eager", "graph"):
            raise ConfigError(f"executor {self.executor!r} hands the graph to no compiler, and takes no 'executor_options'")
        if isinstance(self.capture_limit, bool) or not isinstance(self.capture_limit, int) or self.capture_limit < 1:
            raise ConfigError(f"option 'capture_limit' takes a positive number, not {self.capture_limit!r}")
        if self.rules is not None:
            object.__setattr__(self, "rules", _as_tuple("rules", self.rules))
        object.__setattr__(self, "disable", _as_tuple("disable", self.disable))
        object.__setattr__(self, "extra_rules", _as_tuple("extra_rules", self.extra_rules))
        self._check_rule_names()

    def _check_rule_names(self) -> None:
        from .rule import GroupRule, Rule, check_names, registered_rules

        for rule in self.extra_rules:
            if not isinstance(rule, (Rule, GroupRule)):
                raise ConfigError(f"option 'extra_rules' takes rules (npu_fusion.Rule, npu_fusion.GroupRule), not {rule!r}")
        known = [rule.name for rule in registered_rules()]
        for name in self.rules or ():
            _check_choice("rule", name, known)
        for name in self.disable:
            _check_choice("rule", name, [*known, *(rule.name for rule in self.extra_rules)])
        check_names(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> FusionConfig:
        """The configuration that `torch.compile(options=..., mode=...)` asks for."""
        if mode not in MODES:
            raise ConfigError(_unknown("mode", mode, [name for name in MODES if name]))
        values = {**MODES[mode], **dict(options or {})}
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in fields:
                raise ConfigError(_unknown("option", name, fields))
        return cls(**values)


def _check_choice(option: str, value: object, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ConfigError(_unknown(option, value, known))


def _unknown(kind: str, value: object, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {value!r}.{hint} Known: {', '.join(known) or 'none'}"


def _as_tuple(option: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"option {option!r} takes a sequence of rule names, not {value!r}")
    return tuple(value)


def _as_pairs(option: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping as a value that compares and hashes: pairs, sorted by name."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ConfigError(f"option {option!r} takes a dict of options by name, not {value!r}")
    return tuple(sorted(pairs, key=lambda pair: pair[0]))
