"""MoE collectives: `moe_dispatch` brings tokens to their experts' ranks, `moe_combine` the results home.

They are functional, of static shapes, name their group, and never wait for the device, so that a graph capture can hold them. All ranks
must call them in the same order. They are declared to have an effect, so that AOT passes a token from each to the next: blocks that do not
depend on each other keep the order of the program in every graph made through AOT, whatever a compiler makes of the rest, which may have
other sizes on another rank. No pass over an FX graph drops one.

`moe_send_rows` and `moe_return_rows` are the two movements by themselves; they are each other's backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import torch_private
from ..moe import ascend, plan, quantized
from ..moe.transport import Handle, resolve, transport_of
from ..semantic import SemanticOp, semantic_op
from ._common import Size, check_choice, check_floating, check_index, check_rank, check_sizes, check_type, check_value

_FAMILY = "moe"


def _on_ascend(x: Tensor, ranks: int) -> bool:
    """Whether torch_npu's ops make the calls: they are for two ranks and more."""
    return x.device.type == "npu" and ranks > 1


def _check_layout(op: str, ranks: int, experts: int, tokens: Size, max_tokens: Size) -> None:
    check_value(op, ranks >= 1 and experts % ranks == 0, f"{experts} experts cannot be shared equally by {ranks} ranks")
    too_many = isinstance(tokens, int) and isinstance(max_tokens, int) and tokens > max_tokens
    check_value(op, not too_many, f"{tokens} tokens are more than max_tokens, {max_tokens}")


def _check_dispatch(
    x: Tensor, ids: Tensor, weights: Tensor, active: Tensor | None, placement: Tensor | None, ranks: int, experts: int, max_tokens: Size,
    quant: str,
) -> None:  # fmt: skip
    op = "moe_dispatch"
    check_floating(op, x=x, weights=weights)
    check_index(op, ids=ids, placement=placement)
    check_rank(op, 2, x=x, ids=ids, weights=weights)
    check_sizes(op, "ids", ids.shape, [x.shape[0], ids.shape[1]])
    check_sizes(op, "weights", weights.shape, ids.shape)
    check_type(op, active is None or active.dtype == torch.bool, "active must be bool")
    check_value(op, active is None or active.dim() in (1, 2), "active must be [T] or [T, K]")
    check_value(op, placement is None or placement.dim() in (1, 2), "placement must be [experts] or [experts, copies]")
    check_choice(op, "quant", quant, ("none", *quantized.FORMATS))
    _check_layout(op, ranks, experts, x.shape[0], max_tokens)


