"""Mixture of experts: `moe_gating`, the choice of experts and their weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..semantic import semantic_op
from ._common import check_choice, check_floating, check_floating_dtype, check_min_rank, check_sizes, check_value, compute_dtype

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
GROUP_SCORES = ("max", "top2")
GUARDS = ("add", "clamp")


def _check_gating(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    guard: str,
    score_dtype: torch.dtype | None,
    weights_dtype: torch.dtype | None,
) -> None:
    op = "moe_gating"
    check_min_rank(op, 1, logits=logits)
    check_floating(op, logits=logits, bias=bias)
    check_floating_dtype(op, "score_dtype", score_dtype)
    check_floating_dtype(op, "weights_dtype", weights_dtype)
    check_choice(op, "score", score, SCORES)
    check_choice(op, "group_score", group_score, GROUP_SCORES)
    check_choice(op, "guard", guard, GUARDS)
    experts = logits.shape[-1]
    if bias is not None:
        check_sizes(op, "bias", bias.shape, (experts,))
    check_value(op, 0 < top_groups <= groups, f"top_groups must be from 1 to groups: {top_groups} of {groups}")
    check_value(op, not statically_known_true(experts % groups != 0), f"{experts} experts do not fall into {groups} equal groups")
    few = statically_known_true(experts // groups * top_groups < k)
    check_value(op, k > 0 and not few, f"k = {k} of {top_groups} groups of {experts // groups} experts")
    small = group_score == "top2" and groups > 1 and statically_known_true(experts // groups < 2)
    check_value(op, not small, "the best two of a group need groups of two")


def _score(x: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return torch.softmax(x, -1)
    return torch.sigmoid(x) if score == "sigmoid" else torch.nn.functional.softplus(x).sqrt()


def _within_groups(choice: Tensor, groups: int, top_groups: int, group_score: str, excluded: float | None) -> Tensor:
    """The scores to choose by, with those outside the best groups replaced by `excluded`."""
    parts = choice.unflatten(-1, (groups, choice.shape[-1] // groups))
    merit = parts.amax(-1) if group_score == "max" else parts.topk(2, -1).values.sum(-1)
    best = merit.topk(top_groups, -1, sorted=False).indices
    kept = torch.zeros_like(merit, dtype=torch.bool).scatter(-1, best, True)
    return torch.flatten(parts.masked_fill(~kept.unsqueeze(-1), float("-inf") if excluded is None else excluded), -2)


@semantic_op(
    "moe",
    '(Tensor logits, Tensor? bias, int k, *, str score="softmax", bool score_first=True, int groups=1, int top_groups=1, '
    'str group_score="max", float? excluded=None, bool renormalize=False, float eps=0.0, str guard="add", float scale=1.0, '
    "bool sorted=True, bool dense=False, ScalarType? score_dtype=None, ScalarType? weights_dtype=None) -> (Tensor, Tensor)",
)
def moe_gating(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    score: str = "softmax",
    score_first: bool = True,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    excluded: float | None = None,
    renormalize: bool = False,
    eps: float = 0.0,
    guard: str = "add",
    scale: float = 1.0,
    sorted: bool = True,
    dense: bool = False,
    score_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Choice of experts: each token's k best experts and their weights.

    Maths::

        s = score(logits)
        indices = the k largest of s + bias within the best groups
        weights = s[indices]
        weights = weights / (sum(weights) + eps)  or  weights / max(sum(weights), eps)   where `renormalize`
        weights = weights * scale

    With `score_first=False` the choice is by `logits + bias`, and the score is taken of the k chosen logits alone.

    Args:
        logits: [..., E].
        bias: [E], added for the choice only, not to the weights; or None.
        k: how many experts are chosen.
        score: `softmax`, `sigmoid` or `sqrt_softplus` (the root of softplus).
        score_first: whether the choice is by scores.
        groups, top_groups: the experts fall into `groups` equal parts one after the other; k are chosen of those of the `top_groups` best.
        group_score: a group is as good as its best member (`max`) or as the sum of its best two (`top2`), bias included.
        excluded: what experts of other groups count as in the choice; None stands for less than all.
        renormalize, eps, guard: as above; `guard` is `add` or `clamp`.
        scale: as above.
        sorted: whether the chosen come in falling order; else in any order.
        dense: whether the weights come as [..., E], with zeros for experts that are not chosen.
        score_dtype: dtype to which the scores are rounded before the choice; None keeps the internal precision.
        weights_dtype: dtype of the weights; None is float32 (float64 for float64 logits).

    Returns:
        weights [..., k], or [..., E] where `dense`; indices [..., k] int64. Both are contiguous.

    Which of several equal candidates is chosen, and their order, is the provider's business, as it is that of `torch.topk`: the reference
    does what `torch.topk` does, Triton and the ops of torch_npu give ties to the lower index.

    Rounding: fp32 inside (fp64 if an input is), scores rounded to `score_dtype`, one cast at the end.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: an unknown choice, a bias of another size, groups that are not equal, k larger than what can be chosen from.

    Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437 (sigmoid, bias, groups); Mixtral, https://arxiv.org/abs/2401.04088; torch_npu's
    npu_moe_gating_top_k and npu_moe_gating_top_k_softmax.
    """
    _check_gating(logits, bias, k, score, groups, top_groups, group_score, guard, score_dtype, weights_dtype)
    compute = compute_dtype(logits, bias)
    scores = logits.to(compute)
    if score_first:
        scores = _score(scores, score)
        scores = scores if score_dtype is None else scores.to(score_dtype).to(compute)
    choice = scores if bias is None else scores + bias
    if top_groups < groups:
        choice = _within_groups(choice, groups, top_groups, group_score, excluded)
    indices = choice.topk(k, -1, sorted=sorted).indices
    weights = scores.gather(-1, indices)
    if not score_first:
        weights = _score(weights, score)
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + eps if guard == "add" else total.clamp_min(eps))
    weights = (weights * scale).to(weights_dtype or compute)
    if dense:
        weights = weights.new_zeros(logits.shape).scatter(-1, indices, weights)
    return weights, indices


@moe_gating.fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    score: str = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    guard: str = "add",
    dense: bool = False,
    score_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    _check_gating(logits, bias, k, score, groups, top_groups, group_score, guard, score_dtype, weights_dtype)
    sizes = (*logits.shape[:-1], k)
    weights = logits.new_empty(logits.shape if dense else sizes, dtype=weights_dtype or compute_dtype(logits, bias))
    return weights, logits.new_empty(sizes, dtype=torch.int64)
