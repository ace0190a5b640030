"""CPU kernels of the ops that norm, rotate and write a paged cache, against formulas in float64 and loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.ascend.emulation import EmulationError
from tests.lowerings.ascend.checks import check_kernel

npu = torch.ops.npu
HALVES = (torch.bfloat16, torch.float16)
BATCH, TOKENS, BLOCKS, PAGE = 2, 3, 6, 32
PAGED = ["PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"]


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gamma


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def quantised(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127).to(torch.int8)


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(actual.double(), exact, rtol=1.01 * torch.finfo(actual.dtype).eps, atol=1e-5)


def assert_quantised(actual: Tensor, exact: Tensor) -> None:
    """`actual` is `exact` quantised, but for values that fp32 arithmetic puts on the other side of a half."""
    assert actual.dtype == torch.int8
    assert (actual.int() - quantised(exact).int()).abs().max() <= 1
    assert (actual == quantised(exact)).float().mean() > 0.98


# -------------------------------------------------------------------- npu_kv_rmsnorm_rope_cache


class Latent:
    """Inputs of npu_kv_rmsnorm_rope_cache in a mode, and what the two parts are in float64."""

    def __init__(self, mode: str, dtype: torch.dtype, *, with_v: bool = False, int8: bool = False, tokens: int = TOKENS) -> None:
        self.mode, self.sizes, self.tokens = mode, (192, 128) if with_v else (64, 512), tokens
        width = 192 if with_v else 576
        self.kv = torch.randn(BATCH, 1, tokens, width, dtype=dtype)
        self.gamma = torch.randn(192 if with_v else 512, dtype=dtype)
        self.cos, self.sin = (torch.randn(BATCH, 1, tokens, 64, dtype=dtype) for _ in range(2))
        self.v = torch.randn(BATCH, 1, tokens, 128, dtype=dtype) if with_v else None
        self.scales = [20 * torch.rand(size) + 1 for size in self.sizes] if int8 else [None, None]
        cache_dtype = torch.int8 if int8 else dtype
        lead = (BATCH, 1, 8) if mode == "Norm" else (BLOCKS, PAGE, 1)
        self.caches = [torch.full((*lead, size), 9, dtype=cache_dtype) for size in self.sizes]
        self.index = self._index()

    def _index(self) -> Tensor:
        if self.mode == "Norm":
            index = torch.stack([torch.randperm(8)[: self.tokens] for _ in range(BATCH)])
            index[0, 0] = -1
            return index
        if "BLK" in self.mode:
            index = torch.randperm(BLOCKS)[: BATCH * math.ceil(self.tokens / PAGE)] * PAGE
        else:
            index = torch.randperm(BLOCKS * PAGE)[: BATCH * self.tokens]
        index[1] = -1
        return index

    def parts(self) -> list[Tensor]:
        kv, gamma, cos, sin = (t.double() for t in (self.kv, self.gamma, self.cos, self.sin))

        def key(x: Tensor) -> Tensor:
            return rotated(torch.cat((x[..., 0::2], x[..., 1::2]), -1), cos, sin)

        if self.v is None:
            return [key(kv[..., 512:]), rms_norm(kv[..., :512], gamma, 1e-5)]
        normed = rms_norm(kv, gamma, 1e-5)
        return [torch.cat((key(normed[..., :64]), normed[..., 64:]), -1), self.v.double()]

    def places(self, token: tuple[int, int]) -> tuple[int, int] | None:
        """Block and place in it of a token, or batch and position; None where it is skipped."""
        batch, i = token
        if self.mode == "Norm":
            position = int(self.index[batch, i])
            return None if position < 0 else (batch, position)
        if "BLK" in self.mode:
            start = int(self.index[batch * math.ceil(self.tokens / PAGE) + i // PAGE])
            return None if start < 0 else (start // PAGE, i % PAGE)
        slot = int(self.index[batch * self.tokens + i])
        return None if slot < 0 else (slot // PAGE, slot % PAGE)

    def row(self, cache: Tensor, place: tuple[int, int]) -> Tensor:
        if self.mode == "Norm":
            return cache[place[0], 0, place[1]]
        if self.mode.endswith("NZ"):
            fractal = cache.view(BLOCKS, -1, PAGE, 32 // cache.element_size())
            return fractal[place[0], :, place[1]].reshape(-1)
        return cache[place[0], place[1], 0]

    def arguments(self, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
        given = [self.kv, self.gamma, self.cos, self.sin, self.index, *self.caches]
        return given, {"k_rope_scale": self.scales[0], "c_kv_scale": self.scales[1], "v": self.v, "cache_mode": self.mode, **options}

    def assert_written(self, caches: list[Tensor]) -> None:
        for cache, part, scale in zip(caches, self.parts(), self.scales, strict=True):
            count = 0
            for batch in range(BATCH):
                for i in range(self.tokens):
                    place = self.places((batch, i))
                    if place is None:
                        continue
                    count += part.shape[-1]
                    row, exact = self.row(cache, place), part[batch, 0, i]
                    if scale is None:
                        assert_rounded_once(row, exact)
                    else:
                        assert_quantised(row, exact * scale.double())
            assert (cache != 9).sum() <= count  # nothing else was touched


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("with_v", [False, True], ids=["latent", "v"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", ["Norm", *PAGED])
def test_kv_rmsnorm_rope_cache(mode: str, dtype: torch.dtype, with_v: bool, int8: bool) -> None:
    latent = Latent(mode, dtype, with_v=with_v, int8=int8)
    args, options = latent.arguments(is_output_kv=mode != "Norm")
    k_cache, ckv_cache, *parts = check_kernel("npu::npu_kv_rmsnorm_rope_cache", *args, **options)
    assert (k_cache.data_ptr(), ckv_cache.data_ptr()) == (args[5].data_ptr(), args[6].data_ptr())
    latent.assert_written([k_cache, ckv_cache])
    for part, exact in zip(parts, latent.parts(), strict=True):
        assert part.shape == exact.shape
        if mode != "Norm":
            assert_rounded_once(part, exact)
        else:
            assert part.isnan().all()  # not written


def test_blocks_of_several_pages() -> None:
    latent = Latent("PA_BLK_NZ", torch.float16, tokens=PAGE + 5)
    args, options = latent.arguments()
    latent.assert_written(list(npu.npu_kv_rmsnorm_rope_cache(*args, **options)[:2]))


@pytest.mark.parametrize("functional", [False, True])
def test_version_2(functional: bool) -> None:
    latent = Latent("PA_BNSD", torch.bfloat16)
    args, options = latent.arguments(is_output_kv=True)
    before = [cache.clone() for cache in latent.caches]
    result = check_kernel(f"npu::npu_kv_rmsnorm_rope_cache_v2{'_functional' if functional else ''}", *args, **options)
    for part, exact in zip(result[:2], latent.parts(), strict=True):
        assert_rounded_once(part, exact)
    latent.assert_written(list(result[2:]) if functional else latent.caches)
    if functional:
        assert all(torch.equal(cache, old) for cache, old in zip(latent.caches, before, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_rope_offset": torch.ones(64)}, "k_rope_offset"),
        ({"c_kv_offset": torch.ones(512)}, "c_kv_offset"),
        ({"k_rope_scale": torch.ones(64)}, "given together"),
        ({"cache_mode": "NZ"}, "cache_mode"),
        ({"cache_mode": "Norm", "is_output_kv": True}, "is_output_kv"),
        ({"kv": torch.ones(BATCH, 1, TOKENS, 512, dtype=torch.float16)}, "576"),
        ({"kv": torch.ones(BATCH, TOKENS, 576, dtype=torch.float16)}, "4D tensor expected for input kv"),
        ({"gamma": torch.ones(512)}, "dtypes must be equal"),
        ({"index": torch.ones(1, dtype=torch.int64)}, "index must have shape"),
        ({"index": torch.ones(BATCH * TOKENS, dtype=torch.int32)}, "index must be int64"),
        ({"index": torch.full((BATCH * TOKENS,), BLOCKS * PAGE)}, "beyond the cache"),
        ({"k_cache": torch.ones(BLOCKS, PAGE, 1, 32, dtype=torch.float16)}, "k_cache"),
    ],
)
def test_kv_refuses(options: dict[str, Any], message: str) -> None:
    args, given = Latent("PA_BNSD", torch.float16).arguments()
    named = dict(zip(("kv", "gamma", "cos", "sin", "index", "k_cache", "ckv_cache"), args, strict=True))
    with pytest.raises(EmulationError, match=message):
        npu.npu_kv_rmsnorm_rope_cache(**{**named, **given, **options})


def test_version_2_refuses_other_cache_dtypes() -> None:
    args, options = Latent("PA_BNSD", torch.float16).arguments()
    with pytest.raises(EmulationError, match="k_cache_dtype"):
        npu.npu_kv_rmsnorm_rope_cache_v2(*args, **options, k_cache_dtype=1)


# -------------------------------------------------------------------- npu_qkv_rms_norm_rope_cache

NQ, NK, SIZE = 4, 2, 64


def qkv_arguments(dtype: torch.dtype, quant: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments; slot 1 is skipped."""
    rows, int8 = BATCH * TOKENS, quant != "float"
    cache_dtype = torch.int8 if int8 else dtype
    c0 = 32 // cache_dtype.itemsize
    caches = [torch.full((BLOCKS, NK * SIZE // c0, PAGE, c0), 9, dtype=cache_dtype) for _ in range(2)]
    slots = torch.randperm(BLOCKS * PAGE)[:rows]
    slots[1] = -1
    inputs = [torch.randn(rows, (NQ + 2 * NK) * SIZE, dtype=dtype), *(torch.randn(SIZE, dtype=dtype) for _ in range(2))]
    tables = [torch.randn(rows, SIZE, dtype=dtype) for _ in range(2)]
    q_out = torch.full((rows, NQ * SIZE), 9, dtype=dtype)
    options: dict[str, Any] = {}
    if int8:
        options = {"k_scale": torch.rand(NK, SIZE) / 20 + 0.01, "v_scale": torch.rand(NK, SIZE) / 20 + 0.01}
    if quant == "offset":
        options |= {"k_offset": torch.randn(NK, SIZE), "v_offset": torch.randn(NK, SIZE)}
    sizes = [[BATCH, TOKENS, NQ + 2 * NK, SIZE], [NQ, NK, NK]]
    return [*inputs, *tables, slots, q_out, *caches, *sizes], options


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("functional", [False, True], ids=["in_place", "functional"])
@pytest.mark.parametrize("quant", ["float", "scale", "offset"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_qkv_rms_norm_rope_cache(dtype: torch.dtype, quant: str, functional: bool, output: bool) -> None:
    args, options = qkv_arguments(dtype, quant)
    qkv, q_gamma, k_gamma, cos, sin = (tensor.double() for tensor in args[:5])
    slots = args[5]
    q, k, v = qkv.view(-1, NQ + 2 * NK, SIZE).split([NQ, NK, NK], 1)
    q, k = (rotated(rms_norm(x, gamma, 1e-6), cos[:, None], sin[:, None]) for x, gamma in ((q, q_gamma), (k, k_gamma)))
    name = f"npu::npu_qkv_rms_norm_rope_cache{'_functional' if functional else ''}"
    result = check_kernel(name, *args, **options, is_output_qkv=output)
    q_out, *caches = result[3:] if functional else args[6:9]
    assert_rounded_once(q_out, q.flatten(1))
    for cache, x, which in zip(caches, (k, v), "kv", strict=True):
        for row, slot in zip(x, slots.tolist(), strict=True):
            if slot < 0:
                continue
            actual = cache[slot // PAGE, :, slot % PAGE].reshape(NK, SIZE)
            if quant == "float":
                assert_rounded_once(actual, row)
            else:
                offset = options.get(f"{which}_offset", torch.zeros(()))
                assert_quantised(actual, row / options[f"{which}_scale"].double() + offset.double())
        assert (cache != 9).sum() <= (len(slots) - 1) * NK * SIZE
    if functional:
        assert (args[6] == 9).all()
    for part, exact in zip(result[:3], (q, k, v), strict=True):
        if output:
            assert_rounded_once(part, exact.flatten(1))
        else:
            assert part.shape == ()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (9, [BATCH, TOKENS, 8, SIZE + 1], "qkv must have shape"),
        (10, [NQ, NK, NK + 1], "head_nums"),
        (0, torch.ones(2, 3, 4), "2D tensor expected for input qkv"),
        (1, torch.ones(SIZE - 1, dtype=torch.float16), "q_gamma"),
        (3, torch.ones(1, SIZE, dtype=torch.float16), "cos"),
        (5, torch.ones(1, dtype=torch.int64), "index must have shape"),
        (6, torch.ones(1, 1, dtype=torch.float16), "q_out"),
        (7, torch.ones(BLOCKS, PAGE, NK, SIZE, dtype=torch.float16), "k_cache"),
    ],
)
def test_qkv_refuses(place: int, value: Any, message: str) -> None:
    args, _ = qkv_arguments(torch.float16, "float")
    args[place] = value
    with pytest.raises(EmulationError, match=message):
        npu.npu_qkv_rms_norm_rope_cache(*args)


@pytest.mark.parametrize(("options", "message"), [({"cache_mode": "PA_BNSD"}, "PA_NZ"), ({"k_offset": torch.ones(NK, SIZE)}, "offset")])
def test_qkv_refuses_options(options: dict[str, Any], message: str) -> None:
    args, _ = qkv_arguments(torch.float16, "float")
    with pytest.raises(EmulationError, match=message):
        npu.npu_qkv_rms_norm_rope_cache(*args, **options)
