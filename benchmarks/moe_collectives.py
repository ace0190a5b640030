"""MoE dispatch and combine over all GPUs of this machine: right, replayed, bounded in time, and how fast beside NCCL.

    python benchmarks/moe_collectives.py [--quick] [--seconds 150] [--only correct,replay,late,speed]

Prints one line a check and one table, in the form of DeepEP's: bytes that reach a rank, time, GB/s a direction. Every step is bounded; a
step that fails says so, and the others run. Needs two GPUs or more of one host; NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

HIDDEN, EXPERTS, TOP_K = 7168, 256, 8
SMALL, LARGE = 128, 4096
STEPS = ("correct", "gradient", "replay", "speed", "late")


def inputs(tokens: int, seed: int, kind: str = "random", hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed * 1000 + dist.get_rank())
    ids = torch.rand(tokens, EXPERTS, generator=generator, device="cuda").topk(TOP_K).indices
    if kind == "one":
        ids = torch.arange(TOP_K, device="cuda").expand(tokens, TOP_K).contiguous()
    if kind == "absent":
        ids = torch.where(torch.rand(ids.shape, generator=generator, device="cuda") < 0.4, -1, ids)
    x = torch.randn(tokens, hidden, generator=generator, device="cuda").to(torch.bfloat16)
    weights = torch.rand(tokens, TOP_K, generator=generator, device="cuda")
    return x, ids, weights / weights.sum(1, keepdim=True)


def scale_of(slots: Tensor) -> Tensor:
    """What the expert in a slot multiplies by: powers of two, exact in bf16."""
    return torch.exp2((slots % 4).float() - 1)


def layer(x: Tensor, ids: Tensor, weights: Tensor, most: int, **form: Any) -> Tensor:
    """Dispatch, experts that multiply, combine."""
    from npu_fusion import moe

    sent = moe.dispatch(x, ids, weights, EXPERTS, max_tokens=most, **form)
    local = EXPERTS // dist.get_world_size()
    rows = torch.arange(sent.rows.shape[0], device="cuda")
    slot = torch.searchsorted(sent.counts.cumsum(0), rows, right=True) + dist.get_rank() * local
    received = sent.rows.float() * (sent.scales * scale_of(slot))[:, None]
    return moe.combine(received.to(x.dtype), sent)


def expected(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    factor = torch.where(ids >= 0, weights * scale_of(ids), 0).sum(1, keepdim=True)
    return x.float() * factor


def error(y: Tensor, reference: Tensor) -> float:
    if not len(reference):
        return 0.0
    return float((y.float() - reference).norm() / reference.norm().clamp(min=1e-6))


def step_correct(quick: bool) -> dict[str, Any]:
    """Every routing, quantisation and size, eager, against the dense sum; and the transport that served it."""
    from npu_fusion.moe.transport import resolve, transport_of

    found = {}
    for most, tokens in ((SMALL, SMALL - 3 * dist.get_rank()), (SMALL, 1 if dist.get_rank() else 0), (1024, 1000)):
        for kind in ("random", "one", "absent"):
            for quant, bound in (("none", 8e-3), ("int8", 2e-2), ("fp8", 6e-2)):
                x, ids, weights = inputs(tokens, 1, kind)
                found[f"{most}/{tokens}/{kind}/{quant}"] = relative = error(
                    layer(x, ids, weights, most, quant=quant), expected(x, ids, weights)
                )
                if not relative <= bound:
                    raise AssertionError(f"{most}/{tokens}/{kind}/{quant}: error {relative:.3g} > {bound}")
    name = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    transport = type(transport_of(resolve(name, dist.get_world_size()), torch.device("cuda", dist.get_rank()))).__name__
    return {"transport": transport, "checks": len(found), "worst": max(found.values())}


def step_gradient(quick: bool) -> dict[str, Any]:
    x, ids, weights = inputs(256, 2, "absent", hidden=1024)
    x.requires_grad_(), weights.requires_grad_()
    upstream = torch.randn(x.shape, device="cuda")
    actual = torch.autograd.grad((layer(x, ids, weights, 256).float() * upstream).sum(), (x, weights))
    reference = torch.autograd.grad((expected(x, ids, weights) * upstream).sum(), (x, weights))
    worst = [error(a, b) for a, b in zip(actual, reference)]
    if not max(worst) <= 2e-2:
        raise AssertionError(f"errors of gradients (x, weights): {worst}")
    return {"x": worst[0], "weights": worst[1]}


def step_replay(quick: bool) -> dict[str, Any]:
    """A captured layer, replayed with new tokens, routing and counts, against eager and the dense sum."""
    from npu_fusion import moe
    from npu_fusion.errors import CollectiveError

    small = inputs(7, 3, hidden=512)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            moe.dispatch(*small, EXPERTS, max_tokens=77)
            refused = "NOT refused"
        except CollectiveError as found:
            refused = str(found)[:60]
    moe.prepare(max_tokens=SMALL, hidden=HIDDEN, top_k=TOP_K, device="cuda", timeout=20)
    held = inputs(SMALL, 3)
    layer(held[0], held[1], held[2], SMALL)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer(held[0], held[1], held[2], SMALL)
    replays, worst, differs = (100 if quick else 1000), 0.0, 0
    for replay in range(replays):
        new = inputs(SMALL, 10 + replay, ("random", "absent", "one")[replay % 3])
        new[1][(replay * 7 + dist.get_rank() * 31) % (SMALL + 1) :] = -1  # as if there were fewer tokens
        for target, value in zip(held, new):
            target.copy_(value)
        graph.replay()
        if replay % 10 == 0:
            again = layer(held[0], held[1], held[2], SMALL)
            differs += int(not torch.equal(again, result))
        worst = max(worst, error(result, expected(*new)))
    moe.check()
    if not worst <= 8e-3 or differs:
        raise AssertionError(f"worst error {worst:.3g}, {differs} replays differ from eager")
    return {"replays": replays, "worst": worst, "unprepared": refused}


def step_late(quick: bool) -> dict[str, Any]:
    """The last rank stays away: the others' wait ends, results are NaN, and the next call raises with its name."""
    from npu_fusion import moe
    from npu_fusion.errors import CollectiveError

    moe.prepare(max_tokens=SMALL, hidden=HIDDEN, top_k=TOP_K, device="cuda", timeout=2)
    x, ids, weights = inputs(SMALL, 5)
    layer(x, ids, weights, SMALL)
    torch.cuda.synchronize()
    dist.barrier()
    absent = dist.get_world_size() - 1
    if dist.get_rank() == absent:
        time.sleep(8)
        return {"role": "absent"}
    start = time.monotonic()
    y = layer(x, ids, weights, SMALL)
    torch.cuda.synchronize()
    waited = time.monotonic() - start
    wrong = int(torch.isfinite(y).sum())
    try:
        layer(x, ids, weights, SMALL)
    except CollectiveError as found:
        said = str(found)
    else:
        raise AssertionError("the next call did not raise")
    if f"rank {absent}" not in said or waited > 6 or wrong:
        raise AssertionError(f"waited {waited:.1f} s, {wrong} finite results, said {said!r}")
    return {"waited": round(waited, 2), "said": said[:70]}


