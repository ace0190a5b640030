"""What the CPU kernels of attention share: layouts, lengths, masks, and the attention of one sequence.

The operators differ in their arguments, not in their arithmetic, which is that of the kernels in ops-transformer `attention/*/op_kernel`:
scores, maximum and sum in fp32; exp(score - maximum) is rounded to the dtype of the operands, multiplied with the values in fp32, and
divided by the sum at the end. A key that a mask hides has the lowest fp32 score, so that a row hidden as a whole averages its keys; a key
that a sparse mode leaves out is not computed, so that a row without keys is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import check

LOWEST = torch.finfo(torch.float32).min
HIGHEST = torch.finfo(torch.float32).max
ALL_TOKENS = 2**31 - 1  # pre_tokens and next_tokens of this value limit nothing

# -------------------------------------------------------------------- layouts


class Sizes(NamedTuple):
    """Batch, heads, tokens and head dimension of an operand; the batch of a packed layout is 1, its tokens are all of them."""

    batch: int
    heads: int
    tokens: int
    width: int


def is_packed(layout: str) -> bool:
    """Whether sequences lie one after another in one dimension of tokens."""
    return "T" in layout


def sizes_in(layout: str, tensor: Tensor, heads: int) -> Sizes:
    """Sizes of an operand; accepts symbolic ones. `heads` counts where the layout folds them into H."""
    size = dict(zip(layout, tensor.shape, strict=True))
    if "H" in size:
        size["N"], size["D"] = heads, size["H"] // heads
    return Sizes(size.get("B", 1), size["N"], size["T"] if "T" in size else size["S"], size["D"])


def shape_in(layout: str, sizes: Sizes) -> list[int]:
    """The shape of an operand with these sizes in a layout."""
    batch, heads, tokens, width = sizes
    size = {"B": batch, "N": heads, "S": tokens, "T": tokens, "D": width, "H": heads * width}
    return [size[dim] for dim in layout]


def to_bnsd(op: str, name: str, tensor: Tensor, layout: str, heads: int) -> Tensor:
    """View an operand as [B, N, S, D]; a packed one has batch 1."""
    check(op, tensor.dim() == len(layout), f"{name} must have {len(layout)} dimensions ({layout}), not {tensor.dim()}")
    if layout.endswith("H"):
        width = tensor.shape[-1]
        check(op, width % heads == 0, f"the last dimension of {name}, {width}, is not a multiple of its {heads} heads")
        tensor, layout = tensor.unflatten(-1, (heads, width // heads)), f"{layout[:-1]}ND"
    if "B" not in layout:
        tensor, layout = tensor.unsqueeze(0), f"B{layout}"
    layout = layout.replace("T", "S")
    tensor = tensor.permute([layout.index(dim) for dim in "BNSD"])
    check(op, tensor.shape[1] == heads, f"{name} has {tensor.shape[1]} heads, but the arguments say {heads}")
    return tensor


def from_bnsd(tensor: Tensor, layout: str) -> Tensor:
    """Lay [B, N, S, D] out, contiguous; a packed layout takes batch 1."""
    shape = shape_in(layout, Sizes(*tensor.shape))
    dims = layout.replace("H", "ND").replace("T", "S")
    names = "BNSD" if "B" in layout else "NSD"
    if names == "NSD":
        tensor = tensor.squeeze(0)
    return tensor.permute([names.index(dim) for dim in dims]).reshape(shape).contiguous()


# -------------------------------------------------------------------- sequences


class Span(NamedTuple):
    """Where one sequence lies: its number, and for queries and keys the row in [B, N, S, D], the first token and the one past the last."""

    number: int
    query_row: int
    query: tuple[int, int]
    key_row: int
    key: tuple[int, int]

    @property
    def lengths(self) -> tuple[int, int]:
        """The number of queries and of keys."""
        return self.query[1] - self.query[0], self.key[1] - self.key[0]


def lengths_of(op: str, name: str, given: Sequence[int] | None, batch: int, longest: int) -> list[int]:
    """The length of each sequence of a padded batch: one for all, or one each; by default the longest."""
    if given is None:
        return [longest] * batch
    check(op, len(given) == 1 or len(given) >= batch, f"{name} must have 1 or {batch} entries (the batch), not {len(given)}")
    lengths = [int(given[0])] * batch if len(given) == 1 else [int(length) for length in given[:batch]]
    check(op, all(0 <= length <= longest for length in lengths), f"{name} must lie within 0 and {longest}, the sequence length: {lengths}")
    return lengths


def segments_of(op: str, name: str, ends: Sequence[int] | None, total: int, most: int, *, whole: bool = True) -> list[tuple[int, int]]:
    """First and one past the last token of each packed sequence, from the cumulative lengths; with `whole` they must cover all tokens."""
    check(op, ends is not None and len(ends) > 0, f"{name} is required with packed tokens: the end of each sequence")
    assert ends is not None
    check(op, len(ends) <= most, f"{name} must have at most {most} entries, not {len(ends)}")
    starts = [0, *(int(end) for end in ends[:-1])]
    segments = list(zip(starts, (int(end) for end in ends), strict=True))
    grows = all(0 <= start <= end for start, end in segments)
    check(op, grows, f"{name} must hold cumulative lengths, which do not decrease, not {list(ends)}")
    last = segments[-1][1]
    check(op, last == total if whole else last <= total, f"the last entry of {name} must be the number of tokens, {total}, not {last}")
    return segments


# -------------------------------------------------------------------- masks

COMPRESSED = 2048
MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)


def outside_band(lengths: tuple[int, int], before: int, after: int, *, bottom_right: bool) -> Tensor | None:
    """Keys more than `before` tokens behind or `after` tokens ahead of their query, as [queries, keys]; None if there are none.

    Query 0 is level with key 0, or with `bottom_right` the last query with the last key.
    """
    queries, keys = lengths
    shift = keys - queries if bottom_right else 0
    if before >= queries - 1 + shift and after >= keys - 1 - shift:
        return None
    ahead = torch.arange(keys) - torch.arange(queries).unsqueeze(1) - shift
    return (ahead > after) | (ahead < -before)


@cache
def _above_diagonal() -> Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)


def check_compressed(op: str, mask: Tensor, sparse_mode: int, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise unless the mask is the compressed one that the causal and band modes read: 1 above the diagonal."""
    shown = " or ".join(str(list(shape)) for shape in shapes)
    check(op, tuple(mask.shape) in shapes, f"atten_mask must have shape {shown} with sparse_mode={sparse_mode}, not {list(mask.shape)}")
    hidden = mask.reshape(-1, COMPRESSED)[:COMPRESSED].bool()
    check(
        op,
        torch.equal(hidden, _above_diagonal()),
        f"atten_mask must be 1 above the diagonal and 0 elsewhere with sparse_mode={sparse_mode}",
    )


