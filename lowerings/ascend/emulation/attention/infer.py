"""Inference attention, which npu_fused_infer_attention_score (FIA), npu_prompt_flash_attention and npu_incre_flash_attention share.

Source: op-plugin docs of these ops; where they leave a limit open, the checks of ops-transformer `attention/*/op_host/*tiling*`. Limits of
one chip alone, and those that newer versions of CANN lifted, are left to the op table.

A query of one token is decoded: mask and KV lengths count; the length of queries, sparse modes and token windows do not. A window that
would have hidden a key is therefore refused. What the operator leaves undefined, a row that the mask hides as a whole with inner_precise 0
or 1, averages the values of its keys. The other bit of inner_precise trades precision for speed; the CPU kernel is always precise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import check, check_dtype, check_same_dtype
from .core import (
    ALL_TOKENS,
    COMPRESSED,
    MASK_DTYPES,
    Bias,
    Masks,
    Sizes,
    Span,
    attend,
    check_compressed,
    is_packed,
    lengths_of,
    outside_band,
    segments_of,
    sizes_in,
    to_bnsd,
)
from .key_value import Paging, Scales, check_paging, dequantise, gather_pages, unpack_int4

_DECODE_LAYOUTS = ("BSH", "BSND", "BNSD", "NSD")
_LATENT, _ROPE = 512, 64
_MOST_SEQUENCES = 4096
SPARSE_MODES, TREE = (0, 1, 2, 3, 4), 9
_MOST_HEADS, _WIDEST, _MOST_BATCHES = 256, 512, 65536
_PACKED_WIDTHS = ((64, 64), (128, 128), (192, 128), (192, 192))
_COMPRESSED_SHAPES = ((COMPRESSED, COMPRESSED), (1, COMPRESSED, COMPRESSED), (1, 1, COMPRESSED, COMPRESSED))


class Names(NamedTuple):
    """What the operator calls the arguments that messages name."""

    heads: str
    kv_heads: str
    query_lengths: str
    key_lengths: str


class Prefix(NamedTuple):
    """Keys and values that come before those of every sequence, in the layout of key and value with batch 1, and how many count."""

    key: Tensor
    value: Tensor
    length: int | None


class Paddings(NamedTuple):
    """How far the last token of a sequence lies from the end of its row; None where padding is at the end."""

    query: int | None = None
    key: int | None = None


NO_PADDINGS = Paddings()


@dataclass(frozen=True)
class Inference:
    """The arguments of inference attention, under one name each."""

    op: str
    names: Names
    query: Tensor
    key: Tensor
    value: Tensor
    layout: str
    output_layout: str
    heads: int
    kv_heads: int
    scale: float
    query_lengths: Sequence[int] | None = None
    key_lengths: Sequence[int] | None = None
    pse: Tensor | None = None
    mask: Tensor | None = None
    sparse_mode: int = 0
    pre_tokens: int = ALL_TOKENS
    next_tokens: int = ALL_TOKENS
    inner_precise: int = 0
    paging: Paging | None = None
    key_scales: Scales | None = None
    value_scales: Scales | None = None
    query_rope: Tensor | None = None
    key_rope: Tensor | None = None
    prefix: Prefix | None = None
    paddings: Paddings = NO_PADDINGS
    sink: Tensor | None = None
    prompt: bool = False  # the prefill branch, whatever the number of queries
    sparse_modes: tuple[int, ...] = SPARSE_MODES

    def run(self) -> tuple[Tensor, Tensor]:
        """Output [B, N, S, Dv] in fp32 and log-sum-exp [B, N, S] in fp32; a row without keys has 0 and +inf.

        Raises:
            EmulationError: the operator does not allow these arguments.
        """
        self._check()
        query, key, value = self._operands()
        output = query.new_zeros((*query.shape[:3], value.shape[-1]), dtype=torch.float32)
        lse = torch.full(query.shape[:3], torch.inf)
        for span in self._spans:
            rows, keys = slice(*span.query), slice(*span.key)
            k, v = key[span.key_row, :, keys], value[span.key_row, :, keys]
            if self.prefix is not None:
                k, v = (torch.cat((part, own), dim=1) for part, own in zip(self._prefix_operands, (k, v), strict=True))
            masks, bias = self._masks(span), self._bias(span)
            attended = attend(query[span.query_row, :, rows], k, v, self.scale, bias=bias, masks=masks, sink=self.sink)
            output[span.query_row, :, rows] = attended.output
            empty = attended.maximum == -torch.inf
            lse[span.query_row, :, rows] = (attended.maximum + attended.total.log()).masked_fill(empty, torch.inf)
        return output, lse

    # -------------------------------------------------------------------- sizes

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of the query."""
        dims = len(self.layout)
        check(self.op, self.query.dim() == dims, f"query must have {dims} dimensions ({self.layout}), not {self.query.dim()}")
        return sizes_in(self.layout, self.query, self.heads)

    @property
    def packed(self) -> bool:
        """Whether the tokens of all sequences lie one after another."""
        return is_packed(self.layout)

    @cached_property
    def decodes(self) -> bool:
        """Whether the operator takes the decode branch: sequences of one query."""
        return not self.prompt and not self.packed and self.sizes.tokens == 1 and self.layout in _DECODE_LAYOUTS

    @cached_property
    def batch(self) -> int:
        """The number of sequences."""
        if not self.packed:
            return self.sizes.batch
        return len(self._query_segments)

    @cached_property
    def prefix_length(self) -> int:
        """The number of keys of the shared prefix."""
        if self.prefix is None:
            return 0
        longest = self._prefix_operands[0].shape[1]
        length = self.prefix.length
        check(self.op, length is None or 0 <= length <= longest, f"actual_shared_prefix_len must be within 0 and {longest}, not {length}")
        return longest if length is None else length

    # -------------------------------------------------------------------- operands

    def _operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as [B, N, S, D]; the rope parts of query and key are appended to their heads."""
        query = to_bnsd(self.op, "query", self.query, self.layout, self.heads)
        key, value = self._keys
        if self.query_rope is not None and self.key_rope is not None:
            rope = to_bnsd(self.op, "query_rope", self.query_rope, self.layout, self.heads)
            query = torch.cat((query, rope), dim=-1)
            key = torch.cat((key, self._laid_out("key_rope", self.key_rope)), dim=-1)
        return query, key, value

    @cached_property
    def _keys(self) -> tuple[Tensor, Tensor]:
        return self._in_floats("key", self.key, self.key_scales), self._in_floats("value", self.value, self.value_scales)

    def _in_floats(self, name: str, tensor: Tensor, scales: Scales | None) -> Tensor:
        if scales is None:
            return self._laid_out(name, tensor)
        laid_out = self._laid_out(name, unpack_int4(tensor) if tensor.dtype == torch.int32 else tensor)
        lengths = self._paged_lengths if self.paging is not None else ()
        return dequantise(self.op, laid_out, scales, self.query.dtype, self.paging, lengths)

    def _laid_out(self, name: str, tensor: Tensor) -> Tensor:
        if self.paging is None:
            return to_bnsd(self.op, name, tensor, self.layout, self.kv_heads)
        return gather_pages(self.op, name, tensor, self.kv_heads, self.paging, self._paged_lengths)

    @cached_property
    def _prefix_operands(self) -> tuple[Tensor, Tensor]:
        """Key and value of the shared prefix as [Nkv, tokens, D]."""
        assert self.prefix is not None
        parts = []
        given = (("key_shared_prefix", self.prefix.key, self.key_scales), ("value_shared_prefix", self.prefix.value, self.value_scales))
        for name, tensor, scales in given:
            check(self.op, scales is None, f"the CPU kernel does not support {name} beside integer keys and values")
            part = to_bnsd(self.op, name, tensor, self.layout, self.kv_heads)
            check(self.op, part.shape[0] == 1, f"{name} must have batch 1, not {part.shape[0]}")
            check(self.op, part.shape[-1] == self._keys[0].shape[-1], f"{name} must have the head dimension of key")
            parts.append(part[0, :, : self.prefix.length])
        check(self.op, parts[0].shape == parts[1].shape, "key_shared_prefix and value_shared_prefix must have one shape")
        return parts[0], parts[1]

    # -------------------------------------------------------------------- sequences

    @cached_property
    def _query_segments(self) -> list[tuple[int, int]]:
        return segments_of(self.op, self.names.query_lengths, self.query_lengths, self.sizes.tokens, _MOST_SEQUENCES)

    @cached_property
    def _paged_lengths(self) -> list[int]:
        """KV length of each sequence of a paged cache."""
        assert self.paging is not None
        check(self.op, self.key_lengths is not None, f"{self.names.key_lengths} is required with block_table")
        check_paging(self.op, self.paging, self.batch, *self._block_limits)
        return lengths_of(self.op, self.names.key_lengths, self.key_lengths, self.batch, self.paging.capacity)

    @property
    def _block_limits(self) -> tuple[int, int]:
        """What a block size must be a multiple of, and its maximum."""
        if self.packed or self.query_rope is not None:
            return 16, 1024
        if self.decodes:
            return (32 if self.key.dtype == torch.int8 else 16), 512
        return 128, 512

    @cached_property
    def _spans(self) -> list[Span]:
        if self.packed:
            queries = self._query_segments
            if self.paging is not None:
                return [Span(b, 0, q, b, (0, length)) for b, (q, length) in enumerate(zip(queries, self._paged_lengths, strict=True))]
            keys = segments_of(self.op, self.names.key_lengths, self.key_lengths, self._keys[0].shape[2], _MOST_SEQUENCES)
            one_each = f"{self.names.query_lengths} and {self.names.key_lengths} must have as many entries"
            check(self.op, len(queries) == len(keys), one_each)
            return [Span(b, 0, q, 0, k) for b, (q, k) in enumerate(zip(queries, keys, strict=True))]
        tokens = self.sizes.tokens
        queries = self._padded(self.names.query_lengths, None if self.decodes else self.query_lengths, tokens, self.paddings.query)
        if self.paging is not None:
            keys = [(0, length) for length in self._paged_lengths]
        else:
            keys = self._padded(self.names.key_lengths, self.key_lengths, self._keys[0].shape[2], self.paddings.key)
        return [Span(b, b, q, b, k) for b, (q, k) in enumerate(zip(queries, keys, strict=True))]

    def _padded(self, name: str, given: Sequence[int] | None, longest: int, padding: int | None) -> list[tuple[int, int]]:
        """First and one past the last token of the sequences of a padded batch."""
        lengths = lengths_of(self.op, name, given, self.sizes.batch, longest)
        if padding is None:
            return [(0, length) for length in lengths]
        end = longest - max(padding, 0)
        if self.decodes:  # a sequence that begins before its row has no keys
            return [(end - length, end) if end >= length else (0, 0) for length in lengths]
        check(self.op, all(length <= end for length in lengths), f"a padding of {padding} leaves {end} tokens for {name}: {lengths}")
        return [(end - length, end) for length in lengths]

    # -------------------------------------------------------------------- masks

    def _masks(self, span: Span) -> Masks:
        queries, keys = span.lengths
        lengths = queries, keys + self.prefix_length
        strict = self.inner_precise >= 2
        if self.mask is None:
            return Masks()
        if self.sparse_mode == TREE:
            return Masks(self._tree(span))
        if self.sparse_mode >= 2:
            return Masks(outside=self._outside(lengths))
        hidden = self._columns(self._full_mask[span.number if self._full_mask.shape[0] > 1 else 0], span) != 0
        outside = None
        if self.sparse_mode == 0 and not self.decodes and self.paddings == NO_PADDINGS:
            outside = outside_band(lengths, self.pre_tokens, self.next_tokens, bottom_right=False)
        return Masks(hidden, outside, strict)

    def _tree(self, span: Span) -> Tensor:
        """What a tree mask hides: it says which of the last keys, as many as there are queries, each query sees."""
        assert self.mask is not None
        queries, keys = span.lengths
        if self.packed:
            first = sum(earlier.lengths[0] ** 2 for earlier in self._spans[: span.number])
            tree = self.mask[first : first + queries**2].view(queries, queries)
        else:
            tree = self.mask[span.number, :queries, :queries]
        return torch.cat((tree.new_zeros(queries, keys - queries), tree), dim=-1).unsqueeze(0) != 0

    def _outside(self, lengths: tuple[int, int]) -> Tensor | None:
        """The keys that a causal or band mode leaves out."""
        before, after = (self.pre_tokens, self.next_tokens) if self.sparse_mode == 4 else (ALL_TOKENS, 0)
        outside = outside_band(lengths, before, after, bottom_right=self.sparse_mode > 2)
        if self.decodes and self.query_rope is None:
            ignored = f"sparse_mode={self.sparse_mode} would hide keys of a query of one token, where the operator ignores it; pass a mask"
            check(self.op, outside is None or not bool(outside.any()), ignored)
        return outside

    def _bias(self, span: Span) -> Bias | None:
        if self.pse is None:
            return None
        return Bias(self._columns(self.pse[span.number if self.pse.shape[0] > 1 else 0], span))

    def _columns(self, table: Tensor, span: Span) -> Tensor:
        """The part of a table [1 or N, rows, columns] that belongs to a sequence: columns of the shared prefix, then of the keys."""
        rows, first = slice(*span.query), self.prefix_length
        keys = table[:, rows, first + span.key[0] : first + span.key[1]]
        return keys if first == 0 else torch.cat((table[:, rows, :first], keys), dim=-1)

    @cached_property
    def _full_mask(self) -> Tensor:
        """A mask that is not compressed as [1 or B, 1, rows, columns]."""
        assert self.mask is not None
        mask = self.mask
        if mask.dim() == 2 and self.decodes:
            return mask[:, None, None]
        return mask[(None,) * (4 - mask.dim())] if mask.dim() != 3 else mask.unsqueeze(1)

    # -------------------------------------------------------------------- checks

    def _check(self) -> None:
        op, names = self.op, self.names
        check(op, self.heads > 0, f"{names.heads} must be positive, not {self.heads}")
        divides = 0 < self.kv_heads <= self.heads and self.heads % self.kv_heads == 0
        check(op, divides, f"{names.heads}={self.heads} must be a multiple of {names.kv_heads}={self.kv_heads}")
        check(op, self.heads <= _MOST_HEADS, f"{names.heads} must be at most {_MOST_HEADS}, not {self.heads}")
        check(op, self.query_rope is not None or self.heads // self.kv_heads <= 64, f"{names.heads} / {names.kv_heads} must be at most 64")
        allowed = ", ".join(map(str, self.sparse_modes))
        check(op, self.sparse_mode in self.sparse_modes, f"sparse_mode must be one of {allowed}, not {self.sparse_mode}")
        check(op, 0 <= self.inner_precise <= (1 if self.decodes else 3), f"inner_precise={self.inner_precise} is not allowed here")
        self._check_operands()
        self._check_rope()
        self._check_packed()
        self._check_paddings()
        self._check_prefix()
        self._check_mask()
        self._check_bias()

    def _check_operands(self) -> None:
        op, sizes = self.op, self.sizes
        check_dtype(op, "query", self.query, torch.float16, torch.bfloat16)
        if self.key_scales is None:
            check_same_dtype(op, query=self.query, key=self.key, value=self.value)
        else:
            check_dtype(op, "key", self.key, torch.int8, torch.int32)
            check_same_dtype(op, key=self.key, value=self.value)
        check(op, sizes.heads == self.heads, f"query has {sizes.heads} heads, but {self.names.heads} is {self.heads}")
        check(op, sizes.batch <= _MOST_BATCHES, f"the batch must be at most {_MOST_BATCHES}, not {sizes.batch}")
        if self.layout.endswith("H"):
            whole = self.query.shape[-1] % self.heads == 0
            check(op, whole, f"the last dimension of query, {self.query.shape[-1]}, is not a multiple of {self.names.heads}={self.heads}")
        multiple = 32 if self.key.dtype == torch.int8 else 64 if self.key.dtype == torch.int32 else 16
        fits = sizes.width <= _WIDEST and sizes.width % multiple == 0
        check(op, fits, f"the head dimension must be a multiple of {multiple} and at most {_WIDEST}, not {sizes.width}")
        if self.output_layout == "NBSD":
            check(op, sizes.tokens <= 16, f"at most 16 queries of a sequence can be laid out as NBSD, not {sizes.tokens}")
        if self.paging is not None and self.key.dim() == 4:
            pages = "a cache [blocks, N, block_size, D] goes with queries in BNSD, TND or NTD"
            check(op, self.layout in ("BNSD", "TND", "NTD"), f"{pages}, not {self.layout}")
        if not self.decodes and not self.packed and self.paging is not None:
            check(op, self.key_scales is None or self.key.dim() == 5, "integer keys in pages need queries of one token, or the NZ format")
        key, value = self._keys
        shapes = f"key and value must have one shape, not {list(self.key.shape)} and {list(self.value.shape)}"
        check(op, key.shape[:3] == value.shape[:3], shapes)
        check(op, key.shape[-1] == sizes.width, f"query and key must have one head dimension, not {sizes.width} and {key.shape[-1]}")
        same_batch = self.paging is not None or key.shape[0] == sizes.batch
        check(op, same_batch, f"query and key must have one batch, not {sizes.batch} and {key.shape[0]}")

    def _check_rope(self) -> None:
        op, width = self.op, self.sizes.width
        together = (self.query_rope is None) == (self.key_rope is None)
        check(op, together, "query_rope and key_rope must be given together")
        if self.query_rope is None or self.key_rope is None:
            return
        check_same_dtype(op, query=self.query, query_rope=self.query_rope, key_rope=self.key_rope)
        check(op, width in (128, _LATENT), f"the head dimension must be 128 or {_LATENT} with query_rope, not {width}")
        ropes = to_bnsd(op, "query_rope", self.query_rope, self.layout, self.heads), self._laid_out("key_rope", self.key_rope)
        for name, rope in zip(("query_rope", "key_rope"), ropes, strict=True):
            check(op, rope.shape[-1] == _ROPE, f"the head dimension of {name} must be {_ROPE}, not {rope.shape[-1]}")
        tokens = (self.sizes.batch, self.heads, self.sizes.tokens)
        check(op, ropes[0].shape[:3] == tokens, "query_rope must have the tokens and heads of query")
        check(op, ropes[1].shape[:3] == self._keys[0].shape[:3], "key_rope must have the tokens and heads of key")
        given = {"pse_shift": self.pse, "key_antiquant_scale": self.key_scales, "key_shared_prefix": self.prefix}
        for name, argument in given.items():
            check(op, argument is None, f"{name} is not supported beside query_rope")
        if width == _LATENT:
            check(op, self.heads in (1, 2, 4, 8, 16, 32, 64, 128), f"{self.names.heads} must be a power of two up to 128 with query_rope")
            check(op, self.kv_heads == 1, f"{self.names.kv_heads} must be 1 with head dimension {_LATENT}, not {self.kv_heads}")
            modes = f"sparse_mode must be 0, 3 or 4 with query_rope, not {self.sparse_mode}"
            check(op, self.sparse_mode in (0, 3, 4, TREE), modes)
            check(op, self.layout != "NTD", f"queries in NTD are not supported with head dimension {_LATENT}")

    def _check_packed(self) -> None:
        if not self.packed:
            return
        op, value_width = self.op, self._keys[1].shape[-1]
        widths = self.sizes.width, value_width
        if self.query_rope is None:
            shown = " or ".join(str(pair) for pair in _PACKED_WIDTHS)
            check(op, widths in _PACKED_WIDTHS, f"the head dimensions of query and value must be {shown} with {self.layout}, not {widths}")
        narrow = value_width != 192 or (self.heads == self.kv_heads and self.layout == "TND")
        check(op, narrow, "values with head dimension 192 need TND, and as many heads as queries")
        check(op, self.sparse_mode in (0, 3, 4, TREE), f"sparse_mode must be 0, 3 or 4 with packed tokens, not {self.sparse_mode}")
        check(op, self.sparse_mode != 0 or self.mask is None, "atten_mask needs sparse_mode 3 or 4 with packed tokens")
        check(op, self.pse is None, "pse_shift is not supported with packed tokens")
        check(op, self.key_scales is None, "integer keys and values are not supported with packed tokens")
        if self.sparse_mode == 3:
            for span in self._spans:
                queries, keys = span.lengths
                fewer = f"sequence {span.number} has {queries} queries but {keys} keys; sparse_mode=3 needs as many"
                check(op, queries <= keys, fewer)
        if self.sink is not None:
            check(op, value_width <= 128, f"learnable_sink needs values of head dimension 128 at most, not {value_width}")

    def _check_paddings(self) -> None:
        if self.paddings == NO_PADDINGS:
            return
        op, names = self.op, self.names
        free = not self.packed and self.paging is None and self.query_rope is None
        check(op, free, "query_padding_size and kv_padding_size are not supported with packed tokens, block_table or query_rope")
        if self.paddings.query is not None:
            check(op, not self.decodes, "query_padding_size has no effect on queries of one token")
            check(op, self.query_lengths is not None, f"query_padding_size needs {names.query_lengths}")
        if self.paddings.key is not None:
            check(op, self.key_lengths is not None, f"kv_padding_size needs {names.key_lengths}")

    def _check_prefix(self) -> None:
        if self.prefix is None:
            return
        check_same_dtype(self.op, key=self.key, key_shared_prefix=self.prefix.key, value_shared_prefix=self.prefix.value)
        free = not self.packed and self.paging is None and self.paddings == NO_PADDINGS
        check(self.op, free, "key_shared_prefix is not supported with packed tokens, block_table or padding on the left")

    def _check_mask(self) -> None:
        op = self.op
        if self.mask is None:
            free = self.sparse_mode == 0 or (self.decodes and self.query_rope is None)
            check(op, free, f"atten_mask is required with sparse_mode={self.sparse_mode}")
            return
        check_dtype(op, "atten_mask", self.mask, *MASK_DTYPES)
        if self.sparse_mode == TREE:
            self._check_tree(self.mask)
            return
        if self.sparse_mode >= 2:
            check_compressed(op, self.mask, self.sparse_mode, _COMPRESSED_SHAPES)
        if self.sparse_mode in (0, 4) and not self.decodes:
            check(op, self.pre_tokens + self.next_tokens >= 0, "pre_tokens + next_tokens must not be negative")
        if self.sparse_mode >= 2:
            return
        check(op, self.mask.dim() in (2, 3, 4), f"atten_mask must have 2, 3 or 4 dimensions, not {self.mask.dim()}")
        batch, heads, rows, columns = self._full_mask.shape
        batches = (self.batch,) if self.decodes else (1, self.batch)
        fits = batch in batches and heads == 1 and rows >= self.sizes.tokens and columns >= self._key_columns
        needed = f"[{' or '.join(str(size) for size in batches)}, 1, {self.sizes.tokens} or more, {self._key_columns} or more]"
        check(op, fits, f"atten_mask must have shape {needed}, or the same without leading dimensions of 1, not {list(self.mask.shape)}")

    def _check_tree(self, mask: Tensor) -> None:
        op, tokens = self.op, self.sizes.tokens
        check(op, self.query_rope is not None, f"sparse_mode={TREE} needs query_rope")
        squares = sum(span.lengths[0] ** 2 for span in self._spans)
        needed = (squares,) if self.packed else (self.batch, tokens, tokens)
        check(op, mask.shape == needed, f"atten_mask must have shape {list(needed)} with sparse_mode={TREE}, not {list(mask.shape)}")
        fewer = all(span.lengths[0] <= span.lengths[1] for span in self._spans)
        check(op, fewer, f"a sequence must not have more queries than keys with sparse_mode={TREE}")

    @cached_property
    def _key_columns(self) -> int:
        """The columns that mask and pse_shift need."""
        if self.paging is not None:
            return self.paging.capacity
        if self.decodes and self.key_lengths is not None:
            return self.prefix_length + max((span.key[1] for span in self._spans), default=0)
        return self.prefix_length + self._keys[0].shape[2]

    def _check_bias(self) -> None:
        if self.pse is None:
            return
        op, shape = self.op, tuple(self.pse.shape)
        check_same_dtype(op, query=self.query, pse_shift=self.pse)
        fits = len(shape) == 4 and shape[0] in (1, self.batch) and shape[1] == self.heads
        fits = fits and shape[2] >= self.sizes.tokens and shape[3] >= self._key_columns
        needed = f"[1 or {self.batch}, {self.heads}, {self.sizes.tokens} or more, {self._key_columns} or more]"
        check(op, fits, f"pse_shift must have shape {needed}, not {list(shape)}")
