"""Runs a function in processes of their own, several at a time. Standard library only.

A compiler may take its process with it: one process a job, so that it costs one job. They are forks, which start in milliseconds with
everything imported; the caller must have no threads.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

Job = TypeVar("Job")
Answer = TypeVar("Answer")

_FORK = multiprocessing.get_context("fork")


def run_isolated(
    function: Callable[[Job], Answer], jobs: Sequence[Job], processes: int, died: Callable[[Job, str], Answer]
) -> list[Answer]:
    """The answers of `function` to `jobs`, in their order.

    Args:
        processes: how many run at a time.
        died: the answer for a job whose process ended without one, or raised; it is told how.
    """
    answers: dict[int, Answer] = {}
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    while waiting or running:
        while waiting and len(running) < max(1, processes):
            index, job = waiting.pop()
            running.update([_start(function, index, job)])
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            index, process = running.pop(ready)
            try:
                answer, failure = ready.recv()
                process.join()
                answers[index] = died(jobs[index], failure) if failure else answer
            except EOFError:
                process.join()
                answers[index] = died(jobs[index], _end(process.exitcode or 0))
            ready.close()
    return [answers[index] for index in range(len(jobs))]


def _start(function: Callable[[Job], Answer], index: int, job: Job) -> tuple[Connection, tuple[int, BaseProcess]]:
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_answer, args=(function, job, sender))
    process.start()
    sender.close()  # so that the pipe ends with the process
    return receiver, (index, process)


def _answer(function: Callable[[Job], Answer], job: Job, sender: Connection) -> None:
    try:
        sender.send((function(job), ""))
    except Exception:  # whatever it is, the caller is told, and gives the job the answer that `died` makes of it
        sender.send((None, f"the process raised:\n{traceback.format_exc()}"))


def _end(status: int) -> str:
    return f"the process died: {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"
