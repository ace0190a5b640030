"""Semantic ops that stand for several others, and are worth it only as a whole.

Where nothing on a target takes such a call, its parts are better left to the ops that take them one by one. So the rule asks first: what
is registered here says why no op of the target takes a call, by what is known of its arguments before the graph is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .config import FusionConfig

WhyNot = Callable[[Mapping[str, Any], FusionConfig], str | None]
"""From the arguments of a semantic call, as a rule gives them (values of the view, literals, plain attributes), to a reason."""

_WHY_NOT: dict[tuple[str, str], WhyNot] = {}


def register_whole(op: str, targets: Iterable[str]) -> Callable[[WhyNot], WhyNot]:
    """Register what says why no op of the targets takes a call of the semantic op (decorator)."""

    def declare(function: WhyNot) -> WhyNot:
        _WHY_NOT.update(dict.fromkeys(((op, target) for target in targets), function))
        return function

    return declare


def why_not_whole(op: str, arguments: Mapping[str, Any], config: FusionConfig) -> str | None:
    """Why no op of the target takes a call of the semantic op, or None: one does, or nobody knows beforehand."""
    ask = _WHY_NOT.get((op, config.target))
    return None if ask is None else ask(arguments, config)
