"""Rules: what to look for, when it is sound, and what to put in its place."""

from __future__ import annotations

import dataclasses
import graphlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .errors import RuleError
from .pattern import Pattern
from .semantic import SemanticOp
from .view.value import Form, Value

if TYPE_CHECKING:
    from .config import FusionConfig
    from .match import Match


@dataclass(frozen=True)
class Call:
    """A semantic op applied to arguments, and the values that its outputs replace.

    Arguments are given by schema name: values, literals, lists of values, and plain Python attributes. Outputs stand in schema order; an
    output that replaces nothing is None.
    """

    op: SemanticOp
    args: Mapping[str, Any]
    outputs: Sequence[Value | None]


@dataclass(frozen=True)
class Reject:
    """Why a match must not be rewritten, and the value to point the author at.

    Where a pattern fits in several ways and each is rejected, the one with the greatest `progress`, the number of conditions that held
    before, is reported.
    """

    reason: str
    value: Value | None = None
    progress: int = 0


@dataclass(frozen=True, eq=False)
class Rule:
    """One fusion: `pattern`, `check`, `rewrite`. Rules hold no state; everything a rewrite needs is in the match.

    Args:
        name: unique among the rules of a config.
        pattern: what to look for; the root is the value that the fused op produces, or the context in which it is found.
        rewrite: the semantic call that computes the match's outputs.
        produces: name of the semantic op that `rewrite` calls.
        idioms: idiom to the name of the bound value at which an occurrence is counted; what absorbed semantic forms count comes on top.
        instead_of: idioms that absorbed forms do not count any more, because the rule's own say more of the same occurrence: a gated norm
            is not a norm as well.
        check: soundness conditions that the pattern cannot say; None when the match is sound.
        hidden_launches: launches inside the ops that a match replaces of which the cost model knows nothing, such as the copy of an operand
            that an op wants in another order. Of two graphs with equally many launches the one that is spared more of these is taken.
        beside: semantic forms of the match that the pattern cannot run through, as they stand beside its root and not before it: the match
            absorbs them too.
        starts_from: semantic ops whose forms `check` and `beside` look for, besides those in the pattern.
        gist: a smaller pattern that already betrays the author's intent. Where it matches and the rule does not, the report shows a miss
            of `gist_idiom` (the first of `idioms` by default). It binds the place under `site`.
    """

    name: str
    pattern: Pattern
    rewrite: Callable[[Match], Call]
    produces: str
    idioms: Mapping[str, str] = field(default_factory=dict)
    instead_of: frozenset[str] = frozenset()
    check: Callable[[Match], Reject | None] | None = None
    gist: Pattern | None = None
    gist_idiom: str | None = None
    hidden_launches: int = 0
    beside: Callable[[Match], Sequence[Form]] | None = None
    starts_from: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.pattern.roots() is None:
            raise RuleError(f"rule {self.name!r}: the pattern's root must be an operator, not a variable")
        if not self.pattern.required():
            raise RuleError(f"rule {self.name!r}: the pattern has no operator that every match contains")
        if self.gist is not None and not self.missed_idiom:
            raise RuleError(f"rule {self.name!r}: a gist needs an idiom")
        if self.gist is not None and (self.gist.roots() is None or not self.gist.required()):
            raise RuleError(f"rule {self.name!r}: the gist's root must be an operator, and some operator must be in every match")

    @property
    def missed_idiom(self) -> str:
        return self.gist_idiom or next(iter(self.idioms), "")

    @cached_property
    def consumes(self) -> frozenset[str]:
        """Semantic ops whose forms the rule starts from."""
        found = frozenset(name.removeprefix("form:") for name in self.pattern.footprint.operators if name.startswith("form:"))
        return found | self.starts_from


