"""`npu-fusion doctor`: what is installed, and what each target can do here.

Packages are looked up by their metadata and never imported, because importing torch_npu without CANN fails, and takes torch's automatic
loading of device backends with it. Where torch has loaded torch_npu already, it is asked for its devices.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from ..config import TARGETS
from ..report import package_version
from . import cann, npu
from .cann import cann_home

PACKAGES = {
    "torch": "",
    "transformers": "explain of transformers configs",
    "triton": "kernels on NVIDIA",
    "triton-ascend": "kernels on Ascend",
    "torch_npu": "running on Ascend",
    "sgl-kernel-npu": "more ops on Ascend",
    "pytest": "the package's own tests",
}
_DEVICES = Path("/dev")


def installed(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def npu_devices(devices: Path = _DEVICES) -> list[str]:
    """Names of the Ascend devices that the driver shows, e.g. `["davinci0"]`."""
    return sorted(entry.name for entry in devices.glob("davinci[0-9]*"))


def missing_for(target: str) -> str | None:
    """Why compiled graphs of a target cannot run here, or None where they can."""
    if target == "cpu":
        return None
    if target == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device" if torch.backends.cuda.is_built() else "torch is built without CUDA"
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    here = npu.soc()
    if here is not None:
        return None if here == target else f"the devices here are {here}"
    wanting = [
        text
        for text, there in (
            ("torch_npu is not installed", installed("torch_npu")),
            ("CANN is not set up", cann_home()),
            ("no Ascend device", npu_devices()),
        )
        if not there
    ]
    return ", ".join(wanting) or None


def packages_table() -> Table:
    """What is installed, and what for."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Installed", title_justify="left", title_style="bold")
    for name in ("", "Version", "For"):
        table.add_column(name)
    table.add_row("npu-fusion", package_version(), "")
    table.add_row("Python", platform.python_version(), "")
    for package, purpose in PACKAGES.items():
        table.add_row(package, installed(package) or "[yellow]not installed[/]", purpose)
    for name, text in _hardware():
        table.add_row(name, text, "")
    return table


def _hardware() -> Iterator[tuple[str, str]]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield f"CUDA device {index}", torch.cuda.get_device_name(index)
    else:
        yield "CUDA devices", "none"
    names = npu.device_names()
    yield "Ascend devices", _counted(names) if names else ", ".join(npu_devices()) or "none"
    yield "Ascend driver", cann.driver_version() or "not found"
    yield "Ascend firmware", cann.firmware_version() or "not found"
    yield "CANN", _cann_text()


def _counted(names: list[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).items())


def _cann_text() -> str:
    home = cann_home()
    if home is None:
        there = cann.installed_home()
        return "not set up" if there is None else f"not set up: it is in {there}, source its set_env.sh"
    version, ops = cann.cann_version(home), cann.ops_version(home)
    return f"{version or 'of unknown version'} in {home}" + (f", operators {ops}" if ops else "")


def targets_table() -> Table:
    """What each target can do here: a graph can be explained for every target, and run where the device is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Targets", title_justify="left", title_style="bold")
    for name in ("Target", "Explain", "Run"):
        table.add_column(name)
    for target in TARGETS:
        if target != "auto":
            missing = missing_for(target)
            table.add_row(target, "[green]yes[/]", "[green]yes[/]" if missing is None else f"[yellow]no[/]: {missing}")
    return table
