"""bishengir-compile of the package ascendnpu-ir: from linalg to the module that the closed code generator would get.

bishengir-compile plans the unified buffer, double buffering and synchronisation, and then calls `hivmc`, which is part of CANN. Here a stub
stands for hivmc: it says that it has the right version, and succeeds. What hivmc does (instructions, registers, linking the device
library) is the part that the gate cannot see.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .result import Overflow

TIMEOUT = 300.0  # seconds; a kernel takes less than one
ERROR_LENGTH = 800
UB_BLOCK = 32  # bytes: buffers start at multiples of it

STUB = """\
#!/bin/sh
if [ "$1" = "--version" ]; then echo "hivmc 1.2.0 (00000000 2026-01-01)"; exit 0; fi
before=; for argument in "$@"; do [ "$before" = "-o" ] && : > "$argument" && : > "$argument.o"; before=$argument; done
exit 0
"""

# Options of triton-ascend (NPUOptions) to flags, as in its linalg_to_bin_enable_npu_compile_A2_A3; None leaves a flag out.
FLAGS = {
    "multibuffer": "enable-auto-multi-buffer",
    "enable_auto_bind_sub_block": "enable-auto-bind-sub-block",
    "enable_hivm_auto_cv_balance": "enable-hivm-auto-cv-balance",
    "sync_solver": "enable-hivm-graph-sync-solver",
    "unit_flag": "enable-hivm-unit-flag-sync",
    "inject_barrier_all": "enable-hivm-inject-barrier-all-sync",
    "inject_block_all": "enable-hivm-inject-block-all-sync",
    "limit_auto_multi_buffer_only_for_local_buffer": "limit-auto-multi-buffer-only-for-local-buffer",
    "set_workspace_multibuffer": "set-workspace-multibuffer",
    "tile_mix_vector_loop": "tile-mix-vector-loop",
    "tile_mix_cube_loop": "tile-mix-cube-loop",
    "limit_auto_multi_buffer_of_local_buffer": "limit-auto-multi-buffer-of-local-buffer",
    "disable_auto_inject_block_sync": "disable-auto-inject-block-sync",
}

_NOTE = re.compile(r"\[NOTE\] (.*)")
_OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits")
_GAVE_UP = re.compile(r"set enable-auto-multi-buffer to false")
_TELLING = re.compile(r"error|ERROR|overflow|Assert|unsupported")
_LOCATION = re.compile(r'loc\("[^"]*"(?::\d+)*\): ')


@dataclass(frozen=True)
class Compilation:
    """What bishengir-compile made of a module.

    Attributes:
        module: the final module; None where it failed.
        error: why it failed, "" where it did not.
        notes: what it decided by itself.
        overflow: the memory that was too small.
        memory: peak use of each on-chip memory in bytes.
        lost_double_buffering: why double buffering is not what it should be, "" where it is.
    """

    module: str | None
    error: str
    notes: tuple[str, ...]
    overflow: Overflow | None
    memory: Mapping[str, int]
    lost_double_buffering: str


def package() -> Path:
    """The folder of the installed ascendnpu-ir."""
    spec = importlib.util.find_spec("ascendnpuir")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("ascendnpu-ir is not installed")
    return Path(spec.origin).parent


def command(source: Path, soc: str, options: Mapping[str, Any]) -> list[str]:
    """The command that triton-ascend runs on Atlas A2 and A3, with what the gate adds to look inside.

    Memory display needs threading disabled: without that bishengir-compile 1.2.0 crashes now and then.
    """
    flags = [f"--{flag}={options[name]}" for name, flag in FLAGS.items() if options.get(name) is not None]
    stages = ["--enable-hfusion-compile=true", "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true"]
    inspection = ["--mlir-disable-threading", "--enable-memory-display", f"--save-temps={source.parent / 'ir'}"]
    compiler = package() / "bin" / "bishengir-compile"
    return [str(compiler), str(source), f"--target={soc}", *flags, *stages, *inspection, "-o", str(source.parent / "kernel")]


def compile_linalg(linalg: str, soc: str, options: Mapping[str, Any], folder: Path) -> Compilation:
    """Compile a module in an empty folder of its own."""
    stub = folder / "stub" / "hivmc"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    source = folder / "kernel.ttadapter.mlir"
    source.write_text(linalg)
    variables = {**os.environ, "PATH": os.pathsep.join([str(stub.parent), os.environ.get("PATH", os.defpath)])}
    done = subprocess.run(
        command(source, soc, options),
        cwd=folder,  # where it leaves memory_info_*.json
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        check=False,
    )
    error = f"bishengir-compile ended with status {done.returncode}: {summary(done.stdout)}" if done.returncode else ""
    records = [record for file in sorted(folder.glob("memory_info_*.json")) for record in json.loads(file.read_text()).get("Record", [])]
    return Compilation(
        module=None if error else (folder / "ir" / "module.hivm.opt.mlir").read_text(),
        error=error,
        notes=tuple(note.strip() for note in _NOTE.findall(done.stdout)),
        overflow=overflow(done.stdout),
        memory=peaks(records),
        lost_double_buffering=lost_double_buffering(done.stdout, records, options),
    )


def summary(log: str) -> str:
    """The lines of a log that say what went wrong, without the paths of temporary files."""
    lines = [_LOCATION.sub("", line) for line in log.splitlines()]
    telling = [line for line in lines if _TELLING.search(line) and not _NOTE.match(line)]
    return "\n".join(telling or lines)[:ERROR_LENGTH]


def overflow(log: str) -> Overflow | None:
    """The memory that a log says is too small. The log counts in bits."""
    match = _OVERFLOW.search(log)
    return Overflow(match[1], int(match[2]) // 8, int(match[3]) // 8) if match else None


def peaks(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Peak use of each memory in bytes. In the compiler's records offsets are bytes and extents are bits."""
    peak: dict[str, int] = {}
    for record in records:
        ends = [end for buffer in record.get("memory_info_array", []) for _, end in _slots(buffer)]
        peak[record["scope"]] = max([peak.get(record["scope"], 0), *ends])
    return peak