@dataclass(frozen=True, eq=False)
class GroupRule:
    """Neighbouring calls of one semantic op that one call can make, e.g. the rotations of q and k by one table.

    Args:
        name: unique among the rules of a config.
        member: the semantic op whose forms are grouped.
        key: members with equal keys may be grouped; None keeps a member out.
        combine: the call that makes all members' outputs, from their forms in graph order; None where these cannot be combined.
        produces: the op that `combine` calls.
        most: the largest group.
        absorbs: semantic op to a function from a member to the form of that op which its input has and which `combine` computes as well.
    """

    name: str
    member: str
    key: Callable[[Form], Hashable]
    combine: Callable[[Sequence[Form]], Call | None]
    produces: str
    most: int = 2
    absorbs: Mapping[str, Callable[[Form], Form | None]] = field(default_factory=dict)

    @cached_property
    def consumes(self) -> frozenset[str]:
        return frozenset({self.member, *self.absorbs})


AnyRule = Rule | GroupRule

_REGISTRY: dict[str, AnyRule] = {}


def register_builtin(*rules: AnyRule) -> None:
    """Add the package's own rules. Users' rules go into a config (`npu_fusion.register_rule`), never here."""
    for rule in rules:
        if rule.name in _REGISTRY:
            raise RuleError(f"rule {rule.name!r} is registered twice")
        _REGISTRY[rule.name] = rule


def registered_rules() -> tuple[AnyRule, ...]:
    """The package's own rules."""
    return tuple(_REGISTRY.values())


def in_order(rules: Sequence[AnyRule]) -> list[AnyRule]:
    """Rules sorted so that a rule runs after those whose semantic ops it starts from.

    A rule that refines an op into the same op (RMSNorm into gated RMSNorm) runs between that op's makers and its other consumers; of those,
    rules that group ops come last.
    """

    def refines(rule: AnyRule, op: str) -> bool:
        return op == rule.produces and op in rule.consumes

    def before(first: AnyRule, then: AnyRule) -> bool:
        op = first.produces
        if first is then or op not in then.consumes:
            return False
        groups_last = isinstance(then, GroupRule) and not isinstance(first, GroupRule)
        return groups_last or not (refines(first, op) and refines(then, op))

    order = graphlib.TopologicalSorter({then: [first for first in rules if before(first, then)] for then in rules})
    try:
        return list(order.static_order())
    except graphlib.CycleError as error:
        names = ", ".join(sorted({rule.name for rule in error.args[1]}))
        raise RuleError(f"rules start from one another's semantic ops in a circle: {names}") from error


def rule(name: str, *, pattern: Pattern, produces: str, **options: Any) -> Callable[[Callable[[Match], Call]], Rule]:
    """Declare a rule by decorating its rewrite::

    @npu_fusion.rule("my_norm", pattern=..., produces="rms_norm", idioms={"rms_norm": "site"})
    def my_norm(match): return Call(rms_norm, {"x": match["x"], ...}, [match.root])

    The rule takes effect in the configs that it is added to: `register_rule(config, my_norm)`.
    """

    def declare(rewrite: Callable[[Match], Call]) -> Rule:
        return Rule(name, pattern, rewrite, produces, **options)

    return declare


def register_rule(config: FusionConfig, *rules: AnyRule) -> FusionConfig:
    """The config with the user's own rules added. Nothing else changes: rules are never registered for the whole process."""
    return dataclasses.replace(config, extra_rules=(*config.extra_rules, *rules))


def rules_of(config: FusionConfig) -> list[AnyRule]:
    """The rules in force under a config, in the order in which they run."""
    return in_order(_in_force(config))


def check_names(config: FusionConfig) -> None:
    """Two rules of one name cannot both be in force."""
    names = [r.name for r in _in_force(config)]
    if len(set(names)) != len(names):
        raise RuleError(f"two rules have the name {next(n for n in names if names.count(n) > 1)!r}; a user's rule needs a name of its own")


def _in_force(config: FusionConfig) -> list[AnyRule]:
    chosen = [r for r in registered_rules() if config.rules is None or r.name in config.rules]
    return [r for r in (*chosen, *config.extra_rules) if r.name not in config.disable]
