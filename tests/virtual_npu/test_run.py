"""Programs on the virtual NPU: what can be set, and what is said when it cannot be built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .launches import read
from .run import HERE, ROOT, VirtualNpu, VirtualNpuError, virtual_npu

PROGRAM = """
import torch
print(torch.npu.get_device_name(), torch.npu.device_count(), torch.zeros(1, device="npu").device)
torch.npu.synchronize()
"""


@pytest.mark.slow
def test_device_name_count_and_trace_are_settings(npu: VirtualNpu, tmp_path: Path) -> None:
    done = npu.run(["-c", PROGRAM], soc="Ascend910_9382", count=2, trace=tmp_path / "trace.txt")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "Ascend910_9382 2 npu:0"
    assert read(tmp_path / "trace.txt").total == {"aclnnInplaceZero": 1}


@pytest.mark.slow
def test_a_program_runs_from_the_command_line(npu: VirtualNpu, tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("launch left_from_before\n")
    command = [sys.executable, "-m", "tests.virtual_npu.run", "--trace", str(trace), "--", "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "Ascend910B3 1 npu:0"
    assert read(trace).total == {"aclnnInplaceZero": 1}


def test_libraries_are_built_once(npu: VirtualNpu) -> None:
    built = (npu.libraries / "libvirtual_npu.so").stat().st_mtime_ns
    again = virtual_npu()
    assert again == npu
    assert (again.libraries / "libvirtual_npu.so").stat().st_mtime_ns == built
    assert (npu.libraries / "libopapi.so").resolve() == (npu.libraries / "libvirtual_npu.so").resolve()


def test_a_missing_compiler_is_named(npu: VirtualNpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(VirtualNpuError, match="no-such-compiler is needed and not found: install gcc and binutils"):
        virtual_npu(tmp_path / "elsewhere")


def test_a_python_without_torch_npu_is_named(tmp_path: Path) -> None:
    """The project's own environment has none."""
    command = [sys.executable, HERE / "build.py", "--cache", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch_npu is not installed for" in done.stderr