def _slots(buffer: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(start, end) in bytes of each copy of a buffer; two where it is double-buffered."""
    size = -(-buffer["extent"] // (8 * UB_BLOCK)) * UB_BLOCK
    return [(offset, offset + size) for offset in buffer["offset"]]


def lost_double_buffering(log: str, records: Iterable[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """Why transfers do not overlap with computation, or not as far as they should; "" where they do.

    The compiler gives double buffering up for the whole kernel with a note. Before that it saves memory in silence: it lays one of a
    buffer's two copies over another buffer, whose use the next transfer must then wait for. (Buffers with the same copies are one: an
    operation in place.)
    """
    if options.get("multibuffer") is False:
        return "the option multibuffer is off"
    if _GAVE_UP.search(log):
        return "the compiler gave it up to fit the memory"
    shared = sum(_shared(record.get("memory_info_array", [])) for record in records if record["scope"] == "ub")
    return f"{shared} double-buffered areas share memory with other buffers" if shared else ""


def _shared(buffers: Sequence[Mapping[str, Any]]) -> int:
    """How many double-buffered areas overlap with a buffer that has other copies."""
    areas = {tuple(_slots(buffer)) for buffer in buffers}
    return sum(any(_overlap(area, other) for other in areas if other != area) for area in areas if len(area) > 1)


def _overlap(area: Iterable[tuple[int, int]], other: Sequence[tuple[int, int]]) -> bool:
    return any(start < other_end and other_start < end for start, end in area for other_start, other_end in other)


def device_libraries() -> list[bytes]:
    """The device libraries of Atlas A2 and A3, which hivmc links (those named .c220 and .c310 are for others)."""
    return [path.read_bytes() for path in sorted((package() / "lib").glob("meta_op*.bc")) if not re.search(r"\.c\d+\.bc$", path.name)]


def missing_functions(module: str, libraries: Iterable[bytes]) -> list[str]:
    """Functions that a module declares and no library defines: hivmc could not link it. Names are in a library's string table."""
    declared = sorted(set(re.findall(r"func\.func private @(\w+)\(", module)))
    libraries = list(libraries)
    symbols = {name: f"_mlir_ciface_{name.removeprefix('_mlir_ciface_')}".encode() for name in declared}
    return [name for name in declared if not any(symbols[name] in library for library in libraries)]
