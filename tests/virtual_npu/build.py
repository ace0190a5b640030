"""Build the virtual NPU for the torch_npu installed in this interpreter, and print the folder of its libraries.

    python build.py --cache DIR

torch_npu links against the libraries of CANN and looks further functions up by name at run time. This script reads from torch_npu's own
binaries which names those are, generates a C function for each one that runtime.c does not define, and compiles everything into a single
library. Beside it stands one symbolic link to it under the name of each CANN library that torch_npu loads.

Builds lie side by side in DIR, each under a key of everything that it was made from, so that one that is there is right and is left alone.
Needs nothing but the standard library, gcc and binutils: nothing is imported from torch or torch_npu, and no version is assumed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "runtime.c"
LIBRARY = "libvirtual_npu.so"

# Libraries that are loaded by name, so that no binary lists them as needed.
LOADED_BY_NAME = ("libopapi.so", "libnnopbase.so")
SYSTEM_LIBRARY = re.compile(r"(lib(c|m|dl|rt|util|pthread|stdc\+\+|gcc_s|gomp|z)|ld-linux.*)\.so(\.\d+)?")

# A kernel is a pair: aclnnAdd enqueues what aclnnAddGetWorkspaceSize prepared.
# (aclnn names without a partner control the operator library: they stay absent.)
WORKSPACE = re.compile(r"(acl\w+?)Get(Max)?WorkspaceSize")
# The parts of the runtime interface that torch_npu may look up by name.
RUNTIME_FUNCTION = re.compile(r"acl(rt|mdl|op|tdt)?[A-Z]\w*")

# Subsystems that are not simulated: the graph engine, the transformer boost library, collectives. Calling them raises; taking them down
# succeeds.
UNSUPPORTED = re.compile(r"(_ZNK?(2ge|3atb)|Hccl)(?!\w*(Finalize|Destroy|SetConfig|D[012]Ev))")
TORCH_SYMBOL = re.compile(r"_Z(T[A-Z])?NK?(2at|3c10|4c10d|5torch)|THP[A-Z]")


class BuildError(RuntimeError):
    """This torch_npu, or this machine, is not what the build expects."""


# What is installed


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(f"{name} is not installed for {sys.executable}")
    return Path(spec.origin).parent


def shared_objects(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*.so*") if path.is_file())


def torch_npu_binaries() -> list[Path]:
    package = package_dir("torch_npu")
    if not (package / "lib" / "libtorch_npu.so").is_file():
        raise BuildError(f"{package} has no lib/libtorch_npu.so")
    return shared_objects(package)


def torch_binaries() -> list[Path]:
    package = package_dir("torch")
    return [*shared_objects(package / "lib"), *package.glob("*.so")]


# What the binaries say


def tool_output(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is needed and not found: install gcc and binutils (CC names another C compiler)") from None
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))[:300]}\n{done.stderr[-2000:]}")
    return done.stdout


def undefined_symbols(binaries: Iterable[Path]) -> dict[str, str]:
    """Name -> ELF type of every symbol that must exist and that no versioned library (libc, libstdc++) is named to provide."""
    rows = (line.split() for line in tool_output("readelf", "-W", "--dyn-syms", *binaries).splitlines())
    return {row[7]: row[3] for row in rows if len(row) == 8 and row[6] == "UND" and row[4] == "GLOBAL" and "@" not in row[7]}


def defined_symbols(binaries: Iterable[Path]) -> set[str]:
    listing = tool_output("nm", "-D", "--defined-only", "--format=posix", *binaries)
    return {line.split(None, 1)[0].split("@")[0] for line in listing.splitlines() if " " in line}


def needed_libraries(binaries: Iterable[Path]) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", tool_output("readelf", "-W", "-d", *binaries)))


def acl_literals(binaries: Iterable[Path]) -> set[str]:
    """Every string constant that could name a function of CANN."""
    literal = re.compile(rb"\0(acl\w+)(?=\0)")
    return {name.decode() for binary in binaries for name in literal.findall(binary.read_bytes())}


def in_this_process(names: Iterable[str]) -> set[str]:
    """The names that Python itself or libc provides."""
    process = ctypes.CDLL(None)
    return {name for name in names if hasattr(process, name)}


# What has to be generated


def missing_symbols(npu: list[Path], torch: list[Path]) -> dict[str, str]:
    undefined = undefined_symbols(npu)
    unknown = undefined.keys() - defined_symbols([*npu, *torch])
    unknown -= in_this_process(unknown)
    foreign = sorted(name for name in unknown if TORCH_SYMBOL.match(name))
    if foreign:
        raise BuildError(
            f"the installed torch lacks {len(foreign)} symbols of torch_npu ({foreign[0]}, ...): their versions do not belong together"
        )
    return {name: undefined[name] for name in unknown}


def definition(name: str, elf_type: str) -> str:
    if elf_type == "TLS":
        return f"__thread long long {name}[64];"
    if elf_type == "OBJECT" or re.match(r"_ZT[VIST]", name):
        return f"long long {name}[64];"
    if UNSUPPORTED.match(name):
        return f"UNSUPPORTED({name})"
    return f"SUCCESS({name})"


def kernels_among(names: set[str]) -> set[str]:
    kernels = {match[1] for match in map(WORKSPACE.fullmatch, names) if match} & names
    if not kernels:
        raise BuildError("torch_npu names no aclnn kernel: it does not follow the known scheme")
    return kernels


def looked_up_by_name(npu: list[Path]) -> dict[str, str]:
    """Name -> C definition of what torch_npu finds with dlsym()."""
    names = acl_literals(npu)
    kernels = kernels_among(names)
    succeed = {name for name in names if WORKSPACE.fullmatch(name) or RUNTIME_FUNCTION.fullmatch(name)}
    return {name: f"SUCCESS({name})" for name in succeed} | {name: f"KERNEL({name})" for name in kernels}


def linked_against(npu: list[Path], torch: list[Path]) -> dict[str, str]:
    """Name -> C definition of what the loader must find."""
    return {name: definition(name, kind) for name, kind in missing_symbols(npu, torch).items()}


def missing_libraries(npu: list[Path], torch: list[Path]) -> set[str]:
    present = {path.name for path in [*npu, *torch]}
    return {name for name in needed_libraries(npu) if name not in present and not SYSTEM_LIBRARY.fullmatch(name)} | set(LOADED_BY_NAME)


PREAMBLE = """\
/* Generated by build.py. */
int virtual_npu_launch(const char *kernel);
_Noreturn void virtual_npu_unsupported(const char *function);
#define SUCCESS(name) long name(void) { return 0; }
#define UNSUPPORTED(name) long name(void) { virtual_npu_unsupported(#name); }
#define KERNEL(name) long name(void) { return virtual_npu_launch(#name); }
"""


def generated_source(npu: list[Path], torch: list[Path], written_by_hand: set[str]) -> str:
    lines = linked_against(npu, torch) | looked_up_by_name(npu)
    return PREAMBLE + "\n".join(lines[name] for name in sorted(lines.keys() - written_by_hand)) + "\n"


# Compiling


def compile_library(npu: list[Path], torch: list[Path], out: Path) -> None:
    compiler = [os.environ.get("CC", "gcc"), "-O1", "-fPIC", "-fexceptions", "-pthread", "-fno-builtin", "-w"]
    runtime, generated = out / "runtime.o", out / "generated.c"
    tool_output(*compiler, "-c", RUNTIME, "-o", runtime)
    by_hand = {line.split()[0] for line in tool_output("nm", "--defined-only", "--format=posix", runtime).splitlines()}
    generated.write_text(generated_source(npu, torch, by_hand))
    # The C++ runtime is named by its file: the link that -lstdc++ wants comes with a C++ compiler, which is not needed.
    tool_output(*compiler, "-shared", f"-Wl,-soname,{LIBRARY}", runtime, generated, "-o", out / LIBRARY, "-l:libstdc++.so.6")
    for name in missing_libraries(npu, torch):
        (out / name).symlink_to(LIBRARY)


def key(npu: list[Path]) -> str:
    """What decides whether a build can be used again: our sources, and the binaries that it stands beside."""
    state = hashlib.sha256()
    for source in (RUNTIME, Path(__file__)):
        state.update(source.read_bytes())
    for binary in [*npu, package_dir("torch") / "version.py"]:
        status = binary.stat()
        state.update(f"{binary}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return state.hexdigest()[:16]


def ensure(cache: Path) -> Path:
    """The folder of the libraries for this interpreter's torch_npu. Parallel callers wait for the one that builds; a build appears whole.

    Raises:
        BuildError: the machine or the installed packages are not what it takes; the message says what to do.
    """
    if platform.system() != "Linux":
        raise BuildError("the virtual NPU runs on Linux only")
    npu = torch_npu_binaries()
    folder = cache / key(npu)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            fresh = cache / f"{folder.name}.new"
            shutil.rmtree(fresh, ignore_errors=True)  # what an attempt that was cut short left there
            fresh.mkdir()
            compile_library(npu, torch_binaries(), fresh)
            fresh.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the virtual NPU's libraries and print where they are.")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR")
    cache: Path = parser.parse_args().cache
    try:
        print(ensure(cache.resolve()))
    except BuildError as error:
        sys.exit(f"virtual NPU: {error}")


if __name__ == "__main__":
    main()
