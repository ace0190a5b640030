"""CPU kernels of the ops that write rows into a tensor, above all keys and values into a cache.

npu_scatter_nd_update, scatter_update, npu_scatter, npu_scatter_pa_kv_cache and npu_scatter_pa_cache. All of them copy, none computes: what
is written is bit-equal to what was given.

Source: op-plugin docs and tests of each op; ops-nn `index/scatter` (1-D and 2-D indices, in op_kernel and tiling) and
`index/scatter_nd_update`; ops-transformer `attention/scatter_pa_kv_cache` (layouts, negative slots are skipped in op_kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import check, check_dtype, check_same_dtype, emulates, refuse

INDICES = (torch.int32, torch.int64)
_ND_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)
_UPDATE_DTYPES = (torch.int8, torch.float16, torch.float32, torch.bfloat16, torch.int32)


# -------------------------------------------------------------------- npu_scatter_nd_update


def _check_nd(op: str, input: Tensor, indices: Tensor, updates: Tensor) -> None:
    check_dtype(op, "input", input, *_ND_DTYPES)
    check_dtype(op, "indices", indices, *INDICES)
    check_same_dtype(op, input=input, updates=updates)
    check(op, 1 <= input.dim() <= 8, f"input must have 1 to 8 dimensions, not {input.dim()}")
    check(op, indices.dim() >= 2, f"indices must have at least 2 dimensions, not {indices.dim()}")
    depth = indices.shape[-1]
    check(op, 1 <= depth <= input.dim(), f"the last dimension of indices is {depth}, input has {input.dim()} dimensions")
    expected = (*indices.shape[:-1], *input.shape[depth:])
    check(op, updates.shape == expected, f"updates must have shape {list(expected)}, not {list(updates.shape)}")
    limits = torch.tensor(input.shape[:depth], device=indices.device)
    check(op, bool(((indices >= 0) & (indices < limits)).all()), "an index is out of range")


@emulates("npu::npu_scatter_nd_update_")
def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """`input[indices[i]] = updates[i]`, the last dimension of indices addressing the first dimensions of input; the last of equal ones."""
    _check_nd("npu_scatter_nd_update_", input, indices, updates)
    input[tuple(indices.long().unbind(-1))] = updates
    return input


@npu_scatter_nd_update_.fake
def _(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return input


@emulates("npu::npu_scatter_nd_update")
def npu_scatter_nd_update(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """npu_scatter_nd_update_ on a copy of input."""
    _check_nd("npu_scatter_nd_update", input, indices, updates)
    return npu_scatter_nd_update_(input.clone(), indices, updates)  # type: ignore[no-any-return]


@npu_scatter_nd_update.fake
def _(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return torch.empty_like(input)


# -------------------------------------------------------------------- scatter_update


def _starts(op: str, input: Tensor, indices: Tensor, updates: Tensor) -> list[tuple[int, int]]:
    """For each row of updates the row of input and the place on the axis where it goes."""
    rows = updates.shape[0]
    if indices.dim() == 2:
        check(op, tuple(indices.shape) == (rows, 2), f"indices must have shape [{rows}, 2], not {list(indices.shape)}")
        return [(int(row), int(start)) for row, start in indices.tolist()]
    check(op, indices.numel() == rows, f"indices must have one element for each of the {rows} rows of updates, not {indices.numel()}")
    return list(enumerate(indices.reshape(-1).tolist()))


@emulates("npu::scatter_update_")
def scatter_update_(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """Write row i of updates into row i of input, from `indices[i]` on along `axis`; 2-D indices name the row of input as well."""
    op = "scatter_update_"
    check_dtype(op, "input", input, *_UPDATE_DTYPES)
    check_dtype(op, "indices", indices, *INDICES)
    check_same_dtype(op, input=input, updates=updates)
    check(op, input.dim() == updates.dim(), f"updates must have {input.dim()} dimensions, not {updates.dim()}")
    check(op, 2 <= input.dim() <= 8, f"input must have 2 to 8 dimensions, not {input.dim()}")
    check(op, indices.dim() <= 2, f"indices must have at most 2 dimensions, not {indices.dim()}")
    check(op, min(input.numel(), indices.numel(), updates.numel()) > 0, "empty tensors are not supported")
    dim = axis + input.dim() if axis < 0 else axis
    check(op, 0 < dim < input.dim(), f"axis={axis} must name a dimension other than the first")
    check(op, updates.shape[0] <= input.shape[0], f"updates has {updates.shape[0]} rows, input has {input.shape[0]}")
    others = [d for d in range(1, input.dim()) if d != dim]
    check(op, all(updates.shape[d] == input.shape[d] for d in others), f"updates {list(updates.shape)} must fit {list(input.shape)}")
    length = updates.shape[dim]
    for i, (row, start) in enumerate(_starts(op, input, indices, updates)):
        check(op, 0 <= row < input.shape[0] and 0 <= start <= input.shape[dim] - length, f"index ({row}, {start}) is out of range")
        input[row].narrow(dim - 1, start, length).copy_(updates[i])
    return input


@scatter_update_.fake
def _(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    return input


@emulates("npu::scatter_update")
def scatter_update(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """scatter_update_ on a copy of input."""
    return scatter_update_(input.clone(), indices, updates, axis)  # type: ignore[no-any-return]


@scatter_update.fake
def _(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    return torch.empty_like(input)


@emulates("npu::npu_scatter")
def npu_scatter(input: Tensor, indices: Tensor, updates: Tensor, dim: int) -> Tensor:
    """A copy of input with one element along `dim` replaced for each place of the other dimensions; input itself where indices is empty."""
    op = "npu_scatter"
    check_dtype(op, "indices", indices, torch.int32, torch.int64)
    check_same_dtype(op, input=input, updates=updates)
    if indices.numel() == 0:
        return input.clone()
    check(op, -input.dim() <= dim < input.dim(), f"dim={dim} is not a dimension of input, which has {input.dim()}")
    dim %= input.dim()
    kept = [size for d, size in enumerate(input.shape) if d != dim]
    for name, tensor in (("indices", indices), ("updates", updates)):
        check(op, list(tensor.shape) == kept, f"{name} must have shape {kept}, not {list(tensor.shape)}")
    check(op, bool(((indices >= 0) & (indices < input.shape[dim])).all()), "an index is out of range")
    return input.scatter(dim, indices.long().unsqueeze(dim), updates.unsqueeze(dim))


@npu_scatter.fake
def _(input: Tensor, indices: Tensor, updates: Tensor, dim: int) -> Tensor:
    return torch.empty_like(input)


# -------------------------------------------------------------------- paged caches


def write_slots(op: str, cache: Tensor, rows: Tensor, slots: Tensor, *, nz: bool = False) -> None:
    """Write one row for each slot of a paged cache; a negative slot is skipped.

    Args:
        cache: [blocks, page, ...], or in the fractal layout [blocks, row / c0, page, c0].
        rows: [tokens, ...], as many elements as a slot has.
        slots: [tokens], each `block * page + place in it`.
        nz: whether the cache has the fractal layout.
    """
    page = cache.shape[2 if nz else 1]
    kept = slots >= 0
    check(op, bool((slots < cache.shape[0] * page).all()), "a slot is beyond the cache")
    block, place = (slots[kept] // page).long(), (slots[kept] % page).long()
    if nz:
        cache[block, :, place] = rows[kept].reshape(-1, cache.shape[1], cache.shape[3])
    else:
        cache[block, place] = rows[kept].reshape(-1, *cache.shape[2:])


def _check_paged(op: str, name: str, rows: Tensor, cache: Tensor, slots: Tensor, nz: bool) -> None:
    tokens = rows.shape[0]
    check_same_dtype(op, **{name: rows, f"{name}_cache": cache})
    check_dtype(op, "slot_mapping", slots, *INDICES)
    check(op, rows.dim() == 3, f"{name} must have 3 dimensions, not {rows.dim()}: those of compressed caches are not supported")
    check(op, cache.dim() == 4, f"{name}_cache must have 4 dimensions, not {cache.dim()}")
    check(op, tuple(slots.shape) == (tokens,), f"slot_mapping must have shape [{tokens}], not {list(slots.shape)}")
    check(op, tokens > 0, f"{name} is empty")
    check(op, cache.is_contiguous(), f"{name}_cache must be contiguous")
    heads, size = rows.shape[1:]
    if nz:
        c0 = 32 // cache.element_size()
        expected = (cache.shape[0], heads * size // c0, cache.shape[2], c0)
        check(op, size % c0 == 0, f"the head dimension {size} of {name} must be a multiple of 32 bytes in PA_NZ")
    else:
        expected = (*cache.shape[:2], heads, size)
    check(op, tuple(cache.shape) == expected, f"{name}_cache must have shape {list(expected)}, not {list(cache.shape)}")
    places = cache.shape[0] * cache.shape[2 if nz else 1]
    check(op, places >= tokens, f"{name}_cache has {places} slots for {tokens} tokens")


@emulates("npu::npu_scatter_pa_kv_cache")
def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Write the keys and values of tokens into the slots of their paged caches: [blocks, page, N, D], fractal in `PA_NZ`."""
    op = "npu_scatter_pa_kv_cache"
    refuse(op, compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets, seq_lens=seq_lens)
    check(op, cache_mode in (None, "Norm", "PA_NZ"), f"cache_mode must be None, 'Norm' or 'PA_NZ', not {cache_mode!r}")
    nz = cache_mode == "PA_NZ"
    for name, rows, cache in (("key", key, key_cache), ("value", value, value_cache)):
        _check_paged(op, name, rows, cache, slot_mapping, nz)
    check_same_dtype(op, key=key, value=value)
    check(op, key.shape[:2] == value.shape[:2], f"key {list(key.shape)} and value {list(value.shape)} must have as many tokens and heads")
    write_slots(op, key_cache, key, slot_mapping, nz=nz)
    write_slots(op, value_cache, value, slot_mapping, nz=nz)


