"""`explain`: what npu_fusion would do to a function, without running it."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from .backend import FusionBackend
from .config import FusionConfig
from .errors import NpuFusionError
from .graph_breaks import break_counts, break_reason, describe, title_of
from .report import FusionReport
from .torch_private import reset_code


def explain(
    fn_or_module: Callable[..., Any],
    /,
    *args: Any,
    config: FusionConfig | Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> FusionReport:
    """Compile a function or module for the given inputs and report what was fused, what was not and why.

    Compilation is that of `torch.compile(..., backend="npu_fusion")` under `no_grad`, with Dynamo's configuration as it stands. A fused
    graph never runs, so the target need not be there, and the inputs and parameters may be fake or meta tensors. Where Dynamo breaks the
    graph, and must have values to go on, the graphs run unfused on the device of the inputs; a function that is one graph does not run at
    all, and leaves its inputs (a cache, say) as they were. What was compiled of the function before stays compiled.

    Args:
        fn_or_module: what would be given to `torch.compile`; a compiled module or function stands for what it was compiled from.
        args, kwargs: example inputs.
        config: a `FusionConfig`, or its options; `target` may be one that is not there.
        dynamic: as in `torch.compile`.

    Raises:
        ConfigError: `config` names an unknown option, rule or target.
        Exception: what the function itself raises, or Dynamo where it cannot go on.
    """
    if not isinstance(config, FusionConfig):
        config = FusionConfig.from_options(config)
    session = _Session(config)
    entry = _fresh_entry()
    compiled = torch.compile(entry, backend=session, dynamic=dynamic)
    try:
        with torch.no_grad():
            compiled(_original(fn_or_module), *args, **kwargs)
    except _Done:
        pass
    except Exception as error:
        own = _own_error(error)
        if own is None or own is error:
            raise
        raise own from error
    finally:
        reset_code(entry.__code__)
    session.note_silent_breaks()
    return FusionReport(session.backend.records, graph_breaks=session.breaks, config=config)


_SERIAL = itertools.count()


class _Done(BaseException):
    """Unwinds the explained call once its only graph is compiled. No `except Exception` of the model may stop it."""


class _Session:
    """The Dynamo backend of one `explain` call: compiles as npu_fusion does, and runs nothing of what it compiled."""

    def __init__(self, config: FusionConfig) -> None:
        self.backend = FusionBackend(config, dry_run=True)
        self.breaks: list[str] = []
        self._start = break_counts()

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        reason = break_reason(gm)
        whole = reason is None and break_counts() == self._start
        unfused = self.backend(gm, example_inputs)
        # AOT may have left through an exception, to run again: what is noted from here on is noted once a graph.
        if reason is not None and reason not in self.breaks:
            self.breaks.append(reason)
        return _stop if whole else unfused

    def note_silent_breaks(self) -> None:
        """Breaks where there was no tensor op yet: Dynamo counts them, but hands no graph to a backend."""
        for reason in break_counts() - self._start:
            if not any(known.startswith(title_of(reason)) for known in self.breaks):
                self.breaks.append(describe(reason))


def _stop(*_: Any) -> Any:
    raise _Done


def _entry(self: Any, *args: Any, **kwargs: Any) -> Any:
    # `self`, so that module paths and guards read as they do for a compiled module
    return self(*args, **kwargs)


def _fresh_entry() -> types.FunctionType:
    """A function with a code object of its own: Dynamo caches by code, so nothing is kept on, or taken from, the user's function.

    Its name is its own too: under name and line Dynamo remembers which sizes varied, and would make them dynamic the next time.
    """
    name = f"explain_{next(_SERIAL)}"
    return types.FunctionType(_entry.__code__.replace(co_name=name), globals(), name)


def _original(fn_or_module: Any) -> Any:
    """What a compiled function or module was made of; anything else as it is."""
    inner = getattr(fn_or_module, "_orig_mod", None)
    return inner if inner is not None else getattr(fn_or_module, "_torchdynamo_orig_callable", fn_or_module)


def _own_error(error: Exception) -> NpuFusionError | None:
    """The error of ours that Dynamo wrapped, if that is what it is."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NpuFusionError):
            return cause
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return None
