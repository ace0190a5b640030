"""What is compiled of kernels/moe_put.py, for GPUs alone: Ascend has ops of its own for this."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from npu_fusion.kernels import moe_put as kernels
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("cuda", cores=132, cube_cores=132)
_CHANNEL = {"peers_ptr": "*i64", "max_tokens": "i32", "me": "i32"}
_WAIT = {**_CHANNEL, "state_ptr": "*i32", "broken_ptr": "*i32", "status_ptr": "*i32", "limit": "i64"}


def _cases(tokens: int, ranks: int, hidden: int, k: int, experts: int, quantised: bool) -> Iterator[Case]:
    name = f"{tokens} tokens {ranks} ranks{' int8' if quantised else ''}"
    words, meta, local = hidden // (4 if quantised else 2), kernels.meta_words(k), experts // ranks
    received = ranks * tokens
    ids = {"ids_ptr": "*i64", "weights_ptr": "*fp32", "scales_ptr": "*fp32" if quantised else None}
    yield Case(
        f"route {name}", kernels.route_launch(tokens, experts, local, k),
        {"ids_ptr": "*i64", "route_ptr": "*i32", "counts_ptr": "*i32", "tokens": "i32", "max_tokens": "i32"},
    )  # fmt: skip
    for with_ids in (True, False):
        extra = meta if with_ids else 0
        given = ids if with_ids else dict.fromkeys(ids)
        yield Case(
            f"put {name} {with_ids}", kernels.put_launch(tokens, k, ranks, words, extra),
            {"payload_ptr": "*i32", **given, "route_ptr": "*i32", "state_ptr": "*i32", **_CHANNEL},
        )  # fmt: skip
        taken = {"ids_ptr": "*i32", "weights_ptr": "*fp32", "scales_ptr": "*fp32"}
        yield Case(
            f"arrive {name} {with_ids}", kernels.arrive_launch(ranks, tokens, k, words, extra, 2**20),
            {"counts_ptr": "*i32", "came_ptr": "*i32", **(taken if with_ids else dict.fromkeys(taken)), **_WAIT},
        )  # fmt: skip
        outputs = {"out_scales_ptr": "*fp32", "source_ptr": "*i32", "counts_ptr": "*i64", "scales_ptr": "*fp32"}
        yield Case(
            f"take {name} {with_ids}", kernels.take_launch(received * min(k, local), local, ranks, words, extra),
            {"out_ptr": "*i32", "came_ptr": "*i32", **(outputs if with_ids else dict.fromkeys(outputs)), **_CHANNEL},
        )  # fmt: skip
        places = {"place_ptr": "*i32", "weights_ptr": "*fp32"}
        yield Case(
            f"reduce_put {name} {with_ids}", kernels.reduce_put_launch(received, k, ranks, hidden, DEVICE),
            {"x_ptr": "*bf16", "state_ptr": "*i32", "rows": "i32", **(places if with_ids else dict.fromkeys(places)), **_CHANNEL},
        )  # fmt: skip
    yield Case(
        f"place {name}", kernels.place_launch(received * k, local, k),
        {**dict.fromkeys(("ids_ptr", "place_ptr", "source_ptr"), "*i32"), "counts_ptr": "*i64",
         **dict.fromkeys(("choices", "rows", "first"), "i32")},
    )  # fmt: skip
    yield Case(
        f"sum_home {name}", kernels.sum_home_launch(tokens, k, ranks, hidden, 2**20, tl.bfloat16, DEVICE),
        {"y_ptr": "*bf16", "route_ptr": "*i32", "tokens": "i32", **_WAIT},
    )  # fmt: skip


def cases() -> Iterator[Case]:
    yield from _cases(128, 2, 7168, 8, 256, False)
    yield from _cases(4096, 8, 4096, 6, 64, True)
