"""What the Ascend gate compiles of kernels/rope_norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import rope_norm
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
TENSORS = ("q", "k", "v", "q_out", "k_out", "v_out", "q_weight", "k_weight", "cos", "sin", "key_cache", "value_cache")
STRIDES = [f"{tensor}_{dim}" for tensor in TENSORS[:6] for dim in ("batch", "token", "head")]
TABLE_STRIDES = [f"{tensor}_{dim}" for tensor in ("cos", "sin", "positions") for dim in ("batch", "token")]
CACHE_STRIDES = [f"{tensor}_{dim}" for tensor in ("key_cache", "value_cache") for dim in ("block", "token", "head")]


def _case(
    dtype: str,
    heads: tuple[int, int],
    head_dim: int,
    *,
    without: tuple[str, ...] = ("key_cache", "value_cache"),
    rotary_dim: int = 0,
    gathered: bool = False,
    **plan: Any,
) -> Case:
    """A call with all tensors but those named."""
    launch = rope_norm.qkv_norm_rotary_launch(4096, *heads, head_dim, rotary_dim or head_dim, DEVICE, **plan)
    types: dict[str, str | None] = {f"{name}_ptr": None if name in without else f"*{dtype}" for name in TENSORS}
    types |= {"slots_ptr": None if "key_cache" in without else "*i64", "positions_ptr": "*i64" if gathered else None}
    numbers = dict.fromkeys(("rows", "tokens", "page", *STRIDES, *TABLE_STRIDES, *CACHE_STRIDES), "i32") | {"eps": "fp32"}
    what = "qk" if "v" in without else "qkv" if "key_cache" in without else "qkv cache"
    options = " ".join(f"{name}={value}" for name, value in plan.items()) + (" gathered" if gathered else "")
    return Case(f"{what} {dtype} {heads[0]}+{heads[1]} x {rotary_dim or head_dim}/{head_dim} {options}".strip(), launch, types | numbers)


QK = ("v", "v_out", "key_cache", "value_cache")
EXACT = {"round_to": "bf16", "q_product": "bf16", "k_product": "bf16", "between": "bf16"}


def cases() -> Iterator[Case]:
    yield _case("bf16", (32, 8), 128, without=QK)
    yield _case("bf16", (32, 8), 128, without=QK, full=True, norm_last=True, sign=-1)
    yield _case("bf16", (8, 4), 256, without=QK, weight_offset=1, **EXACT)
    yield _case("fp16", (64, 8), 64, without=QK, layout="interleaved")
    yield _case("bf16", (96, 8), 128, without=QK, layout="mla", rotary_dim=64)
    for layout in ("half", "interleaved"):
        yield _case("bf16", (32, 8), 128, layout=layout, full=True)
    yield _case("bf16", (64, 4), 128)
    yield _case("fp16", (28, 4), 128, norm=False, without=("key_cache", "value_cache", "q_weight", "k_weight"))
    yield _case("bf16", (16, 2), 256, rotary_dim=64, weight_offset=1)
    yield _case("fp32", (32, 8), 128)
    yield _case("bf16", (32, 8), 128, without=(), gathered=True)
    yield _case("bf16", (64, 8), 128, without=("k_out", "v_out"), gathered=True)
    yield _case("fp16", (128, 8), 128, without=("k_out", "v_out"), layout="interleaved", rotary_dim=64)
