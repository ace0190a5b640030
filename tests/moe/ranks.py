"""Runs functions on several gloo processes of one machine, which are forks of one that has imported what they need."""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_IMPORTED_ONCE = (
    "npu_fusion",
    "pytest",
    "torch._dynamo.convert_frame",
    "torch._export.db",
    "torch._functorch.aot_autograd",
    "torch._inductor.fx_passes",
    "torch._inductor.sizevars",
    "torch.export._trace",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama")),
)


def _serve(rank: int, ranks: int, port: int, inbox: Any, outbox: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    while (job := inbox.get()) is not None:
        function, args = job
        torch.manual_seed(0)
        torch.compiler.reset()
        try:
            outbox.put((rank, None, function(*args)))
        except BaseException:
            outbox.put((rank, traceback.format_exc(), None))
    dist.destroy_process_group()


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED_ONCE))
    return context


def start_importing() -> None:
    """Let the process of which ranks are forked import what they need, while this one does other things."""
    _context()
    forkserver.ensure_running()


class Ranks:
    """Some processes with a gloo group, which run functions of a test module."""

    def __init__(self, ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = _context()
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(ranks)]
        self._processes = [
            context.Process(target=_serve, args=(rank, ranks, port, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, ending: int | None = None) -> list[Any]:
        """The results of `function(*args)` on all ranks; raises AssertionError with the traceback of one that failed.

        Args:
            ending: a rank whose process the function ends; its result is None.
        """
        for inbox in self._inboxes:
            inbox.put((function, args))
        results = dict.fromkeys(range(len(self._inboxes)))
        for _ in range(len(results) - (ending is not None)):
            rank, failure, result = self._answer(time.monotonic() + timeout, ending)
            assert failure is None, f"rank {rank}:\n{failure}"
            results[rank] = result
        return list(results.values())

    def _answer(self, until: float, ending: int | None) -> tuple[int, str | None, Any]:
        while True:
            try:
                answer: tuple[int, str | None, Any] = self._outbox.get(timeout=1.0)
                return answer
            except queue.Empty:
                alive = [process.is_alive() for rank, process in enumerate(self._processes) if rank != ending]
                assert all(alive), "a rank has ended"
                assert time.monotonic() < until, "a rank does not answer"

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