# --------------------------------------------------------------------- speed


def timed(function: Callable[[], Any], calls: int) -> float:
    """Microseconds a call, of `calls` calls in one CUDA graph: the least of three replays, the most of all ranks."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    best = float("inf")
    for _ in range(3):
        dist.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000 / calls)
    slowest = torch.tensor([best], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def native(x: Tensor, ids: Tensor, ranks: int) -> Callable[[], Tensor]:
    """all_to_all_single of a copy for each choice, sorted by rank (equal blocks of T * K / R * 1.25 rows), as torch users write it."""
    capacity = int(len(x) * TOP_K / ranks * 1.25)
    target = torch.empty(ranks * capacity, x.shape[1], dtype=x.dtype, device="cuda")

    def run() -> Tensor:
        rank = (ids // (EXPERTS // ranks)).flatten()
        order = torch.argsort(rank, stable=True)
        edges = torch.searchsorted(rank[order], torch.arange(ranks, device="cuda"))
        at = (edges[:, None] + torch.arange(capacity, device="cuda")).clamp(max=len(order) - 1).flatten()
        dist.all_to_all_single(target, x[order[at] // TOP_K])
        return target

    return run


def step_speed(quick: bool) -> dict[str, Any]:
    from npu_fusion import moe

    ranks, table = dist.get_world_size(), []
    for tokens, calls in ((SMALL, 20), (LARGE, 4)):
        x, ids, weights = inputs(tokens, 4)
        block = torch.empty(ranks * tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(block)
        bare = timed(functools.partial(dist.all_to_all_single, target, block), calls)
        baseline = timed(native(x, ids, ranks), calls)
        del block, target
        needs = torch.zeros(tokens, ranks, device="cuda").scatter_(1, ids // (EXPERTS // ranks), 1).sum(0)
        peers = [int(n) for rank, n in enumerate(needs.tolist()) if rank != dist.get_rank()]
        for quant in ("none", "int8", "fp8") if tokens == SMALL else ("none",):
            moe.prepare(max_tokens=tokens, hidden=HIDDEN, top_k=TOP_K, device="cuda", quant=quant, timeout=20)
            run = functools.partial(moe.dispatch, x, ids, weights, EXPERTS, max_tokens=tokens, quant=quant)
            sent = run()
            rows = sent.rows if quant == "none" else sent.rows.to(torch.bfloat16)
            dispatch = timed(run, calls)
            combine = timed(functools.partial(moe.combine, rows, sent), calls)
            size = 2 if quant == "none" else 1
            table.append({
                "tokens": tokens, "quant": quant, "rows_to_peers": sum(peers), "dispatch_us": dispatch, "combine_us": combine,
                "dispatch_GBps": sum(peers) * HIDDEN * size / dispatch / 1e3, "combine_GBps": sum(peers) * HIDDEN * 2 / combine / 1e3,
                "nccl_bare_us": bare, "nccl_bare_GBps": (ranks - 1) * tokens * HIDDEN * 2 / bare / 1e3, "native_us": baseline,
            })  # fmt: skip
            del sent, rows
        table.extend(parts(x, ids, weights, tokens, calls))
    return {"table": table}


def parts(x: Tensor, ids: Tensor, weights: Tensor, tokens: int, calls: int) -> list[dict[str, Any]]:
    """The movements by themselves: what travels, without the copies in expert order and the weighted sums."""
    from npu_fusion.moe import plan

    ranks, name = dist.get_world_size(), str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    route = plan.route(ids, ranks, EXPERTS // ranks, tokens)
    ops, form = torch.ops.npu_fusion, {"group": name, "ranks": ranks, "max_tokens": tokens}
    rows = ops.moe_send_rows(x, route, **form)
    sending = timed(lambda: ops.moe_send_rows(x, route, **form), calls)
    returning = timed(lambda: ops.moe_return_rows(rows, route, **form), calls)
    gigabytes = (ranks - 1) * tokens * HIDDEN * 2 / 1e3
    return [
        {
            "tokens": tokens,
            "send_rows_us": sending,
            "return_rows_us": returning,
            "send_GBps": gigabytes / sending,
            "return_GBps": gigabytes / returning,
        }
    ]


def serve(rank: int, ranks: int, port: int, steps: list[str], quick: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    import npu_fusion  # noqa: F401  the ops

    for name in steps:
        start = time.monotonic()
        try:
            outcome = {"ok": True, **globals()[f"step_{name}"](quick)}
        except Exception as found:
            outcome = {"ok": False, "error": f"{type(found).__name__}: {found}"[:1500], "trace": traceback.format_exc()[-2500:]}
        outcome = {"step": name, "rank": rank, "seconds": round(time.monotonic() - start, 1), **outcome}
        trace = outcome.pop("trace", None)
        if rank == 0 or not outcome["ok"] or name == "late":
            print(json.dumps(outcome, default=str), trace or "", sep="\n" if trace else "", flush=True)
        if not outcome["ok"]:
            break  # the ranks may not be in step any more
    os._exit(0)  # a group that a rank has left cannot be taken down in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the replays")
    parser.add_argument("--seconds", type=float, default=140.0, help="after which everything is stopped")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    given = parser.parse_args()
    ranks = torch.cuda.device_count()
    if ranks < 2:
        sys.exit("needs two GPUs of one host")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(json.dumps({"device": torch.cuda.get_device_name(0), "ranks": ranks, "torch": torch.__version__}), flush=True)
    context = mp.get_context("spawn")
    processes = [context.Process(target=serve, args=(rank, ranks, port, given.only.split(","), given.quick)) for rank in range(ranks)]
    for process in processes:
        process.start()
    until = time.monotonic() + given.seconds
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
        if process.is_alive():
            print(json.dumps({"ok": False, "error": f"stopped after {given.seconds:g} s"}), flush=True)
            for other in processes:
                other.kill()
            break


if __name__ == "__main__":
    main()
