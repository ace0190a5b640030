"""Compiles one kernel for Ascend as far as this is possible without CANN. Runs in the ascend environment only.

| stage | what runs | what it proves |
|---|---|---|
| ttir | Triton's front end and its common passes | the kernel is Triton, with these types and constants |
| linalg | triton-adapter-opt, as triton-ascend calls it | its memory accesses have a form that Ascend has |
| hivm | bishengir-compile, as triton-ascend calls it on A2 and A3 | it fits the core's memories; what became of each operation |
| link | names in the device library | every function that the module calls exists |
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from triton._C.libtriton import ir
from triton.backends.ascend import compiler as ascend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from . import bishengir
from .case import Case
from .result import Result, Stage, Subject
from .scalar_loops import scalar_loops

T = TypeVar("T")

LIBRARIES = bishengir.device_libraries()  # read once, before the worker forks


def compile_case(subject: Subject, case: Case, soc: str) -> Result:
    """Take a case through the stages. A failure is part of the result: nothing is raised for it."""
    stages = _Stages()
    lowering = stages.run("ttir", lambda: _Lowering(case, soc))
    linalg = stages.run("linalg", lowering.linalg) if lowering else None
    if lowering is None or linalg is None:
        return Result(subject, soc, stages.done)
    with tempfile.TemporaryDirectory() as folder:
        made = stages.run("hivm", lambda: bishengir.compile_linalg(linalg, soc, lowering.metadata, Path(folder)))
    if made is None:
        return Result(subject, soc, stages.done)
    if made.module is None:
        stages.fail("hivm", made.error)
    else:
        stages.run("link", functools.partial(_link, made.module))
    return Result(
        subject,
        soc,
        stages.done,
        memory=made.memory,
        overflow=made.overflow,
        scalar_loops=scalar_loops(made.module or ""),
        warnings=made.notes,
        lost_double_buffering=made.lost_double_buffering,
    )


class _Stages:
    """The stages that have run."""

    def __init__(self) -> None:
        self.done: dict[str, Stage] = {}

    def run(self, name: str, work: Callable[[], T]) -> T | None:
        """What a stage makes, or None where it fails; a compiler written in Python can fail with any exception."""
        start = time.perf_counter()
        made, error = None, ""
        try:
            made = work()
        except subprocess.CalledProcessError as failure:
            error = f"{Path(failure.cmd[0]).name} ended with status {failure.returncode}: {bishengir.summary(_output(failure))}"
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"[-bishengir.ERROR_LENGTH :]
        self.done[name] = Stage(round(time.perf_counter() - start, 6), error)
        return made

    def fail(self, name: str, error: str) -> None:
        self.done[name] = Stage(self.done[name].seconds, error)


def _output(failure: subprocess.CalledProcessError) -> str:
    return b"\n".join(filter(None, (failure.stderr, failure.stdout))).decode("utf-8", "replace")


class _Lowering:
    """A kernel in TTIR, as a launch of the case would have it compiled, on the way to linalg."""

    def __init__(self, case: Case, soc: str) -> None:
        kernel, options = case.launch.kernel, dict(case.launch.options)
        types = {name: kind for name, kind in case.types.items() if kind is not None}
        constants = {**case.launch.constants, **{name: None for name, kind in case.types.items() if kind is None}}
        _check_arguments(kernel, types, constants)
        target = GPUTarget("npu", soc, 0)
        backend = make_backend(target)
        self.options = backend.parse_options(options)
        if unknown := sorted(set(options) - set(vars(self.options))):
            raise ValueError(f"triton-ascend has no option {', '.join(unknown)}")
        self.metadata: dict[str, Any] = {"hash": case.name, "target": target, **vars(self.options)}
        self.context = ir.context()  # the module lives in it
        ir.load_dialects(self.context)
        backend.load_dialects(self.context)
        signature = {name: types[name] for name in kernel.arg_names if name in types}
        # torch's allocations are aligned, whereas a number may be any
        pointers = {index: 16 for index, name in enumerate(kernel.arg_names) if types.get(name, "").startswith("*")}
        source = ASTSource(kernel, signature, constants, ascend.AscendAttrsDescriptor.from_hints(pointers))
        module = source.make_ir(self.options, backend.get_codegen_implementation(), backend.get_module_map(), self.context)
        self.module = ascend.make_ttir(module, self.metadata, self.options)

    def linalg(self) -> str:
        text, self.metadata = ascend._parse_linalg_metadata(
            ascend.ttir_to_linalg(self.module, self.metadata, self.options, named_ops=True), self.metadata
        )
        return str(text)


def _check_arguments(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> None:
    """A launch passes every argument, and what it compiles in are its `tl.constexpr` arguments and those that are None."""
    for parameter in kernel.params:
        name = parameter.name
        if (name in types) == (name in constants):
            raise TypeError(f"argument {name} needs a type or a value{', not both' if name in types else ''}")
        if parameter.is_constexpr and name in types:
            raise TypeError(f"argument {name} is a constexpr: it needs a value, not a type")
        if not parameter.is_constexpr and constants.get(name) is not None:
            raise TypeError(f"argument {name} is no constexpr: it needs a type, not a value")
    if unknown := sorted({*types, *constants} - set(kernel.arg_names)):
        raise TypeError(f"{kernel.__name__} has no argument {', '.join(unknown)}")


def _link(module: str) -> None:
    if not LIBRARIES:
        raise FileNotFoundError("ascendnpu-ir has no device library")
    if missing := bishengir.missing_functions(module, LIBRARIES):
        raise LookupError(f"not in the device library: {', '.join(missing)}")
