"""The choice of experts by Triton: the op moe_gating."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import gating as kernels
from ...ops._common import check_choice, check_rank, check_sizes, check_value
from .checks import FLOATS, as_rows, check_cores, check_dtypes, check_together, name_of
from .define import device_for, launch, triton_op

MOST_EXPERTS = 1024
MOST_CHOSEN = 32

# -------------------------------------------------------------------- ops


@triton_op(
    "(Tensor logits, int k, *, Tensor? bias=None, str score='softmax', bool score_first=True, int groups=1, int top_groups=1, "
    "str group_score='max', float? excluded=None, bool renormalize=False, float eps=0.0, float scale=1.0, ScalarType? round_dtype=None, "
    "ScalarType? weights_dtype=None, bool return_scores=False, int cores) -> (Tensor, Tensor, Tensor)"
)
def moe_gating(
    logits: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    score: str = "softmax",
    score_first: bool = True,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    excluded: float | None = None,
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    round_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
    return_scores: bool = False,
    cores: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best experts of each token and their weights, in one launch; contiguous results.

        s = score(logits)
        indices = topk(s + bias within the best groups, k)
        weights = s[indices];  weights /= sum(weights) + eps where `renormalize`;  weights *= scale

    With `score_first=False` the choice is by `logits + bias`, and the score is taken of the k chosen logits alone.

    Args:
        logits: [rows, E], fp16, bf16 or fp32, E up to 1024; rows may lie apart evenly, what lies otherwise is copied first.
        k: how many are chosen, up to 32.
        bias: [E], added for the choice only, not to the weights.
        score: `softmax`, `sigmoid` or `sqrt_softplus`.
        score_first: whether the choice is by scores.
        groups, top_groups: the experts fall into `groups` equal parts one after the other; k are chosen of those of the `top_groups` best.
        group_score: a group is as good as its best member (`max`) or as the sum of its best two (`top2`), bias included.
        excluded: what experts of other groups count as; None stands for less than all. (Transformers' DeepSeek-V3 has 0.)
        renormalize, eps, scale: as above.
        round_dtype: scores are rounded to it before the choice.
        weights_dtype: of the weights, by default float32.
        return_scores: whether the third result is the scores [rows, E] (logits with `score_first=False`), float32; else it is [0, E].
        cores: vector cores of the device.

    Returns:
        weights [rows, k], indices [rows, k] int32 by falling choice, scores.

    Ties go to the lower index. A NaN counts as the largest number, as in `torch.topk`; indices are of experts whatever the logits are.

    Rounding: fp32 inside, scores rounded where `round_dtype` says, one cast at the end.

    Source: torch_npu's npu_moe_gating_top_k (`k_group` = top_groups, `group_count` = groups, `group_select_mode` 1 = top2, `norm_type` 1 =
    sigmoid with renormalize) and npu_moe_gating_top_k_softmax; the routers of transformers' Mixtral, Qwen3-MoE, DeepSeek-V3, GPT-OSS.

    Raises:
        TypeError: a dtype is none of the three.
        ValueError: a shape or a choice does not fit, k is larger than what can be chosen from, or tensors lie on several devices.
    """
    dtype = weights_dtype or torch.float32
    _check(logits, k, bias, score, groups, top_groups, group_score, dtype, cores)
    results = _results(logits, k, dtype, return_scores)
    weights, indices, scores = results
    if logits.shape[0] == 0:
        return results
    rows = as_rows(logits)
    plan = kernels.moe_gating_launch(
        rows.shape[0],
        rows.shape[1],
        k,
        device_for(logits, cores),
        score=score,
        score_first=score_first,
        groups=groups,
        top_groups=top_groups,
        by_two=group_score == "top2",
        renormalize=renormalize,
        round_to=name_of(round_dtype),
    )
    launch(
        plan,
        logits,
        logits_ptr=rows,
        bias_ptr=None if bias is None else bias.contiguous(),
        weights_ptr=weights,
        indices_ptr=indices,
        scores_ptr=scores if return_scores else None,
        rows=rows.shape[0],
        logits_stride=rows.stride(0),
        eps=eps,
        scale=scale,
        excluded=float("-inf") if excluded is None else excluded,
    )
    return results


def _check(
    logits: Tensor, k: int, bias: Tensor | None, score: str, groups: int, top_groups: int, group_score: str, dtype: torch.dtype, cores: int
) -> None:
    op = "moe_gating"
    check_rank(op, 2, logits=logits)
    check_dtypes(op, FLOATS, logits=logits, bias=bias)
    check_value(op, dtype in FLOATS, f"weights_dtype must be one of float16, bfloat16, float32, not {dtype}")
    check_together(op, logits=logits, bias=bias)
    check_cores(op, cores)
    check_choice(op, "score", score, ("softmax", "sigmoid", "sqrt_softplus"))
    check_choice(op, "group_score", group_score, ("max", "top2"))
    experts: Any = logits.shape[1]
    check_value(op, not statically_known_true(experts > MOST_EXPERTS), f"at most {MOST_EXPERTS} experts, not {experts}")
    check_value(op, 0 < k <= MOST_CHOSEN, f"k must be from 1 to {MOST_CHOSEN}: {k}")
    check_value(op, 0 < top_groups <= groups, f"top_groups must be from 1 to groups: {top_groups} of {groups}")
    check_value(op, not statically_known_true(experts % groups != 0), f"{experts} experts do not fall into {groups} equal groups")
    few = statically_known_true(experts // groups * top_groups < k)
    check_value(op, not few, f"k = {k} of {top_groups} groups of {experts // groups} experts")
    if bias is not None:
        check_sizes(op, "bias", bias.shape, logits.shape[1:])


def _results(logits: Tensor, k: int, dtype: torch.dtype, return_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, experts = logits.shape
    return (
        logits.new_empty((rows, k), dtype=dtype),
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows if return_scores else 0, experts), dtype=torch.float32),
    )


@moe_gating.fake
def _(
    logits: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    score: str = "softmax",
    score_first: bool = True,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    excluded: float | None = None,
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    round_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
    return_scores: bool = False,
    cores: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = weights_dtype or torch.float32
    _check(logits, k, bias, score, groups, top_groups, group_score, dtype, cores)
    return _results(logits, k, dtype, return_scores)