# -------------------------------------------------------------------- the attention of one sequence

_SCORES = 2**24  # scores held at a time


class Attended(NamedTuple):
    """What a sequence attends to, in fp32: output [N, Sq, Dv], maximum and sum of the softmax [N, Sq], -inf and 0 in a row without keys."""

    output: Tensor
    maximum: Tensor
    total: Tensor


class Bias(NamedTuple):
    """Added to the scores, [1 or N, 1 or Sq, Sk]: before the scale multiplies them, or after."""

    value: Tensor
    before_scale: bool = False


class Masks(NamedTuple):
    """What queries do not see: keys hidden by a mask, [1 or N, Sq, Sk], and keys not computed, [Sq, Sk].

    A row that the mask hides as a whole is zero with `strict`.
    """

    hidden: Tensor | None = None
    outside: Tensor | None = None
    strict: bool = False


NO_MASKS = Masks()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    bias: Bias | None = None,
    masks: Masks = NO_MASKS,
    sink: Tensor | None = None,
    dropout: Tensor | None = None,
) -> Attended:
    """Attention of one sequence.

    Args:
        query: [N, Sq, D].
        key: [Nkv, Sk, D]; N is a multiple of Nkv.
        value: [Nkv, Sk, Dv].
        scale: multiplies the scores.
        bias: added to the scores.
        masks: what queries do not see.
        sink: [N], a score that takes part in the sum of the softmax and in nothing else.
        dropout: [N, Sq, Sk], multiplies the weights, not their sum.
    """
    kv_heads = key.shape[0]
    group = query.shape[0] // kv_heads
    step = max(1, _SCORES // max(1, group * query.shape[1] * key.shape[1]))
    parts = []
    for first in range(0, kv_heads, step):
        kv = slice(first, first + step)
        heads = slice(first * group, (first + step) * group)
        parts.append(
            _attend_heads(
                query[heads],
                key[kv],
                value[kv],
                scale,
                bias._replace(value=_of_heads(bias.value, heads)) if bias else None,
                masks._replace(hidden=_of_heads(masks.hidden, heads)) if masks.hidden is not None else masks,
                sink[heads] if sink is not None else None,
                dropout[heads] if dropout is not None else None,
            )
        )
    return Attended(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _of_heads(tensor: Tensor, heads: slice) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor[heads]


def _scores(query: Tensor, key: Tensor, scale: float, bias: Bias | None, masks: Masks) -> Tensor:
    rows = query.float().reshape(key.shape[0], -1, query.shape[-1])
    scores = (rows @ key.float().mT).view(query.shape[0], query.shape[1], key.shape[1])
    if bias is not None and bias.before_scale:
        scores = (scores + bias.value.float()) * scale
    else:
        scores = scores * scale
        scores = scores + bias.value.float() if bias is not None else scores
    if masks.hidden is not None:
        scores = scores.masked_fill(masks.hidden, LOWEST)
    if masks.outside is not None:
        scores = scores.masked_fill(masks.outside, -torch.inf)
    return scores


def _attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Bias | None,
    masks: Masks,
    sink: Tensor | None,
    dropout: Tensor | None,
) -> Attended:
    heads, queries, _ = query.shape
    if key.shape[1] == 0 or queries == 0:
        nothing = query.new_zeros(heads, queries, dtype=torch.float32)
        return Attended(nothing.new_zeros(heads, queries, value.shape[-1]), nothing - torch.inf, nothing)
    scores = _scores(query, key, scale, bias, masks)
    maximum = scores.amax(-1)
    empty = maximum <= LOWEST if masks.strict else maximum == -torch.inf
    weights = (scores - maximum.masked_fill(empty, 0).unsqueeze(-1)).exp_()
    weights = weights.masked_fill(empty.unsqueeze(-1), 0) if masks.strict else weights
    maximum = maximum.masked_fill(empty, -torch.inf)
    total = weights.sum(-1)
    if sink is not None:
        total = total + (sink.float().unsqueeze(-1) - maximum).exp().masked_fill(empty, 0)
    if dropout is not None:
        weights = weights * dropout
    rows = weights.to(query.dtype).float().reshape(key.shape[0], -1, key.shape[1])
    output = (rows @ value.float()).view(heads, queries, value.shape[-1])
    return Attended(output / total.masked_fill(empty, 1).unsqueeze(-1), maximum, total)
