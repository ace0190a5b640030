"""Choice of experts from router logits [rows, experts]: scores, an optional limit to the best groups, the best k, their weights.

A tile holds whole rows, laid out by groups: [ROWS, GROUPS, MEMBERS], padded to powers of 2. The k best are found one after the other,
each by a maximum and the first lane that has it, so that the order is that of a stable sort; a choice that is taken becomes -inf, below
which there is nothing. All compute in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Device, Launch, power_of_2, vector_grid
from .numeric import dtype_of, rounded

_NO_EXPERT: tl.constexpr = tl.constexpr(1 << 20)  # of lanes beyond a group's end
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_NOTHING: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def _softmax(x):
    """Over the last axis of [ROWS, LANES]; lanes of -inf get 0."""
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def _log1p(x):
    """log(1 + x) for x from 0 to 1, to the last bits also near 0: 2 atanh(x / (2 + x)) by its series."""
    z = x / (2.0 + x)
    s = z * z
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))))))
    return 2.0 * z * series


@triton.jit
def _score(x, SCORE: tl.constexpr):
    """Scores of logits [ROWS, LANES]; of -inf 0."""
    if SCORE == "softmax":
        y = _softmax(x)
    elif SCORE == "sigmoid":
        y = tl.sigmoid(x)
    else:
        tl.static_assert(SCORE == "sqrt_softplus", "unknown score")
        small = tl.exp(-tl.abs(x))
        y = tl.sqrt(tl.where(x > 0, x, 0.0 * small) + _log1p(small))
    return y


@triton.jit
def _sortable(x):
    """Numbers above -inf that order as `torch.topk` orders: NaN as the largest."""
    x = tl.where(x > -_LARGEST, x, tl.where(x == x, -_LARGEST, _LARGEST))
    return tl.where(x < _LARGEST, x, _LARGEST)


@triton.jit
def _first_best(choice, lane):
    """The largest of each row of [ROWS, LANES], and the lowest number of a lane that has it."""
    best = tl.max(choice, axis=1)
    return best, tl.min(tl.where(choice == best[:, None], lane[None, :], _NO_EXPERT), axis=1)


@triton.jit
def _take_best(choice, score, expert, weights, indices, at_place):
    """Move the best choice of each row of [ROWS, LANES] to the one place of weights and indices [ROWS, K'] where `at_place` is true."""
    _best, chosen = _first_best(choice, expert)
    taken = expert[None, :] == chosen[:, None]
    value = tl.sum(tl.where(taken, score, 0.0), axis=1)
    weights = tl.where(at_place[None, :], value[:, None], weights)
    indices = tl.where(at_place[None, :], chosen[:, None], indices)
    return tl.where(taken, _NOTHING, choice), weights, indices


@triton.jit
def _best_groups(choice, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BY_TWO: tl.constexpr):
    """Which groups of [ROWS, GROUPS', MEMBERS'] are among the best, as 1.0 and 0.0 [ROWS, GROUPS']; by their best member or best two."""
    ROWS: tl.constexpr = choice.shape[0]
    PADDED: tl.constexpr = choice.shape[1]
    MEMBERS: tl.constexpr = choice.shape[2]
    value = tl.max(choice, axis=2)
    if BY_TWO:
        member = tl.arange(0, MEMBERS)[None, None, :]
        first = tl.min(tl.where(choice == value[:, :, None], member, MEMBERS), axis=2)
        second = tl.max(tl.where(member == first[:, :, None], _NOTHING, choice), axis=2)
        value = value + second
    group = tl.arange(0, PADDED)
    value = tl.where((group < GROUPS)[None, :], _sortable(value), _NOTHING)
    among = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    for _ in range(TOP_GROUPS):
        _best, first_group = _first_best(value, group)
        taken = group[None, :] == first_group[:, None]
        among = tl.where(taken, 1.0, among)
        value = tl.where(taken, _NOTHING, value)
    return among


@triton.jit
def moe_gating_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    indices_ptr,
    scores_ptr,
    rows,
    logits_stride,
    eps,
    scale,
    excluded,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BY_TWO: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_FIRST: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    MEMBER_LANES: tl.constexpr,
    K_LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Weights and indices [rows, K] of the K best of GROUPS * MEMBERS logits, and the scores of all where `scores_ptr` is given.

    An expert outside of the TOP_GROUPS best groups is chosen as if its score were `excluded`.
    """
    EXPERTS: tl.constexpr = GROUPS * MEMBERS
    LANES: tl.constexpr = GROUP_LANES * MEMBER_LANES
    at_group = tl.arange(0, GROUP_LANES)[:, None]
    at_member = tl.arange(0, MEMBER_LANES)[None, :]
    in_experts = (at_group < GROUPS) & (at_member < MEMBERS)
    places = at_group * MEMBERS + at_member
    expert = tl.reshape(tl.where(in_experts, places, _NO_EXPERT), (LANES,))
    at_k = tl.arange(0, K_LANES)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS
        at_row = tl.arange(0, ROWS)
        in_rows = row + at_row < rows
        first = row.to(tl.int64)
        mask = in_rows[:, None, None] & in_experts[None, :, :]
        at = logits_ptr + first * logits_stride + (at_row[:, None, None] * logits_stride + places[None, :, :])
        # Rows beyond the last are of zeros, lanes beyond the last expert of -inf.
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x = tl.reshape(tl.where(in_experts[None, :, :], x, _NOTHING), (ROWS, LANES))
        score = x
        if SCORE_FIRST:
            score = rounded(_score(x, SCORE), ROUND)
        if scores_ptr is not None:
            at = scores_ptr + first * EXPERTS + (at_row[:, None, None] * EXPERTS + places[None, :, :])
            tl.store(at, tl.reshape(score, (ROWS, GROUP_LANES, MEMBER_LANES)), mask=mask)
        choice = score
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + places, mask=in_experts, other=0.0).to(tl.float32)
            choice = choice + tl.reshape(bias, (LANES,))[None, :]
        if TOP_GROUPS < GROUPS:
            grouped = tl.reshape(tl.where((expert < EXPERTS)[None, :], choice, _NOTHING), (ROWS, GROUP_LANES, MEMBER_LANES))
            among = _best_groups(grouped, GROUPS, TOP_GROUPS, BY_TWO)
            grouped = tl.where(among[:, :, None] > 0.0, grouped, excluded)
            choice = tl.reshape(grouped, (ROWS, LANES))
        choice = tl.where((expert < EXPERTS)[None, :], _sortable(choice), _NOTHING)
        weights = tl.zeros((ROWS, K_LANES), dtype=tl.float32)
        if not SCORE_FIRST and SCORE == "softmax":
            weights += _NOTHING
        indices = tl.zeros((ROWS, K_LANES), dtype=tl.int32)
        if UNROLL:
            for j in tl.static_range(K):
                choice, weights, indices = _take_best(choice, score, expert, weights, indices, at_k == j)
        else:
            for j in range(K):
                choice, weights, indices = _take_best(choice, score, expert, weights, indices, at_k == j)
        if not SCORE_FIRST:
            weights = rounded(_score(weights, SCORE), ROUND)
        if RENORMALIZE:
            total = tl.sum(tl.where((at_k < K)[None, :], weights, 0.0), axis=1)
            weights = weights / (total + eps)[:, None]
        weights = weights * scale
        mask = in_rows[:, None] & (at_k < K)[None, :]
        at_result = at_row[:, None] * K + at_k[None, :]
        tl.store(weights_ptr + first * K + at_result, weights.to(weights_ptr.dtype.element_ty), mask=mask)
        tl.store(indices_ptr + first * K + at_result, indices, mask=mask)


# -------------------------------------------------------------------- plans


def moe_gating_launch(
    rows: int,
    experts: int,
    k: int,
    device: Device,
    *,
    score: str = "softmax",
    score_first: bool = True,
    groups: int = 1,
    top_groups: int = 1,
    by_two: bool = False,
    renormalize: bool = False,
    round_to: str | None = None,
) -> Launch:
    """`moe_gating_kernel` for [rows, experts].

    Args:
        score: `softmax`, `sigmoid` or `sqrt_softplus`.
        score_first: whether the choice is by scores; else it is by logits, and only those chosen get a score.
        groups, top_groups: into how many equal parts the experts fall, and of how many of them experts are chosen.
        by_two: whether a group is as good as the sum of its best two members, else as its best.
        round_to: dtype to which scores are rounded in between.
    """
    members = experts // groups
    lanes = power_of_2(groups) * power_of_2(members)
    if device.kind == "npu":
        tile_rows, options = max(1, min(1024 // lanes, 32)), {}
    elif device.kind == "cuda":
        # A warp a row. With several rows Triton may deal a warp's lanes out to rows and experts in turns, and Triton 3.6 then reduces over
        # the wrong lanes (triton-lang/triton#9219).
        tile_rows, options = 1, {"num_warps": 1}
    else:
        tile_rows, options = 4, {}
    constants = {
        "GROUPS": groups,
        "MEMBERS": members,
        "TOP_GROUPS": top_groups,
        "BY_TWO": by_two,
        "K": k,
        "SCORE": score,
        "SCORE_FIRST": score_first,
        "RENORMALIZE": renormalize,
        "ROUND": dtype_of(round_to),
        "ROWS": tile_rows,
        "GROUP_LANES": power_of_2(groups),
        "MEMBER_LANES": power_of_2(members),
        "K_LANES": power_of_2(k),
        "UNROLL": device.kind != "npu",  # there it makes a long program, and no faster one
    }
    return Launch(moe_gating_kernel, vector_grid(-(-rows // tile_rows), device), constants, options)
