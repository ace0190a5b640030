"""Prints the path of a Python that has what a requirements file lists, after building its environment where that is not done yet.

    python3 tools/environment.py         what the package needs and what tests it: tools/requirements.txt
    python3 tools/environment.py npu     the same with torch_npu, for the virtual NPU of tests/virtual_npu: tools/requirements-npu.txt
    python3 tools/environment.py ascend  Triton's Ascend compiler, for the compile gate of tests/ascend_gate: tools/requirements-ascend.txt
    python3 tools/environment.py main npu ascend  all of them, built at the same time; a path a line

An environment lies outside the clone, in `${XDG_CACHE_HOME:-~/.cache}/npu-fusion/<key>`, and is shared by all clones with the same
requirements, Python and machine type. The package itself is not in it: one clone's code must not be seen by another (tools/run adds the
clone it stands in). Needs the standard library of Python 3.10 or newer (PYTHON=python3.x names another); all but the path goes to stderr.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = {
    "main": HERE / "requirements.txt",
    "npu": HERE / "requirements-npu.txt",
    "ascend": HERE / "requirements-ascend.txt",
}
OVERRIDES = {  # variables that name an existing environment's Python
    "main": "NPU_FUSION_PYTHON",
    "npu": "NPU_FUSION_NPU_PYTHON",
    "ascend": "NPU_FUSION_ASCEND_PYTHON",
}


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "npu-fusion"


def key(requirements: Path) -> str:
    """What decides whether two clones can share an environment: the requirements, and the Python that would be in it."""
    version = f"{platform.python_implementation()} {platform.python_version()} {sysconfig.get_platform()} {sys.base_prefix}"
    return hashlib.sha256(version.encode() + requirements.read_bytes()).hexdigest()[:16]


def build(folder: Path, requirements: Path) -> None:
    """Make the virtual environment in `folder`."""
    print(f"npu-fusion: building the environment in {folder} (once; a few minutes)", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, symlinks=True)
    # What is imported is compiled then; most of these packages never is.
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*install, "--requirement", str(requirements)], check=True, stdout=sys.stderr)


def ensure(name: str = "main") -> Path:
    """The Python of an environment. Parallel callers wait for the one that builds; `complete` comes last, so half a build is never used."""
    requirements, root = REQUIREMENTS[name], cache_root()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key(requirements)
    complete = folder / "complete"
    if not complete.exists():
        with (root / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what an attempt that was cut short left there
                build(folder, requirements)
                complete.touch()
    return folder / "bin" / "python"


def python_of(name: str) -> Path:
    """The Python of an environment, or the one that a variable names in its place."""
    existing = os.environ.get(OVERRIDES[name])
    return Path(existing) if existing else ensure(name)


def known(name: str) -> str:
    """A name of an environment, as the command line gives it."""
    if name not in REQUIREMENTS:
        raise argparse.ArgumentTypeError(f"there is no environment {name!r}, only {', '.join(REQUIREMENTS)}")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the path of an environment's Python, after building it where need be.")
    parser.add_argument("names", nargs="*", type=known, metavar="name", help=f"{', '.join(REQUIREMENTS)}; by default main")
    names: list[str] = parser.parse_args().names or ["main"]
    with ThreadPoolExecutor() as pool:
        pythons = {name: pool.submit(python_of, name) for name in names}
    for name, python in pythons.items():
        try:
            print(python.result())
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"npu-fusion: pip failed ({error.returncode}). {OVERRIDES[name]} names an existing environment's Python to use instead."
            )


if __name__ == "__main__":
    main()
