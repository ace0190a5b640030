"""Attention kernels against float64: grouped and latent heads, pages, lengths, masks, splits; what is hidden has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from npu_fusion.kernels import decode_attention as kernels
from npu_fusion.kernels.launch import Device
from npu_fusion.lowerings.triton.attention import sdpa
from npu_fusion.lowerings.triton.decode_attention import attention, mask_bounds
from npu_fusion.numerics import assert_within_contract, error_bound, relative_error
from npu_fusion.ops.attention import attention as semantic
from tests.ops.checks import assert_same_metadata

H100 = Device("cuda", cores=132, cube_cores=132)
A2 = Device("npu", cores=40, cube_cores=20)
CORES = 2  # few parts, so that the interpreter has little to do
NAN = float("nan")


def tensors(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def exact(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The semantic op in float64."""
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()}
    result: Tensor = semantic.reference(query.double(), key.double(), value.double(), **wide)
    return result


def check(query: Tensor, key: Tensor, value: Tensor, *, cores: int = CORES, truth: dict[str, Any] | None = None, **options: Any) -> Tensor:
    """Run the kernel; it agrees with the semantic op in float64, which is called with `truth` where it says the same in other words."""
    options = {"scale": query.shape[-1] ** -0.5, **options}
    result: Tensor = attention(query, key, value, cores=cores, **options)
    expected = exact(query, key, value, **({"scale": options["scale"], **truth} if truth is not None else options))
    assert result.transpose(1, 2).is_contiguous()
    assert relative_error(result, expected) <= error_bound(query.dtype)
    return result


