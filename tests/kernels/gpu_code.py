"""Compiles kernels to machine code of an NVIDIA GPU (sm_90) where there is none: Triton's compiler and ptxas need no device.

    tools/run -m tests.kernels.gpu_code [KERNEL...]

A process of its own, because elsewhere in the tests Triton interprets. The kernels are those of tests/kernels/cases and
gpu_cases, planned for a GPU; a few cases of each, of different plans. Prints a JSON object a case.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 227 * 1024  # of a program, on sm_90
CASES = 2  # of a kernel
FOLDERS = ("cases", "gpu_cases")  # what Ascend has as well, and what GPUs alone have


@dataclass(frozen=True)
class Code:
    """What became of a case: the bytes of shared memory that a program takes, or why there is no code."""

    kernel: str
    case: str
    shared: int = 0
    error: str = ""


def compile_all() -> list[Code]:
    """What became of every kernel, from a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu_code"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the compiling process ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return [Code(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def selected(only: Sequence[str]) -> Iterator[Any]:
    """The first and the last case of each kernel, of different plans."""
    from npu_fusion.kernels.launch import Device

    gpu = Device("cuda", cores=132, cube_cores=132)
    cases = []
    for path in (path for folder in FOLDERS for path in sorted((ROOT / "tests" / "kernels" / folder).glob("*.py"))):
        module = importlib.import_module(f"tests.kernels.{path.parent.name}.{path.stem}")
        module.DEVICE = gpu  # type: ignore[attr-defined]
        cases += module.cases()
    counts: Counter[str] = Counter()
    for case in [*cases[::2], *cases[1::2][::-1]]:
        name = case.launch.kernel.__name__
        if counts[name] < CASES and (not only or name in only):
            counts[name] += 1
            yield case


def compile_case(case: Any) -> Code:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, constants = case.launch.kernel, dict(case.launch.constants)
    constants |= {name: None for name, kind in case.types.items() if kind is None}
    signature = {name: "constexpr" if name in constants else case.types[name] for name in kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if str(signature[name]).startswith("*")}
    try:
        made = compile(ASTSource(kernel, signature, constants, pointers), GPUTarget("cuda", 90, 32), dict(case.launch.options))
    except Exception as error:  # whatever a compiler raises is the case's result
        return Code(kernel.__name__, case.name, error=f"{type(error).__name__}: {error}"[-1000:])
    return Code(kernel.__name__, case.name, made.metadata.shared)


def main() -> None:
    from tests.ascend_gate.worker import add_package

    add_package(ROOT / "npu_fusion")  # without torch
    for case in selected(sys.argv[1:]):
        print(json.dumps(asdict(compile_case(case))), flush=True)


if __name__ == "__main__":
    main()
