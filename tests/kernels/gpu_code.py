"""Compiles kernels to machine code of an NVIDIA GPU (sm_90) where there is none: Triton's compiler and ptxas need no device.

    tools/run -m tests.kernels.gpu_code [KERNEL...]

A process of its own, because elsewhere in the tests Triton interprets. The kernels are those of tests/kernels/cases and gpu_cases, planned
for a GPU; a few cases of each, of different plans. Prints a JSON object a case.

Also counts reductions and scans over scattered lanes. Triton 3.6 exchanges values between neighbouring lanes only: where the lanes that
share a row are not a run of adjacent bits of the lane's number, as they may be after a reshape, it reduces over those of other rows
(triton-lang/triton#9219). The interpreter does not show it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 227 * 1024  # of a program, on sm_90
FOLDERS = ("cases", "gpu_cases")  # of kernels that Ascend has as well, and that GPUs alone have


@dataclass(frozen=True)
class Code:
    """What became of a case: the bytes of shared memory that a program takes, reductions over scattered lanes, or why there is no code."""

    kernel: str
    case: str
    shared: int = 0
    scattered: int = 0
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
    cases: dict[str, list[Any]] = {}
    paths = (path for folder in FOLDERS for path in sorted((ROOT / "tests" / "kernels" / folder).glob("*.py")))
    for path in paths:
        module = importlib.import_module(f"tests.kernels.{path.parent.name}.{path.stem}")
        module.DEVICE = gpu  # type: ignore[attr-defined]
        for case in module.cases():
            cases.setdefault(case.launch.kernel.__name__, []).append(case)
    for name, of_kernel in cases.items():
        if not only or name in only:
            yield from of_kernel[:1] + of_kernel[1:][-1:]


_LINEAR = re.compile(r"^(#\w+) = #ttg\.linear<\{.*?lane = (\[.*?\]), warp = ", re.MULTILINE)
_REDUCTION = re.compile(r'"tt\.(?:reduce|scan)"\(.*?\baxis = (\d+) : .*?\}\) : \(tensor<[^,]+, (.*?)>[,)]', re.DOTALL)
_SLICE = re.compile(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>")


def scattered_reductions(ttgir: str) -> int:
    """Reductions and scans over an axis along which the lanes of a warp are not a run of adjacent bits of the lane's number.

    Layouts that are not linear (blocked, of products) and slices of such have none.
    """
    lanes = {name: json.loads(bases) for name, bases in _LINEAR.findall(ttgir)}
    count = 0
    for axis, layout in _REDUCTION.findall(ttgir):
        bases = _lane_bases(layout, lanes)
        bits = [bit for bit, base in enumerate(bases) if base[int(axis)]]
        count += bits != list(range(bits[0], bits[0] + len(bits))) if bits else 0
    return count


def _lane_bases(layout: str, lanes: dict[str, list[list[int]]]) -> list[list[int]]:
    """Where each bit of the lane's number leads to, axis by axis."""
    within = _SLICE.fullmatch(layout)
    if within is None:
        return lanes.get(layout, [])
    dim = int(within[1])
    return [base[:dim] + base[dim + 1 :] for base in _lane_bases(within[2], lanes)]


def compile_case(case: Any) -> Code:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, constants = case.launch.kernel, dict(case.launch.constants)
    constants |= {name: None for name, kind in case.types.items() if kind is None}
    signature = {name: "constexpr" if name in constants else case.types[name] for name in kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if str(signature[name]).startswith("*")}
    try:
        source = GluonASTSource if kernel.is_gluon() else ASTSource
        made = compile(source(kernel, signature, constants, pointers), GPUTarget("cuda", 90, 32), dict(case.launch.options))
    except Exception as error:  # whatever a compiler raises is the case's result
        return Code(kernel.__name__, case.name, error=f"{type(error).__name__}: {error}"[-1000:])
    return Code(kernel.__name__, case.name, made.metadata.shared, scattered_reductions(made.asm["ttgir"]))


def main() -> None:
    from tests.ascend_gate.worker import add_package

    add_package(ROOT / "npu_fusion")  # without torch
    for case in selected(sys.argv[1:]):
        print(json.dumps(asdict(compile_case(case))), flush=True)


if __name__ == "__main__":
    main()
