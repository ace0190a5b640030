"""Versions of driver, firmware and CANN, read from the files that their installers leave, without loading any of them.

The files are those of the CANN installation guide: `driver/version.info` and `firmware/version.info` beside the toolkit,
`<arch>-linux/ascend_toolkit_install.info` and `ascend_ops_install.info` in it. A container often has no driver files: npu-smi knows then.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

INSTALL_ROOT = Path("/usr/local/Ascend")
VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_HOMES = ("cann", "ascend-toolkit/latest", "nnae/latest")  # below the root, the newest layout first
_VERSION = re.compile(
    r"^\s*(?:version|toolkit_installed_version|toolkit_running_version)\s*=\s*\[?([^\s\]:,]+)", re.IGNORECASE | re.MULTILINE
)
_SMI_VERSION = re.compile(r"Version:\s*(\S+)")
_SMI_SECONDS = 10


def cann_home() -> str | None:
    """Where CANN is set up, by the variables that its set_env.sh exports, or None."""
    return next((home for name in VARIABLES if (home := os.environ.get(name))), None)


def installed_home(root: Path = INSTALL_ROOT) -> Path | None:
    """Where CANN is installed by default, set up or not, or None."""
    return next((root / name for name in _HOMES if (root / name).is_dir()), None)


def cann_version(home: str | Path) -> str | None:
    """Version of the toolkit in a CANN home, or None where its files do not say."""
    home = Path(home)
    machine = home / f"{platform.machine()}-linux"
    return _first_version([machine / "ascend_toolkit_install.info", home / "ascend_nnae_install.info", home / "version.cfg"])


def ops_version(home: str | Path) -> str | None:
    """Version of the package of compiled operators in a CANN home, or None where its files do not say."""
    return _first_version([Path(home) / f"{platform.machine()}-linux" / "ascend_ops_install.info"])


def driver_version(root: Path = INSTALL_ROOT) -> str | None:
    """Version of the driver, or None where neither its file nor npu-smi says."""
    return _first_version([root / "driver" / "version.info"]) or _smi_version()


def firmware_version(root: Path = INSTALL_ROOT) -> str | None:
    """Version of the firmware, or None where its file does not say."""
    return _first_version([root / "firmware" / "version.info"])


def _first_version(paths: Iterable[Path]) -> str | None:
    for path in paths:
        try:
            found = _VERSION.search(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if found:
            return found.group(1)
    return None


def _smi_version() -> str | None:
    """The driver's version as the headline of `npu-smi info` has it."""
    smi = shutil.which("npu-smi")
    if smi is None:
        return None
    try:
        output = subprocess.run([smi, "info"], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _SMI_VERSION.search(output)
    return found.group(1) if found else None