@npu_scatter_pa_kv_cache.fake
def _(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    return None


@emulates("npu::npu_scatter_pa_kv_cache_functional")
def npu_scatter_pa_kv_cache_functional(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> tuple[Tensor, Tensor]:
    """npu_scatter_pa_kv_cache on copies of the caches."""
    caches = (key_cache.clone(memory_format=torch.contiguous_format), value_cache.clone(memory_format=torch.contiguous_format))
    npu_scatter_pa_kv_cache(
        key,
        value,
        *caches,
        slot_mapping,
        compress_lens=compress_lens,
        compress_seq_offsets=compress_seq_offsets,
        seq_lens=seq_lens,
        cache_mode=cache_mode,
    )
    return caches


@npu_scatter_pa_kv_cache_functional.fake
def _(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(key_cache), torch.empty_like(value_cache)


@emulates("npu::npu_scatter_pa_cache.value")
def npu_scatter_pa_cache(
    key: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    key_cache: Tensor,
) -> Tensor:
    """Write the keys of tokens into the slots of one paged cache [blocks, page, N, D]."""
    op = "npu_scatter_pa_cache"
    refuse(op, compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets, seq_lens=seq_lens)
    _check_paged(op, "key", key, key_cache, slot_mapping, nz=False)
    write_slots(op, key_cache, key, slot_mapping)
    return key_cache


@npu_scatter_pa_cache.fake
def _(
    key: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    key_cache: Tensor,
) -> Tensor:
    return key_cache
