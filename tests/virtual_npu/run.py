"""Run a Python program on the virtual NPU, in the environment that has torch_npu.

    tools/run -m tests.virtual_npu.run [--soc NAME] [--count N] [--trace FILE] script.py args...
    tools/run -m tests.virtual_npu.run -- -m pytest tests/virtual_npu/on_device

Builds the environment (tools/environment.py npu) and the virtual NPU where that is not done yet, then becomes the program. For a
subprocess of a test or a benchmark, see `VirtualNpu`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class VirtualNpuError(RuntimeError):
    """The virtual NPU cannot be built here, or a program failed on it; the message says why."""


@dataclass(frozen=True)
class VirtualNpu:
    """An interpreter with torch_npu, and the folder of the libraries that stand in for CANN's.

    The loader reads the library path when a process starts, so that a program needs a process of its own.
    """

    python: Path
    libraries: Path

    def environment(self, *, soc: str | None = None, count: int | None = None, trace: str | Path | None = None) -> dict[str, str]:
        """The environment variables of a process that has a virtual NPU, this process's own among them.

        Args:
            soc: SoC name that the driver reports (Ascend910B3).
            count: number of devices (1).
            trace: file to which events are appended, a line each (runtime.c has the format); one a process.
        """
        variables = dict(os.environ)
        variables["LD_LIBRARY_PATH"] = _joined(str(self.libraries), variables.get("LD_LIBRARY_PATH"))
        variables["PYTHONPATH"] = _joined(str(ROOT), variables.get("PYTHONPATH"))
        settings = {"SOC": soc, "COUNT": count, "TRACE": Path(trace).resolve() if trace else None}
        return variables | {f"VIRTUAL_NPU_{name}": str(value) for name, value in settings.items() if value is not None}

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        soc: str | None = None,
        count: int | None = None,
        trace: str | Path | None = None,
        variables: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run the interpreter with `arguments` at the top of the checkout; output and error output come back together, as `stdout`.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        return subprocess.run(
            [self.python, *arguments],
            env=self.environment(soc=soc, count=count, trace=trace) | dict(variables or {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout,
        )


def _joined(*paths: str | None) -> str:
    return os.pathsep.join(path for path in paths if path)


def virtual_npu(cache: Path | None = None) -> VirtualNpu:
    """The virtual NPU of this checkout; environment and libraries are built at first.

    Args:
        cache: where libraries are kept (beside the environments).

    Raises:
        VirtualNpuError: one of them cannot be built; the message says what to do.
    """
    try:
        python = environment.python_of("npu")
    except subprocess.CalledProcessError as error:
        raise VirtualNpuError(f"the environment of the virtual NPU cannot be built: {error}") from error
    done = subprocess.run(
        [python, HERE / "build.py", "--cache", cache or environment.cache_root() / "virtual-npu"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise VirtualNpuError(done.stderr.strip())
    return VirtualNpu(python, Path(done.stdout.strip()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a Python program on the virtual NPU.")
    parser.add_argument("--soc", help="SoC name the driver reports (default Ascend910B3)")
    parser.add_argument("--count", type=int, help="number of devices (default 1)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the trace to FILE, replacing it")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="script.py args...")
    arguments = parser.parse_args()
    program: list[str] = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    if not program:
        parser.error("no script given")
    try:
        npu = virtual_npu()
    except VirtualNpuError as error:
        sys.exit(str(error))
    if arguments.trace:
        arguments.trace.write_text("")
    variables = npu.environment(soc=arguments.soc, count=arguments.count, trace=arguments.trace)
    os.execve(npu.python, [str(npu.python), *program], variables)


if __name__ == "__main__":
    main()
