"""What looks like a router, whether a rule takes it or not: a choice of few of many experts, by scores or to be scored.

The sites of the report come from here, so that a router which no fused op computes is named with its reason and not passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from npu_fusion.view import Value

MOST_EXPERTS = 2048
"""Softmax and top-k over more than that is sampling from a vocabulary, not a router."""
MOST_CHOSEN = 64

_SCORES = frozenset("softmax sigmoid softplus exp exp2 logsumexp log_softmax log_sigmoid_forward".split())
_ONE_BY_ONE = frozenset(
    "cast reshape permute expand slice cat split add sub mul div neg abs square sqrt rsqrt reciprocal log pow where clamp relu tanh "
    "maximum minimum".split()
)
"""Ops on the way from scores to a choice by them. Sums, maxima and products of matrices are not: a choice among groups of experts, or among
what a product makes of scores, is another choice."""
_MOST_STEPS = 24


def is_choice_of_experts(topk: Value) -> bool:
    """Whether a top-k chooses few of so many as a model has experts."""
    many, few = topk.args[0].shape[-1], topk.attrs["k"]
    return isinstance(many, int) and isinstance(few, int) and 1 < many <= MOST_EXPERTS and 0 < few <= min(many, MOST_CHOSEN)


def chooses_by_scores(topk: Value) -> bool:
    """Whether a choice of experts goes by scores, or those chosen are scored afterwards."""
    if topk.args[0].ndim == 0 or not is_choice_of_experts(topk):
        return False
    return _reaches_scores(topk.args[0], lambda value: value.args) or any(
        _reaches_scores(chosen, lambda value: value.users) for chosen in _taken(topk)
    )


def _taken(topk: Value) -> Iterator[Value]:
    """The values that were chosen by, and what is gathered at their places."""
    for part in topk.users:
        if part.op != "getitem":
            continue
        if part.attrs["index"] == 0:
            yield part
        else:
            yield from (user for user in part.users if user.op == "gather" and user.args[-1] is part)


def _reaches_scores(start: Value, onwards: Callable[[Value], list[Value] | tuple[Value, ...]]) -> bool:
    """Whether scores lie on the way from a value, through ops that work on one number at a time."""
    ahead, seen = [start], {start}
    for _ in range(_MOST_STEPS):
        if not ahead:
            return False
        value = ahead.pop(0)
        if value.op in _SCORES:
            return True
        if value.op in _ONE_BY_ONE or value is start:
            new = [other for other in onwards(value) if other not in seen]
            seen.update(new)
            ahead += new
    return False