@semantic_op(
    _FAMILY,
    "(Tensor x, Tensor ids, Tensor weights, Tensor? active=None, Tensor? placement=None, *, str group, int ranks, int experts, "
    "SymInt max_tokens, str quant='none') -> (Tensor, Tensor, Tensor, Tensor)",
    ordered=True,
)
def moe_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    active: Tensor | None = None,
    placement: Tensor | None = None,
    *,
    group: str,
    ranks: int,
    experts: int,
    max_tokens: int,
    quant: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring each token to the ranks of the experts it chose, once to each rank, there in the order of the experts.

    Maths: row a is x[t], as it came from rank r, for each (expert, r, t, k) with `ids[t, k] = expert` of rank r, in that order. There are R
    ranks, L = experts / R local experts, M = max_tokens, and A = R * M * min(K, L).

    Args:
        x: [T, H], T at most M; ranks may have unequal T.
        ids: [T, K] int32 or int64, different experts for a token; one outside [0, experts) is no choice.
        weights: [T, K] floating point: what the results will be weighted by; they travel along in fp32.
        group: the process group's name.
        ranks: R, the group's size.
        experts: E; rank r has the experts from r * L on.
        max_tokens: M, the same on all ranks.
        active: [T] or [T, K] bool: what counts; None for all.
        placement: [logical experts] or [logical experts, copies], integers: the slot of each expert, or of each of its copies, -1 for
            unused ones; read anew at each call, so that it may change between replays.
        quant: `none`, `int8` or `fp8` (e4m3): rows travel as 8 bits an element and one fp32 scale, absmax / 127 or absmax / 448.

    Returns:
        rows: [A, H] in the dtype of x, int8 or float8_e4m3fn; those past the sum of counts have no meaning.
        scales: [A] fp32: of each row where quantised, else ones.
        counts: [L] int64: rows of each local expert. On Ascend910B choices that do not count have rows as well, which weigh 0.
        handle: int32, for `moe_combine`; what is in it depends on the device.

    Rounding: none, but for the quantisation.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes, experts that ranks cannot share equally, more tokens than max_tokens.
        CollectiveError: no such group, unequal max_tokens (where that can be told), sizes not prepared in a capture, a peer that is late.

    Source: DeepEP, https://github.com/deepseek-ai/DeepEP; op-plugin doc npu_moe_distribute_dispatch_v2.
    """
    _check_dispatch(x, ids, weights, active, placement, ranks, experts, max_tokens, quant)
    members = resolve(group, ranks)
    if _on_ascend(x, ranks):
        return ascend.dispatch(x, ids, weights, ascend.place_of(members), experts, max_tokens, active, placement, quant)
    slots = ids
    if active is not None or placement is not None:
        slots = plan.physical_experts(ids, experts, active, placement, members.rank)
    sent, scales = quantized.quantize_rows(x.contiguous(), quant)
    return transport_of(members, x.device).dispatch(sent, scales, slots.contiguous(), weights.contiguous(), experts, max_tokens)


@moe_dispatch.fake
def _(
    x: Tensor, ids: Tensor, weights: Tensor, active: Tensor | None = None, placement: Tensor | None = None, *, group: str, ranks: int,
    experts: int, max_tokens: Size, quant: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    keep_order_in_inductor()
    _check_dispatch(x, ids, weights, active, placement, ranks, experts, max_tokens, quant)
    (tokens, hidden), top_k, local = x.shape, ids.shape[1], experts // ranks
    rows = plan.expanded_rows(ranks, max_tokens, top_k, local)
    dtype = x.dtype if quant == "none" else quantized.FORMATS[quant][0]
    size = ascend.handle_size(rows, ranks, experts) if _on_ascend(x, ranks) else Handle.size(tokens, top_k, ranks * max_tokens)
    return (
        x.new_empty((rows, hidden), dtype=dtype),
        x.new_empty((rows,), dtype=torch.float32),
        x.new_empty((local,), dtype=torch.int64),
        x.new_empty((size,), dtype=torch.int32),
    )


def _check_combine(x: Tensor, ids: Tensor, weights: Tensor, handle: Tensor, ranks: int, experts: int, max_tokens: Size) -> None:
    op = "moe_combine"
    check_floating(op, x=x, weights=weights)
    check_index(op, ids=ids, handle=handle)
    check_rank(op, 2, x=x, ids=ids, weights=weights)
    check_rank(op, 1, handle=handle)
    check_sizes(op, "weights", weights.shape, ids.shape)
    _check_layout(op, ranks, experts, ids.shape[0], max_tokens)
    check_sizes(op, "x", x.shape, [plan.expanded_rows(ranks, max_tokens, ids.shape[1], experts // ranks), x.shape[1]])


@semantic_op(
    _FAMILY,
    "(Tensor x, Tensor ids, Tensor weights, Tensor handle, Tensor? active=None, Tensor? placement=None, Tensor? shared=None, *, "
    "str group, int ranks, int experts, SymInt max_tokens) -> Tensor",
    ordered=True,
)
def moe_combine(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    handle: Tensor,
    active: Tensor | None = None,
    placement: Tensor | None = None,
    shared: Tensor | None = None,
    *,
    group: str,
    ranks: int,
    experts: int,
    max_tokens: int,
) -> Tensor:
    """Bring the experts' results home, weighted and added up for each token.

    Maths: `y[t] = shared[t] + sum over k of weights[t, k] * result(t, k)`, where result(t, k) is the row of x that came of choice k. A
    rank adds up its own experts' results for a token before they travel, so that one row travels back for each that came.

    Args:
        x: [A, H]: results of the rows of `moe_dispatch`, in their order; what stands past the sum of its counts is not read.
        ids, weights, group, ranks, experts, max_tokens, active, placement: those of the dispatch, the very same values.
        handle: the dispatch's.
        shared: [T, H] in the dtype of x: what shared experts give, added.

    Returns:
        [T, H] in the dtype of x. A token without any choice that counts has 0 (or `shared`).

    Rounding: a rank's sum is of fp32 products and rounded once to the dtype of x for the way; these sums are added in fp32 and rounded
    once more. fp64 stays fp64.

    Raises:
        TypeError, ValueError, CollectiveError: as `moe_dispatch`.

    Source: DeepEP, https://github.com/deepseek-ai/DeepEP; op-plugin doc npu_moe_distribute_combine_v2.
    """
    _check_combine(x, ids, weights, handle, ranks, experts, max_tokens)
    members = resolve(group, ranks)
    if _on_ascend(x, ranks):
        assist, received = ascend.split_handle(handle, x.shape[0], experts)
        place = ascend.place_of(members)
        return ascend.combine(x, ids, weights, assist, received, place, experts, max_tokens, active, placement, shared)
    known = Handle.unpacked(handle, ids.shape[0], ids.shape[1], ranks * max_tokens)
    total = transport_of(members, x.device).combine(x.contiguous(), known, max_tokens)
    if shared is not None:
        total = total + shared
    return total.to(x.dtype)


@moe_combine.fake
def _(
    x: Tensor, ids: Tensor, weights: Tensor, handle: Tensor, active: Tensor | None = None, placement: Tensor | None = None,
    shared: Tensor | None = None, *, group: str, ranks: int, experts: int, max_tokens: Size,
) -> Tensor:  # fmt: skip
    keep_order_in_inductor()
    _check_combine(x, ids, weights, handle, ranks, experts, max_tokens)
    return x.new_empty((ids.shape[0], x.shape[1]))


@semantic_op(_FAMILY, "(Tensor x, Tensor route, *, str group, int ranks, SymInt max_tokens) -> Tensor", ordered=True)
def moe_send_rows(x: Tensor, route: Tensor, *, group: str, ranks: int, max_tokens: int) -> Tensor:
    """Send rows where a dispatch sent them: its movement by itself, and the backward of `moe_return_rows`.

    Maths: row `r * M + i` of rank d's result is x[t] of rank r where a `route[t, k] = d * M + i` there, else 0.

    Args:
        x: [T, W], floating point.
        route: [T, K] int32: the send row of each choice that is a token's first with its rank, -1 for the others.
        group, ranks, max_tokens: as `moe_dispatch`.

    Returns:
        [R * M, W]: rows from rank r begin at r * M; 0 where none came.

    Rounding: none.

    Raises:
        TypeError, ValueError, CollectiveError: as `moe_dispatch`.

    Source: DeepEP's dispatch with a cached handle.
    """
    check_floating("moe_send_rows", x=x)
    check_rank("moe_send_rows", 2, x=x, route=route)
    return transport_of(resolve(group, ranks), x.device).send_rows(x.contiguous(), route, max_tokens)


@moe_send_rows.fake
def _(x: Tensor, route: Tensor, *, group: str, ranks: int, max_tokens: Size) -> Tensor:
    keep_order_in_inductor()
    return x.new_empty((ranks * max_tokens, x.shape[1]))


@semantic_op(_FAMILY, "(Tensor x, Tensor route, *, str group, int ranks, SymInt max_tokens) -> Tensor", ordered=True)
def moe_return_rows(x: Tensor, route: Tensor, *, group: str, ranks: int, max_tokens: int) -> Tensor:
    """Send rows home and add up those of each token: a combine's movement by itself, and the backward of `moe_send_rows`.

    Maths: `y[t] = sum over k with route[t, k] = d * M + i of x[r * M + i] of rank d`, on rank r.

    Args:
        x: [R * M, W], floating point, rows as `moe_send_rows` brings them.
        route, group, ranks, max_tokens: those of the send.

    Returns:
        [T, W] in the dtype of x.

    Rounding: added in fp32 (fp64 for fp64), rounded once.

    Raises:
        TypeError, ValueError, CollectiveError: as `moe_dispatch`.

    Source: DeepEP's combine.
    """
    check_floating("moe_return_rows", x=x)
    check_rank("moe_return_rows", 2, x=x, route=route)
    return transport_of(resolve(group, ranks), x.device).give_back(x.contiguous(), route, max_tokens).to(x.dtype)


@moe_return_rows.fake
def _(x: Tensor, route: Tensor, *, group: str, ranks: int, max_tokens: Size) -> Tensor:
    keep_order_in_inductor()
    return x.new_empty((route.shape[0], x.shape[1]))


# ------------------------------------------------------------------ backward


def _same_group(form: dict[str, Any]) -> dict[str, Any]:
    return {name: form[name] for name in ("group", "ranks", "max_tokens")}


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    x, ids = inputs[:2]
    if ctx.needs_input_grad[0] and keyword_only_inputs["quant"] != "none":
        raise ValueError("moe_dispatch: a quantised dispatch has no gradient; use quant='none' for training")
    ctx.form, ctx.shape = keyword_only_inputs, (x.shape[0], ids.shape[1])
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])


def _dispatch_backward(ctx: Any, rows: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """A token's gradient is the sum of those of all its rows."""
    form = ctx.form
    known = Handle.unpacked(ctx.saved_tensors[0], ctx.shape[0], ctx.shape[1], form["ranks"] * form["max_tokens"])
    partial = plan.reduce_rows(rows, known.place, None).to(rows.dtype)
    return moe_return_rows(partial, known.route, **_same_group(form)), None, None, None, None


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, ids, _, handle = inputs[:4]
    if _on_ascend(x, keyword_only_inputs["ranks"]) and any(ctx.needs_input_grad):
        raise ValueError("moe_combine: there is no gradient on Ascend, whose handle is opaque")
    shared = inputs[6]
    ctx.form, ctx.shape, ctx.shared = keyword_only_inputs, tuple(ids.shape), shared is not None and shared.requires_grad
    ctx.save_for_backward(x, handle)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A row's gradient is its token's times its weight; a weight's is the product of its row and its token's gradient."""
    x, handle = ctx.saved_tensors
    form, (tokens, top_k) = ctx.form, ctx.shape
    received = form["ranks"] * form["max_tokens"]
    known = Handle.unpacked(handle, tokens, top_k, received)
    sent = moe_send_rows(grad.contiguous(), known.route, **_same_group(form))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.new_zeros((x.shape[0] + 1, x.shape[1]))
    products = []
    for k in range(top_k):
        place = known.place[:, k].to(torch.int64)
        present = (place >= 0)[:, None]
        result = torch.where(present, x[place.clamp(min=0)].to(wide), 0.0)
        products.append((result * sent.to(wide)).sum(dim=1))
        weighted = (sent.to(wide) * known.weights[:, k, None]).to(x.dtype)
        rows = rows.index_copy(0, torch.where(place >= 0, place, x.shape[0]), weighted)
    weights = moe_return_rows(torch.stack(products, dim=1), known.route, **_same_group(form))
    return rows[:-1], None, weights, None, None, None, (grad if ctx.shared else None)


def _send_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.form = keyword_only_inputs
    ctx.save_for_backward(inputs[1])


def _send_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return moe_return_rows(grad.contiguous(), ctx.saved_tensors[0], **ctx.form), None


def _return_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return moe_send_rows(grad.contiguous(), ctx.saved_tensors[0], **ctx.form), None


def _differentiable(op: SemanticOp, backward: Any, setup: Any) -> None:
    op.differentiate(backward, setup)
    torch_private.keep_in_graphs(op.overload)
    torch_private.keep_order(op.overload)


def keep_order_in_inductor(*ops: SemanticOp) -> None:
    """For fake kernels: whatever compiles a graph runs them first, Inductor too, which is imported by then if it is to be used."""
    torch_private.keep_order_in_inductor([op.overload for op in (moe_dispatch, moe_combine, moe_send_rows, moe_return_rows, *ops)])


_differentiable(moe_dispatch, _dispatch_backward, _dispatch_setup)
_differentiable(moe_combine, _combine_backward, _combine_setup)
_differentiable(moe_send_rows, _send_backward, _send_setup)
_differentiable(moe_return_rows, _return_backward, _send_setup)
