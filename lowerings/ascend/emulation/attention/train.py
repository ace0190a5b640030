"""Attention of training, which the versions of npu_fusion_attention share. It returns the statistics of its softmax, too.

Source: op-plugin docs and adapters (`FlashAttention*KernelNpuOpApi.cpp`), ops-transformer `attention/flash_attention_score`.

A row without keys is 0, with the lowest fp32 value as maximum and the highest as sum, as the kernel writes them. There is no random
generator of an NPU here: without a dropout mask `keep_prob` must be 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..registry import FLOATS, check, check_dtype, check_same_dtype
from .core import (
    ALL_TOKENS,
    COMPRESSED,
    HIGHEST,
    LOWEST,
    Attended,
    Bias,
    Masks,
    Sizes,
    Span,
    attend,
    check_compressed,
    from_bnsd,
    is_packed,
    outside_band,
    segments_of,
    sizes_in,
    to_bnsd,
)

LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
STATISTICS = 8  # times that maximum and sum of a row are repeated
_MOST_SEQUENCES, _MOST_HEADS, _WIDEST, _MOST_PREFIXES = 2048, 256, 768, 32
_PREFIX_ROWS = 1024  # of the compressed mask of a prefix, below its causal part
_ALIBI = 1024  # rows of a compressed position bias

_ROPE_WIDTHS = (128, 64)  # head dimensions of query and query_rope


@dataclass(frozen=True)
class FusionAttention:
    """The arguments of npu_fusion_attention that change its results, of any version."""

    op: str
    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    layout: str
    pse: Tensor | None
    mask: Tensor | None
    scale: float
    keep_prob: float
    pre_tokens: int
    next_tokens: int
    inner_precise: int
    prefix: Sequence[int] | None
    query_lengths: Sequence[int] | None
    key_lengths: Sequence[int] | None
    sparse_mode: int
    softmax_layout: str
    sink: Tensor | None
    dropout_mask: Tensor | None = None
    pse_type: int = 1
    starts: tuple[int, int] = (0, 0)
    query_rope: Tensor | None = None
    key_rope: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, maximum and sum of the softmax, each repeated 8 times, and an empty tensor.

        Raises:
            EmulationError: the operator does not allow these arguments.
        """
        self._check()
        query, key, value = self._operands
        output = query.new_zeros((*query.shape[:3], value.shape[-1]), dtype=torch.float32)
        maximum, total = torch.zeros(query.shape[:3]), torch.zeros(query.shape[:3])
        for span in self._spans:
            rows, keys = slice(*span.query), slice(*span.key)
            attended = self._attend(span, query[span.query_row, :, rows], key[span.key_row, :, keys], value[span.key_row, :, keys])
            output[span.query_row, :, rows] = attended.output
            maximum[span.query_row, :, rows] = attended.maximum
            total[span.query_row, :, rows] = attended.total
        result = from_bnsd(output.to(query.dtype), self.layout)
        return result, self._statistics(maximum), self._statistics(total), query.new_empty(0)

    def _attend(self, span: Span, query: Tensor, key: Tensor, value: Tensor) -> Attended:
        attended = attend(
            query,
            key,
            value,
            self.scale,
            bias=self._bias(span),
            masks=self._masks(span),
            sink=self.sink,
            dropout=self._dropout(span),
        )
        empty = attended.maximum == -torch.inf  # what the kernel writes in a row without keys
        return attended._replace(maximum=attended.maximum.masked_fill(empty, LOWEST), total=attended.total.masked_fill(empty, HIGHEST))

    def _statistics(self, rows: Tensor) -> Tensor:
        """Maximum or sum [B, N, S] as the operator returns it; packed tokens are laid out sequence by sequence, each [N, S], by default."""
        repeated = rows.unsqueeze(-1).expand(*rows.shape, STATISTICS)
        if not self.packed:
            return repeated.contiguous()
        if self.softmax_layout == "TND":
            return from_bnsd(repeated, "TND")
        flat = rows.new_zeros(repeated.numel())
        for span in self._spans:
            part = repeated[0, :, slice(*span.query)].reshape(-1)
            first = span.query[0] * rows.shape[1] * STATISTICS
            flat[first : first + part.numel()] = part
        return flat.view(rows.shape[2], rows.shape[1], STATISTICS)

    # -------------------------------------------------------------------- sizes and sequences

    @property
    def packed(self) -> bool:
        """Whether the tokens of all sequences lie one after another."""
        return is_packed(self.layout)

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of the query."""
        dims = len(self.layout)
        check(self.op, self.query.dim() == dims, f"query must have {dims} dimensions ({self.layout}), not {self.query.dim()}")
        return sizes_in(self.layout, self.query, self.heads)

    @cached_property
    def _operands(self) -> tuple[Tensor, Tensor, Tensor]:
        query = to_bnsd(self.op, "query", self.query, self.layout, self.heads)
        kv_heads = kv_heads_of(self.layout, self.key, self.sizes)
        divides = kv_heads > 0 and self.heads % kv_heads == 0
        check(self.op, divides, f"head_num={self.heads} must be a multiple of the {kv_heads} heads of key")
        key = to_bnsd(self.op, "key", self.key, self.layout, kv_heads)
        if self.query_rope is not None and self.key_rope is not None:
            query = torch.cat((query, to_bnsd(self.op, "query_rope", self.query_rope, self.layout, self.heads)), dim=-1)
            key = torch.cat((key, to_bnsd(self.op, "key_rope", self.key_rope, self.layout, kv_heads)), dim=-1)
        return query, key, to_bnsd(self.op, "value", self.value, self.layout, kv_heads)

    @cached_property
    def _spans(self) -> list[Span]:
        keys = self._operands[1].shape[2]
        if not self.packed:
            return [Span(b, b, (0, self.sizes.tokens), b, (0, keys)) for b in range(self.sizes.batch)]
        lengths = self.query_lengths, self.key_lengths
        given = lengths[0] is not None and lengths[1] is not None and len(lengths[0]) == len(lengths[1]) > 0
        check(self.op, given, "the size of actual_seq_qlen and actual_seq_kvlen must be the same and cannot be empty with TND")
        queries, keys_of = (
            segments_of(self.op, name, _without_trailing_zeros(ends), total, _MOST_SEQUENCES, whole=False)
            for name, ends, total in zip(("actual_seq_qlen", "actual_seq_kvlen"), lengths, (self.sizes.tokens, keys), strict=True)
        )
        return [Span(b, 0, q, 0, k) for b, (q, k) in enumerate(zip(queries, keys_of, strict=False))]

    # -------------------------------------------------------------------- masks

    def _masks(self, span: Span) -> Masks:
        if self.mask is None:
            return Masks()
        strict = self.inner_precise == 2
        if self.sparse_mode in (2, 3, 4, 6, 7, 8):
            return Masks(outside=self._outside(span))
        mask = self._mask_of(span)
        outside = self._outside(span) if self.sparse_mode in (0, 5) else None
        return Masks(mask != 0, outside, strict)

    def _mask_of(self, span: Span) -> Tensor:
        """The part of a mask that is not compressed for a sequence, [1 or N, Sq, Sk]."""
        assert self.mask is not None
        queries, keys = span.lengths
        if self.mask.dim() == 4:
            return self.mask[span.number if self.mask.shape[0] > 1 else 0]
        if self.packed and tuple(self.mask.shape) == (self.sizes.tokens, self._operands[1].shape[2]):
            return self.mask[None, slice(*span.query), slice(*span.key)]
        return self.mask[None, :queries, :keys]

    def _outside(self, span: Span) -> Tensor | None:
        lengths, mode = span.lengths, self.sparse_mode
        if mode == 0:
            return outside_band(lengths, self.pre_tokens, self.next_tokens, bottom_right=False)
        if mode == 4 or span.number == self._band:
            return outside_band(lengths, self.pre_tokens, self.next_tokens, bottom_right=True)
        causal = outside_band(lengths, ALL_TOKENS, 0, bottom_right=mode not in (2, 8))
        if mode not in (5, 6) or causal is None:
            return causal
        assert self.prefix is not None
        return causal & (torch.arange(lengths[1]) >= int(self.prefix[span.number]))

    @cached_property
    def _band(self) -> int | None:
        """The sequence whose mask is a band in the modes of a split sequence: the last one of mode 7, the first one of mode 8."""
        if self.sparse_mode not in (7, 8):
            return None
        numbers = [span.number for span in self._spans if min(span.lengths) > 0]
        return (numbers[-1] if self.sparse_mode == 7 else numbers[0]) if numbers else None

    # -------------------------------------------------------------------- position bias and dropout

    def _bias(self, span: Span) -> Bias | None:
        if self.pse is None:
            return None
        queries, keys = span.lengths
        if self.pse_type >= 2:
            distance = (torch.arange(keys) + self.starts[1] - torch.arange(queries).unsqueeze(1) - self.starts[0]).abs().float()
            slopes = self.pse if self.pse.dim() == 1 else self.pse[span.number]
            return Bias(-slopes.view(-1, 1, 1) * (distance.sqrt() if self.pse_type == 3 else distance))
        return Bias(self._bias_of(span), before_scale=self.pse_type == 1)

    def _bias_of(self, span: Span) -> Tensor:
        assert self.pse is not None
        if not self.packed:
            return self.pse[span.number if self.pse.shape[0] > 1 else 0]
        queries, keys = span.lengths
        products, ends = [s.lengths[0] * s.lengths[1] for s in self._spans], [s.lengths[1] for s in self._spans]
        flat, sizes, rows = (self.pse.reshape(-1), products, queries) if self._full_bias else (self.pse.reshape(-1), ends, 1)
        first = self.heads * sum(sizes[: span.number])
        return flat[first : first + self.heads * rows * keys].view(self.heads, rows, keys)

    @cached_property
    def _full_bias(self) -> bool:
        """Whether the bias of packed tokens has a row for each query; otherwise it has one row for all."""
        assert self.pse is not None
        counts = [sum(s.lengths[1] for s in self._spans), sum(s.lengths[0] * s.lengths[1] for s in self._spans)]
        sizes = [self.heads * count for count in counts]
        fits = self.pse.numel() in sizes
        check(self.op, fits, f"pse must have {sizes[0]} or {sizes[1]} elements with TND, not {self.pse.numel()}")
        return self.pse.numel() == sizes[1]

    def _dropout(self, span: Span) -> Tensor | None:
        """1 / keep_prob where the dropout mask, one bit for each score in order, has a 1."""
        if self.dropout_mask is None or self.keep_prob == 1:
            return None
        queries, keys = span.lengths
        first = self.heads * sum(s.lengths[0] * s.lengths[1] for s in self._spans[: span.number])
        bits = self._bits[first : first + self.heads * queries * keys]
        return bits.view(self.heads, queries, keys).float() / self.keep_prob

    @cached_property
    def _bits(self) -> Tensor:
        assert self.dropout_mask is not None
        bits = (self.dropout_mask.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1
        check(self.op, bits.numel() >= self.scores, f"dropout_mask must have at least {self.scores} bits, not {bits.numel()}")
        return bits.reshape(-1)

    @cached_property
    def scores(self) -> int:
        """The number of scores of all heads and sequences."""
        return self.heads * sum(span.lengths[0] * span.lengths[1] for span in self._spans)

    # -------------------------------------------------------------------- checks

    def _check(self) -> None:
        op, sizes = self.op, self.sizes
        check_dtype(op, "query", self.query, *FLOATS)
        check_same_dtype(op, query=self.query, key=self.key, value=self.value)
        check(op, sizes.heads == self.heads, f"query has {sizes.heads} heads, but head_num is {self.heads}")
        check(op, 0 < sizes.width <= _WIDEST, f"the head dimension must be within 1 and {_WIDEST}, not {sizes.width}")
        self._check_rope()
        query, key, value = self._operands
        check(op, self.heads <= _MOST_HEADS, f"head_num must be at most {_MOST_HEADS}, not {self.heads}")
        widths = query.shape[-1], key.shape[-1], value.shape[-1]
        check(op, widths[0] == widths[1] >= widths[2], f"head dimensions must be Dq = Dk >= Dv, not {widths}")
        shapes = f"key and value must have one shape, not {list(self.key.shape)} and {list(self.value.shape)}"
        check(op, key.shape[:3] == value.shape[:3], shapes)
        check(op, query.shape[0] == key.shape[0], f"query and key must have one batch, not {query.shape[0]} and {key.shape[0]}")
        check(op, self.inner_precise in (0, 1, 2), f"inner_precise must be 0, 1 or 2, not {self.inner_precise}")
        self._check_sparse_mode()
        self._check_mask()
        self._check_bias()
        self._check_dropout()
        if self.sink is not None:
            check_dtype(op, "sink", self.sink, torch.float32)
            check(op, self.sink.shape == (self.heads,), f"sink must have shape [{self.heads}], not {list(self.sink.shape)}")
        check(op, self.softmax_layout in ("", "TND"), f"softmax_layout must be TND or empty, not {self.softmax_layout!r}")
        check(op, self.softmax_layout == "" or self.packed, "softmax_layout=TND is only supported with input_layout=TND")
        lengths = self.query_lengths is None and self.key_lengths is None
        check(op, self.packed or lengths, "actual_seq_qlen and actual_seq_kvlen are only supported with input_layout=TND")

    def _check_rope(self) -> None:
        op = self.op
        check(op, (self.query_rope is None) == (self.key_rope is None), "query_rope and key_rope must be given together")
        if self.query_rope is None or self.key_rope is None:
            return
        check(op, self.packed, f"query_rope is only supported with input_layout=TND, not {self.layout}")
        check_same_dtype(op, query=self.query, query_rope=self.query_rope, key_rope=self.key_rope)
        for name, tensor, rope in (("query", self.query, self.query_rope), ("key", self.key, self.key_rope)):
            check(op, rope.shape[:-1] == tensor.shape[:-1], f"{name}_rope must have the tokens and heads of {name}")
            widths = tensor.shape[-1], rope.shape[-1]
            check(op, widths == _ROPE_WIDTHS, f"head dimensions of {name} and {name}_rope must be {_ROPE_WIDTHS}, not {widths}")

    def _check_sparse_mode(self) -> None:
        op, mode = self.op, self.sparse_mode
        allowed = (0, 1, 2, 3, 4, 6, 7, 8) if self.packed else (0, 1, 2, 3, 4, 5, 6)
        check(op, mode in allowed, f"sparse_mode must be one of {', '.join(map(str, allowed))}, not {mode}")
        check(op, (self.prefix is not None) == (mode in (5, 6)), f"prefix goes with sparse_mode 5 and 6, and they with it, not {mode}")
        if self.prefix is not None:
            check(op, self.mask is not None, "prefix needs atten_mask")
            fits = len(self.prefix) == len(self._spans) <= _MOST_PREFIXES
            check(op, fits, f"prefix must have an entry for each of at most {_MOST_PREFIXES} sequences, not {len(self.prefix)}")
            for span, length in zip(self._spans, self.prefix, strict=True):
                queries, keys = span.lengths
                least = max(keys - queries, 0)
                check(op, least <= length <= keys, f"prefix of sequence {span.number} must be within {least} and {keys}, not {length}")
        if self.mask is None:
            return
        if mode in (0, 4):
            check(op, self.pre_tokens + self.next_tokens >= 0, "pre and next tokens must not have a negative sum")
        check(op, mode not in (7, 8) or self.pse is None, f"pse is not supported with sparse_mode={mode}")
        if self.packed and mode in (3, 7):
            for span in self._spans:
                queries, keys = span.lengths
                fewer = f"sequence {span.number} has {queries} queries but {keys} keys; sparse_mode={mode} needs as many"
                check(op, queries <= keys, fewer)

    def _check_mask(self) -> None:
        if self.mask is None:
            return
        op, shape = self.op, tuple(self.mask.shape)
        check_dtype(op, "atten_mask", self.mask, torch.bool, torch.uint8)
        if self.sparse_mode in (2, 3, 4, 7, 8):
            check_compressed(op, self.mask, self.sparse_mode, ((COMPRESSED, COMPRESSED),))
            return
        if self.sparse_mode == 6:
            check_compressed(op, self.mask, self.sparse_mode, ((COMPRESSED + _PREFIX_ROWS, COMPRESSED),))
            rows = self.mask[COMPRESSED:] != 0
            half = COMPRESSED // 2
            right = not bool(rows[:, :half].any()) and bool(rows[:, half:].all())
            check(op, right, "the last 1024 rows of atten_mask must be 0 on the left and 1 on the right half with sparse_mode=6")
            return
        batch, tokens, keys = self.sizes.batch, self.sizes.tokens, self._operands[1].shape[2]
        if self.packed:
            longest = tuple(max(span.lengths[i] for span in self._spans) for i in range(2))
            shapes: list[tuple[int, ...]] = [longest, (tokens, keys)]
        else:
            shapes = [(tokens, keys), (1, 1, tokens, keys), (batch, 1, tokens, keys), (batch, self.heads, tokens, keys)]
        shown = " or ".join(str(list(allowed)) for allowed in shapes)
        check(op, shape in shapes, f"atten_mask must have shape {shown}, not {list(shape)}")

    def _check_bias(self) -> None:
        op = self.op
        check(op, self.pse_type in (0, 1, 2, 3), f"pse_type must be 0, 1, 2 or 3, not {self.pse_type}")
        check(op, self.pse is not None or self.pse_type == 1, f"pse_type={self.pse_type} needs pse")
        check(op, self.pse_type >= 2 or self.starts == (0, 0), "q_start_idx and kv_start_idx need pse_type 2 or 3")
        if self.pse is None:
            return
        batch, tokens, keys = len(self._spans), self.sizes.tokens, self._operands[1].shape[2]
        shape = tuple(self.pse.shape)
        if self.pse_type >= 2:
            check_dtype(op, "pse", self.pse, torch.float32)
            fits = shape in ((self.heads,), (batch, self.heads), (1, self.heads))
            check(
                op, fits, f"pse must have shape [{self.heads}] or [{batch}, {self.heads}] with pse_type={self.pse_type}, not {list(shape)}"
            )
            same = all(span.lengths[0] == span.lengths[1] for span in self._spans)
            check(op, same, f"pse_type={self.pse_type} needs as many queries as keys")
            return
        check_same_dtype(op, query=self.query, pse=self.pse)
        compressed = len(shape) == 4 and shape[2] == _ALIBI != tokens
        check(op, not compressed, "the CPU kernel does not support pse of 1024 rows for more queries; give all rows")
        if self.packed:
            assert self._full_bias is not None
            return
        fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] == self.heads and shape[2] in (1, tokens) and shape[3] == keys
        check(op, fits, f"pse must have shape [1 or {batch}, {self.heads}, 1 or {tokens}, {keys}], not {list(shape)}")

    def _check_dropout(self) -> None:
        op = self.op
        check(op, 0 < self.keep_prob <= 1, f"The keep_prob value must be in range of (0, 1], but got {self.keep_prob}")
        if self.dropout_mask is not None:
            check_dtype(op, "dropout_mask", self.dropout_mask, torch.uint8)
            check(op, self.keep_prob < 1, "dropout_mask needs a keep_prob below 1")
        random = self.keep_prob < 1 and self.dropout_mask is None
        check(op, not random, "the CPU kernel has no random generator of an NPU: keep_prob must be 1 without dropout_mask")


def _without_trailing_zeros(ends: Sequence[int] | None) -> list[int]:
    """Sequences at the end of the list take no part if their cumulative length is 0."""
    kept = [int(end) for end in ends or ()]
    while len(kept) > 1 and kept[-1] == 0:
        kept.pop()
    return kept


def kv_heads_of(layout: str, key: Tensor, sizes: Sizes) -> int:
    """Heads of key and value: those of its layout, or as many as its H holds of the query's head dimension."""
    if layout.endswith("H"):
        return key.shape[-1] // sizes.width
    return key.shape[layout.index("N")]