def paged(cache: Tensor, page: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A cache [B, N, S, D] as pages [pages, N, page, D] that lie as [pages, page, N, D], in any order, and its table [B, S / page]."""
    batch, heads, room, width = cache.shape
    pages = cache.view(batch, heads, room // page, page, width).permute(0, 2, 3, 1, 4).reshape(-1, page, heads, width)
    order = torch.randperm(pages.shape[0], generator=torch.Generator().manual_seed(seed)).to(cache.device)
    table = torch.empty_like(order)
    table[order] = torch.arange(len(order), device=cache.device)
    return pages[order].transpose(1, 2), table.view(batch, -1).int()


# -------------------------------------------------------------------- heads, sizes, dtypes


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width"), [(1, 1, 16, 16), (3, 1, 40, 24), (8, 2, 64, 64), (32, 1, 32, 48), (2, 2, 80, 80)]
)
def test_heads_and_widths(device: str, plan: str, heads: int, kv_heads: int, width: int, value_width: int) -> None:
    shapes = (2, heads, 1, width), (2, kv_heads, 45, width), (2, kv_heads, 45, value_width)
    check(*tensors(device, *shapes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5])
def test_few_queries(device: str, dtype: torch.dtype, queries: int) -> None:
    check(*tensors(device, (2, 6, queries, 32), (2, 2, 33, 32), (2, 2, 33, 32), dtype=dtype), is_causal=True, causal_offset=33 - queries)


def test_more_queries_than_a_tile(device: str) -> None:
    """130 rows are two tiles of 128 and the last tile is not full; 160 heads are two tiles of heads."""
    check(*tensors(device, (1, 2, 65, 16), (1, 1, 70, 16), (1, 1, 70, 16)), is_causal=True, causal_offset=5)
    check(*tensors(device, (1, 160, 1, 16), (1, 1, 20, 16), (1, 1, 20, 16)))


@pytest.mark.parametrize("keys", [1, 31, 64, 65])
def test_any_number_of_keys(device: str, keys: int) -> None:
    check(*tensors(device, (1, 4, 1, 64), (1, 2, keys, 64), (1, 2, keys, 64)))


def test_no_keys_give_zeros(device: str) -> None:
    query, key = tensors(device, (1, 4, 2, 16), (1, 2, 0, 16))
    assert torch.equal(attention(query, key, key, scale=1.0, cores=1), torch.zeros_like(query))


@pytest.mark.parametrize("shape", [(0, 4, 1, 16), (1, 4, 0, 16)])
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    [query], [key] = tensors(device, shape), tensors(device, (shape[0], 2, 5, 16))
    assert attention(query, key, key, scale=1.0, cores=1).shape == shape


def test_result_in_another_dtype(device: str) -> None:
    query, key, value = tensors(device, (1, 2, 1, 16), (1, 2, 9, 16), (1, 2, 9, 16))
    result = attention(query, key, value, scale=0.25, out_dtype=torch.float32, cores=1)
    assert result.dtype == torch.float32
    assert relative_error(result, exact(query, key, value, scale=0.25)) <= error_bound(torch.float16)


# -------------------------------------------------------------------- splits


@pytest.mark.parametrize("lengths", [(300, 77), (1, 0), (64, 257)])
def test_split_keys(device: str, lengths: tuple[int, int]) -> None:
    """Parts without keys, in part or all of them, and parts that end inside a block."""
    query, key, value = tensors(device, (2, 2, 1, 128), (2, 1, 320, 128), (2, 1, 320, 128))
    sizes = kernels.Sizes(2, 1, 2, 1, 320, 128, 128)
    assert kernels.tiling(sizes, Device(device, 64, 64)).splits > 1
    check(query, key, value, kv_lengths=torch.tensor(lengths, device=device), cores=64)


def test_splits_agree_with_one_walk(device: str) -> None:
    query, key, value, sinks = tensors(device, (1, 4, 3, 64), (1, 2, 400, 64), (1, 2, 400, 64), (4,), dtype=torch.float32)
    options: dict[str, Any] = {"scale": 0.1, "is_causal": True, "causal_offset": 390, "window": 300, "sinks": sinks}
    whole, parts, again = (attention(query, key, value, cores=cores, **options) for cores in (1, 64, 64))
    assert torch.equal(parts, again)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert relative_error(parts, exact(query, key, value, **options)) <= error_bound(torch.float32)


def test_plan_fills_the_device() -> None:
    """One sequence of 8 key heads is split for all multiprocessors; 64 of them need no split; what is short stays whole."""
    one = kernels.Sizes(1, 8, 4, 1, 8192, 128, 128, page=128)
    walk, combine = kernels.attention_launch(one, H100)
    assert combine is not None
    assert 1.5 * 132 <= walk.grid <= 2 * 132
    assert kernels.attention_launch(kernels.Sizes(64, 8, 4, 1, 8192, 128, 128), H100)[1] is None
    assert kernels.attention_launch(kernels.Sizes(1, 8, 4, 1, 64, 128, 128), H100)[1] is None
    assert kernels.attention_launch(one, A2)[0].grid == A2.cube_cores


# -------------------------------------------------------------------- caches


@pytest.mark.parametrize("page", [16, 32, 48, 128])
def test_pages(device: str, plan: str, page: int) -> None:
    index = torch.int64 if page == 48 else torch.int32
    query, key, value = tensors(device, (2, 4, 1, 64), (2, 2, 3 * page, 64), (2, 2, 3 * page, 64))
    keys, table = paged(key, page)
    values, _ = paged(value, page)
    lengths = torch.tensor([2 * page + 5, page], device=device, dtype=index)
    table[1, 1:] = -1  # nobody looks past the length
    truth = {"kv_lengths": lengths}
    result = attention(query, keys, values, scale=0.125, kv_lengths=lengths, block_table=table.to(index), cores=CORES)
    assert relative_error(result, exact(query, key, value, scale=0.125, **truth)) <= error_bound(torch.float16)


@pytest.mark.parametrize("cores", [1, 64])
def test_what_lies_past_the_length_has_no_effect(device: str, cores: int) -> None:
    query, key, value = tensors(device, (2, 4, 1, 64), (2, 2, 300, 64), (2, 2, 300, 64))
    lengths = torch.tensor([130, 0], device=device)
    clean = check(query, key, value, kv_lengths=lengths, cores=cores)
    for row, length in enumerate(lengths.tolist()):
        key[row, :, length:], value[row, :, length:] = NAN, NAN
    assert torch.equal(attention(query, key, value, scale=0.125, kv_lengths=lengths, cores=cores), clean)
    assert clean[1].count_nonzero() == 0


def test_latent_heads(device: str, plan: str) -> None:
    """Absorbed MLA: 5 heads share one latent, whose columns are the values, and one rotary part."""
    query, query_rope, latent, rope = tensors(device, (2, 5, 1, 64), (2, 5, 1, 16), (2, 1, 96, 64), (2, 1, 96, 16))
    lengths = torch.tensor([96, 41], device=device)
    joined = torch.cat((query, query_rope), -1), torch.cat((latent, rope), -1)
    expected = exact(*joined, latent, scale=0.2, kv_lengths=lengths)
    parts = {"query_rope": query_rope, "key_rope": rope, "kv_lengths": lengths}
    for cores in (1, 32):
        result = attention(query, latent, None, scale=0.2, cores=cores, **parts)
        assert relative_error(result, expected) <= error_bound(torch.float16)
    pages, table = paged(latent, 32)
    ropes, _ = paged(rope, 32)
    result = attention(query, pages, None, scale=0.2, cores=1, block_table=table, **{**parts, "key_rope": ropes})
    assert relative_error(result, expected) <= error_bound(torch.float16)


def test_rotary_part_beside_values(device: str) -> None:
    """MLA that is not absorbed: keys of several heads, one rotary part for all."""
    shapes = (1, 2, 3, 32), (1, 2, 3, 16), (1, 2, 40, 32), (1, 1, 40, 16), (1, 2, 40, 24)
    query, query_rope, key, rope, value = tensors(device, *shapes)
    joined = torch.cat((query, query_rope), -1), torch.cat((key, rope.expand(-1, 2, -1, -1)), -1)
    structure: dict[str, Any] = {"scale": 0.2, "is_causal": True, "causal_offset": 37}
    result = attention(query, key, value, query_rope=query_rope, key_rope=rope, cores=1, **structure)
    assert relative_error(result, exact(*joined, value, **structure)) <= error_bound(torch.float16)


@pytest.mark.parametrize("lie", ["token-major", "strided", "columns", "expanded"])
def test_memory_layouts(device: str, lie: str) -> None:
    query, key, value = tensors(device, (2, 4, 2, 32), (2, 2, 40, 32), (2, 2, 40, 32))
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "token-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": lambda x: torch.cat((x, torch.full_like(x, NAN)), -1)[..., :32],
        "columns": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    }
    query, key, value = (layouts[lie](x) for x in (query, key, value))
    check(query, key, value)


# -------------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("window", [0, 1, 7, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_structure(device: str, causal: bool, window: int) -> None:
    inputs = tensors(device, (1, 2, 4, 16), (1, 1, 30, 16), (1, 1, 30, 16))
    for offset in (26, -2):
        check(*inputs, is_causal=causal, causal_offset=offset, window=window)


def test_queries_at_the_end_of_each_sequence(device: str, plan: str) -> None:
    query, key, value = tensors(device, (3, 2, 3, 32), (3, 1, 50, 32), (3, 1, 50, 32))
    lengths = torch.tensor([50, 17, 2], device=device)  # the first of the last sequence's queries sees nothing
    ends = lengths[:, None] - 3 + torch.arange(3, device=device)
    mask = torch.arange(50, device=device) <= ends[:, None, :, None]
    check(query, key, value, is_causal=True, from_end=True, kv_lengths=lengths, truth={"mask": mask, "kv_lengths": lengths})
    mask &= torch.arange(50, device=device) > ends[:, None, :, None] - 9
    truth = {"mask": mask, "kv_lengths": lengths}
    check(query, key, value, is_causal=True, from_end=True, window=9, kv_lengths=lengths, truth=truth)


def masks(device: str) -> dict[str, Tensor]:
    """For 2 sequences, 4 heads, 3 queries and 90 keys."""
    generator = torch.Generator().manual_seed(1)
    some = (torch.rand(2, 4, 3, 90, generator=generator) < 0.5).to(device)
    added = torch.randn(2, 4, 3, 90, generator=generator).to(device)
    keys = torch.arange(90, device=device)
    padded = (keys >= torch.tensor([[13], [70]], device=device))[:, None, None, :]
    row = (torch.arange(3, device=device) == 1)[:, None]
    return {
        "all": some,
        "keys": some[:, :1, :1],
        "of all sequences": some[:1, :1],
        "rank 2": some[0, 0],
        "heads": some[:, :, :1],
        "columns": some[..., :1],
        "hides rows": some & (torch.arange(3, device=device) > 0)[:, None],
        "padding": padded,
        "added": added,
        "added fp16": added.half()[:, :1],
        "added -inf": added.masked_fill(~padded, -torch.inf),
        "hides all with -inf": added.masked_fill(~some | row, -torch.inf),
        "hides all with a number": torch.zeros_like(added).masked_fill(~padded | row, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("name", list(masks("cpu")))
@pytest.mark.parametrize("bounded", [False, True])
def test_masks(device: str, name: str, bounded: bool) -> None:
    query, key, value = tensors(device, (2, 4, 3, 32), (2, 2, 90, 32), (2, 2, 90, 32))
    mask = masks(device)[name]
    bounds = mask_bounds(mask, cores=4) if bounded and mask.shape[-1] > 1 else None
    check(query, key, value, mask=mask, bounds=bounds, truth={"mask": mask.double() if mask.is_floating_point() else mask})


def test_mask_with_bounds_in_parts(device: str, plan: str) -> None:
    """A static cache of which little is filled: the parts share what the bounds leave."""
    query, key, value = tensors(device, (2, 4, 1, 64), (2, 2, 512, 64), (2, 2, 512, 64))
    keys = torch.arange(512, device=device)
    mask = ((keys <= 300) & (keys >= torch.tensor([[0], [290]], device=device)))[:, None, None, :]
    clean = check(query, key, value, mask=mask, bounds=mask_bounds(mask, cores=4), cores=64, truth={"mask": mask})
    key[:, :, 301:], value[:, :, 301:] = NAN, NAN
    assert torch.equal(attention(query, key, value, scale=0.125, mask=mask, bounds=mask_bounds(mask, cores=4), cores=64), clean)


@pytest.mark.parametrize("name", list(masks("cpu")))
def test_mask_bounds(device: str, name: str) -> None:
    mask = masks(device)[name]
    bounds = mask_bounds(mask, cores=4)
    rank4 = mask[(None,) * (4 - mask.dim())]
    shown = (rank4 > -1e9 if mask.is_floating_point() else rank4).any(1).cpu()
    for row, query in ((row, query) for row in range(shown.shape[0]) for query in range(shown.shape[1])):
        seen = shown[row, query].nonzero().flatten().tolist()
        nothing = [0, mask.shape[-1]] if mask.is_floating_point() else [2**31 - 1, 0]
        assert bounds[row, query].tolist() == ([seen[0], seen[-1] + 1] if seen else nothing)


def test_softcap(device: str) -> None:
    query, key, value = tensors(device, (1, 4, 2, 32), (1, 2, 40, 32), (1, 2, 40, 32))
    capped = check(4 * query, key, value, softcap=2.5)
    assert relative_error(capped, exact(4 * query, key, value, scale=32**-0.5)) > 0.05  # it does something


@pytest.mark.parametrize("cores", [1, 64])
def test_sinks(device: str, plan: str, cores: int) -> None:
    query, key, value, sinks = tensors(device, (2, 4, 1, 32), (2, 2, 300, 32), (2, 2, 300, 32), (4,))
    sinks[0], sinks[1] = 9.0, -torch.inf
    lengths = torch.tensor([200, 0], device=device)
    check(query, key, value, sinks=sinks, kv_lengths=lengths, cores=cores)
    check(query[:, :, :1].expand(-1, -1, 2, -1), key, value, sinks=sinks, kv_lengths=lengths, cores=cores)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_stays_in_its_row(device: str, bad: float) -> None:
    query, key, value = tensors(device, (2, 4, 2, 32), (2, 2, 20, 32), (2, 2, 20, 32))
    clean = attention(query, key, value, scale=0.2, cores=1)
    query[0, 1, 1, 3] = bad
    result = attention(query, key, value, scale=0.2, cores=1)
    assert result[0, 1, 1].isnan().all()
    result[0, 1, 1] = clean[0, 1, 1]
    assert torch.equal(result, clean)
    value[1, 0, 7, 5] = bad
    result = attention(query, key, value, scale=0.2, cores=1)
    assert not result[1, :2, :, 5].isfinite().any()
    assert torch.equal(result[1, 2:], clean[1, 2:])


# -------------------------------------------------------------------- torch's own kernels


@pytest.mark.parametrize("sizes", [(5, 5), (3, 9), (9, 3), (1, 6), (4, 0)])
@pytest.mark.parametrize("causal", ["none", "upper_left", "lower_right"])
def test_sdpa(device: str, sizes: tuple[int, int], causal: str) -> None:
    queries, keys = sizes
    if causal == "lower_right" and keys < queries:
        with pytest.raises(ValueError, match="lower_right needs no fewer keys than queries"):
            sdpa(*tensors(device, (1, 4, queries, 16), (1, 2, keys, 16), (1, 2, keys, 16)), scale=1.0, causal=causal)
        return
    inputs = tensors(device, (2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    result = sdpa(*inputs, scale=0.3, causal=causal)
    offset = keys - queries if causal == "lower_right" else 0
    expected = exact(*inputs, scale=0.3, is_causal=causal != "none", causal_offset=offset)
    assert result.transpose(1, 2).is_contiguous()
    assert relative_error(result, expected) <= error_bound(torch.float16)


# -------------------------------------------------------------------- errors and fake kernels


def call(**changes: Any) -> Callable[[], Tensor]:
    query, key = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 8, 16)
    arguments: dict[str, Any] = {"query": query, "key": key, "value": key, "scale": 1.0, "cores": 1, **changes}
    return lambda: attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(2, 4, 1, 16, dtype=torch.float64)}, TypeError, "query must be one of float16, bfloat16, float32"),
        ({"query": torch.zeros(2, 4, 1, 16).half()}, TypeError, "must have one dtype"),
        ({"out_dtype": torch.int8}, ValueError, "out_dtype must be one of"),
        ({"query": torch.zeros(4, 1, 16)}, ValueError, "query must have 4 dimensions, not 3"),
        ({"query": torch.zeros(2, 3, 1, 16)}, ValueError, "2 key heads do not divide 3 query heads"),
        ({"query": torch.zeros(2, 4, 1, 24)}, ValueError, "key must have shape"),
        ({"value": torch.zeros(2, 2, 9, 16)}, ValueError, "value must have shape"),
        ({"value": torch.zeros(2, 2, 8, 257)}, ValueError, "value has rows of 257 elements, of which 256 fit"),
        ({"query_rope": torch.zeros(2, 4, 1, 16)}, ValueError, "query_rope and key_rope come together"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, "block_table needs kv_lengths"),
        ({"from_end": True}, ValueError, "from_end needs kv_lengths"),
        ({"kv_lengths": torch.zeros(2)}, TypeError, "kv_lengths must be int32 or int64"),
        ({"kv_lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, "kv_lengths must have shape"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks must have shape"),
        ({"mask": torch.zeros(8)}, ValueError, "mask must have at least 2 dimensions"),
        ({"mask": torch.zeros(1, 7)}, ValueError, "mask of shape .* does not broadcast"),
        ({"mask": torch.zeros(1, 8, dtype=torch.int64)}, TypeError, "mask must be one of bool"),
        ({"bounds": torch.zeros(1, 1, 2, dtype=torch.int32)}, ValueError, "bounds come with the mask"),
        ({"mask": torch.zeros(1, 8), "bounds": torch.zeros(1, 1, 2)}, TypeError, "bounds must be int32"),
        ({"window": -1}, ValueError, "window must not be negative"),
        ({"softcap": -1.0}, ValueError, "softcap must not be negative"),
        ({"cores": 0}, ValueError, "cores must be positive"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "must lie on one device"),
        ({"key": torch.empty_strided((2, 2, 8, 16), (0, 0, 2**25, 1), device="meta")}, ValueError, "lie too far apart|one device"),
    ],
)
def test_argument_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)()


def test_mask_bounds_errors() -> None:
    with pytest.raises(TypeError, match="mask must be one of bool"):
        mask_bounds(torch.zeros(2, 8, dtype=torch.int32), cores=1)
    with pytest.raises(ValueError, match="mask must have 2 to 4 dimensions, not 1"):
        mask_bounds(torch.zeros(8), cores=1)
    with pytest.raises(TypeError, match="query must be one of"):
        sdpa(*[torch.zeros(1, 1, 2, 8, dtype=torch.float64)] * 3, scale=1.0)
    with pytest.raises(ValueError, match="causal must be one of"):
        sdpa(*[torch.zeros(1, 1, 2, 8)] * 3, scale=1.0, causal="left")


@pytest.mark.parametrize("dynamic", [False, True])
def test_fake_kernels(device: str, dynamic: bool) -> None:
    query, key, value, sinks = tensors(device, (2, 4, 3, 16), (2, 2, 20, 16), (2, 2, 20, 24), (4,))
    mask, lengths = torch.ones(2, 1, 3, 20, dtype=torch.bool, device=device), torch.tensor([20, 3], device=device)
    pages, table = paged(key, 10)
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fake(x: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC] * x.dim()
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))

    def calls(get: Callable[[Tensor], Tensor]) -> list[Tensor]:
        q, k, v, said = get(query), get(key), get(value), get(mask)
        paging = {"kv_lengths": get(lengths), "block_table": get(table)}
        return [
            attention(q, k, v, scale=1.0, mask=said, bounds=mask_bounds(said, cores=1), sinks=get(sinks), cores=1),
            attention(q, get(pages), None, scale=1.0, out_dtype=torch.float32, is_causal=True, from_end=True, cores=1, **paging),
            sdpa(q, k, v, scale=1.0, causal="upper_left"),
        ]

    real = calls(lambda x: x)
    fakes = {id(x): fake(x) for x in (query, key, value, mask, lengths, sinks, pages, table)}
    before = len(env.guards), len(env.deferred_runtime_asserts)
    with mode:
        predicted = calls(lambda x: fakes[id(x)])
    assert (len(env.guards), len(env.deferred_runtime_asserts)) == before, env.guards
    assert_same_metadata(predicted, real)


# -------------------------------------------------------------------- the whole matrix on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (64, 4), (128, 8)])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("queries", [1, 4])
def test_paged_decode_on_gpu(heads: int, kv_heads: int, width: int, batch: int, queries: int, dtype: torch.dtype) -> None:
    query, key, value = tensors("cuda", (batch, heads, queries, width), *[(batch, kv_heads, 2048, width)] * 2, dtype=dtype)
    lengths = torch.linspace(2048, 5, batch, device="cuda").int()
    keys, table = paged(key, 128)
    values, _ = paged(value, 128)
    options: dict[str, Any] = {"scale": width**-0.5, "kv_lengths": lengths}
    result = attention(query, keys, values, block_table=table, cores=132, **options)
    assert_within_contract(result, semantic.reference(query, key, value, **options), exact(query, key, value, **options), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("batch", [1, 16])
def test_latent_decode_on_gpu(heads: int, batch: int, dtype: torch.dtype) -> None:
    shapes = (batch, heads, 1, 512), (batch, heads, 1, 64), (batch, 1, 4096, 512), (batch, 1, 4096, 64)
    query, query_rope, latent, rope = tensors("cuda", *shapes, dtype=dtype)
    lengths = torch.linspace(4096, 100, batch, device="cuda").int()
    joined = torch.cat((query, query_rope), -1), torch.cat((latent, rope), -1)
    pages, table = paged(latent, 128)
    ropes, _ = paged(rope, 128)
    parts = {"query_rope": query_rope, "key_rope": ropes, "kv_lengths": lengths, "block_table": table}
    result = attention(query, pages, None, scale=0.07, cores=132, **parts)
    options: dict[str, Any] = {"scale": 0.07, "kv_lengths": lengths}
    assert_within_contract(result, semantic.reference(*joined, latent, **options), exact(*joined, latent, **options), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("form", ["mask", "added", "window", "softcap", "sinks"])
def test_prefill_on_gpu(width: int, form: str, dtype: torch.dtype) -> None:
    query, key, value, sinks = tensors("cuda", (2, 8, 777, width), (2, 2, 777, width), (2, 2, 777, width), (8,), dtype=dtype)
    shown = torch.ones(777, 777, dtype=torch.bool, device="cuda").tril() & (torch.arange(777, device="cuda") > 20)
    forms: dict[str, dict[str, Any]] = {
        "mask": {"mask": shown[None, None]},
        "added": {"mask": torch.zeros(777, 777, device="cuda", dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)},
        "window": {"is_causal": True, "window": 100},
        "softcap": {"is_causal": True, "softcap": 5.0},
        "sinks": {"is_causal": True, "sinks": sinks, "window": 128},
    }
    options = {"scale": width**-0.5, **forms[form]}
    bounds = mask_bounds(options["mask"], cores=132) if "mask" in options else None
    result = attention(query, key, value, bounds=bounds, cores=132, **options)
    assert_within_contract(result, semantic.reference(query, key, value, **options), exact(query, key, value, **options), dtype)


@pytest.mark.gpu
def test_many_sequences_on_gpu() -> None:
    query, key, value = tensors("cuda", (65537, 2, 1, 64), (65537, 1, 20, 64), (65537, 1, 20, 64), dtype=torch.bfloat16)
    options: dict[str, Any] = {"scale": 0.125, "kv_lengths": torch.arange(65537, device="cuda") % 21}
    result = attention(query, key, value, cores=132, **options)
    assert_within_contract(result, semantic.reference(query, key, value, **options), exact(query, key, value, **options), torch.bfloat16)


@pytest.mark.gpu
def test_a_capture_holds_the_lengths_of_each_replay() -> None:
    query, key, value = tensors("cuda", (2, 8, 1, 128), (2, 2, 4096, 128), (2, 2, 4096, 128), dtype=torch.bfloat16)
    lengths = torch.tensor([7, 4096], device="cuda")

    def run() -> Tensor:
        result: Tensor = attention(query, key, value, scale=0.1, kv_lengths=lengths, cores=132)
        return result

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for new in ([4000, 1], [0, 129]):
        lengths.copy_(torch.tensor(new))
        graph.replay()
        assert torch.equal(captured, run())
