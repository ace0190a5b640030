"""What the Ascend gate compiles of kernels/decode_attention.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import decode_attention as attention
from npu_fusion.kernels.launch import Device, Launch
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
SIZES = ("batches", "kv_heads", "queries", "keys", "token_tiles", "causal_offset", "window")
STRIDES = ("q", "qr", "k", "kr", "v", "mask")


def _launches(sizes: attention.Sizes, **plan: Any) -> tuple[Launch, Launch | None]:
    return attention.attention_launch(sizes, DEVICE, **plan)


def _walk(name: str, launch: Launch, dtype: str, *, mask: str | None = None, bounds: bool = False, sinks: bool = False) -> Case:
    pointer = f"*{dtype}"
    paged, roped, split = (launch.constants[name] for name in ("PAGE", "ROPE", "SPLITS"))
    types: dict[str, Any] = {
        "q_ptr": pointer,
        "q_rope_ptr": pointer if roped else None,
        "k_ptr": pointer,
        "k_rope_ptr": pointer if roped else None,
        "v_ptr": pointer,
        "mask_ptr": mask,
        "bounds_ptr": "*i32" if bounds else None,
        "sinks_ptr": pointer if sinks else None,
        "table_ptr": "*i32" if paged else None,
        "lengths_ptr": "*i32" if paged else None,
        "out_ptr": "*fp32" if split > 1 else pointer,
        "sums_ptr": "*fp32" if split > 1 else None,
        "tops_ptr": "*fp32" if split > 1 else None,
        **dict.fromkeys(SIZES, "i32"),
        "scale": "fp32",
        "softcap": "fp32",
        **{f"{tensor}_{of}": "i32" for tensor in STRIDES for of in "bht"},
        **dict.fromkeys(("bounds_b", "bounds_q", "table_b"), "i32"),
    }
    return Case(name, launch, types)


def _combine(name: str, launch: Launch, dtype: str, *, lengths: bool, sinks: bool = False) -> Case:
    types: dict[str, Any] = {
        **dict.fromkeys(("parts_ptr", "sums_ptr", "tops_ptr"), "*fp32"),
        "sinks_ptr": f"*{dtype}" if sinks else None,
        "bounds_ptr": None,
        "lengths_ptr": "*i32" if lengths else None,
        "out_ptr": f"*{dtype}",
        **dict.fromkeys(("rows", "heads", "queries", "keys", "causal_offset", "window", "bounds_b", "bounds_q"), "i32"),
    }
    return Case(name, launch, types)


def cases() -> Iterator[Case]:
    for heads, kv_heads, width in ((8, 8, 64), (32, 8, 128), (128, 8, 128), (16, 2, 256)):
        sizes = attention.Sizes(16, kv_heads, heads // kv_heads, 1, 4096, width, width, page=128)
        launch, _ = _launches(sizes)
        yield _walk(f"attention bf16 paged {heads}/{kv_heads} x {width}", launch, "bf16")
    one = attention.Sizes(1, 8, 4, 1, 8192, 128, 128, page=128)
    launch, combine = _launches(one)
    assert combine is not None
    yield _walk("attention fp16 paged 32/8 x 128, one sequence", launch, "fp16")
    yield _combine("combine fp16 32 x 128", combine, "fp16", lengths=True)
    small = attention.Sizes(16, 8, 4, 1, 4096, 128, 128, page=16)
    yield _walk("attention bf16 pages of 16", _launches(small)[0], "bf16")
    cached = attention.Sizes(4, 8, 4, 1, 4096, 128, 128)
    yield _walk("attention bf16 bool mask, bounds", _launches(cached, keys_only=True)[0], "bf16", mask="*i8", bounds=True)
    yield _walk("attention bf16 added mask", _launches(cached, keys_only=True, additive=True)[0], "bf16", mask="*bf16")
    gemma = _launches(one, window=True, causal=True, from_end=True, softcap=True)[0]
    yield _walk("attention bf16 softcap, window, causal from the end", gemma, "bf16")
    wide = attention.Sizes(16, 8, 8, 1, 4096, 64, 64, page=128)
    yield _walk("attention bf16 sinks, window", _launches(wide, window=True, causal=True, from_end=True)[0], "bf16", sinks=True)
    few = attention.Sizes(16, 8, 4, 4, 4096, 128, 128, page=128)
    yield _walk("attention bf16 4 queries, causal from the end", _launches(few, causal=True, from_end=True)[0], "bf16")
    prompt = attention.Sizes(2, 8, 4, 512, 512, 128, 128)
    yield _walk("attention bf16 bool mask of each query", _launches(prompt)[0], "bf16", mask="*i8", bounds=True)
    odd = attention.Sizes(4, 2, 7, 1, 4096, 80, 80, page=128)
    yield _walk("attention fp16 paged 14/2 x 80", _launches(odd)[0], "fp16")
    joined = attention.Sizes(4, 16, 1, 512, 512, 128, 128, rope_width=64)
    yield _walk("attention bf16 keys in two parts, causal", _launches(joined, causal=True)[0], "bf16")
    for heads in (16, 128):
        latent = attention.Sizes(16, 1, heads, 1, 4096, 512, 512, rope_width=64, page=128)
        yield _walk(f"attention bf16 latent, {heads} heads", _launches(latent, latent=True)[0], "bf16")
    launch, combine = _launches(attention.Sizes(1, 1, 16, 1, 8192, 512, 512, rope_width=64, page=128), latent=True)
    assert combine is not None
    yield _walk("attention bf16 latent, one sequence", launch, "bf16")
    yield _combine("combine bf16 16 x 512, sinks", combine, "bf16", lengths=True, sinks=True)
    for additive in (False, True):
        types = {"mask_ptr": "*bf16" if additive else "*i8", "bounds_ptr": "*i32", "hidden": "fp32"}
        numbers = dict.fromkeys(("rows", "queries", "heads", "keys", "mask_b", "mask_h", "mask_t"), "i32")
        launch = attention.mask_bounds_launch(16, 8192, DEVICE, additive=additive)
        yield Case(f"mask_bounds {'bf16' if additive else 'bool'}", launch, types | numbers)
