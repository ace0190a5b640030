"""`npu-fusion doctor`: versions from files, what torch_npu says, and the self test, on machines made of monkeypatches and folders."""

from __future__ import annotations

import platform
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from npu_fusion.cli import cann, environment, npu
from npu_fusion.lowerings.ascend import emulation, library, sgl
from npu_fusion.lowerings.ascend.selftest import Case, Outcome
from tests.command_line import Result, call


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    return lambda *arguments: call(monkeypatch, capsys, "doctor", *arguments)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process look as on a machine with npu devices of the given names, torch_npu loaded."""

    def make(*names: str) -> None:
        module = types.SimpleNamespace(device_count=lambda: len(names), get_device_name=lambda index: names[index])
        monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)

    return make


@pytest.fixture
def ascend_root(tmp_path: Path) -> Path:
    """The files that the installers of driver, firmware and CANN leave."""
    home = tmp_path / "cann"
    files = {
        tmp_path / "driver" / "version.info": "Version=25.2.0\nascendhal_version=7.35.23\npackage_version=25.2.0\n",
        tmp_path / "firmware" / "version.info": "Version=7.7.0.6.236\nfirmware_version=1.0\n",
        home / f"{platform.machine()}-linux" / "ascend_toolkit_install.info": "package_name=Ascend-cann-toolkit\nversion=8.5.0\narch=x\n",
        home / f"{platform.machine()}-linux" / "ascend_ops_install.info": "package_name=Ascend-cann-910b-ops\nversion=8.5.1\n",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


# versions


def test_versions_from_files(ascend_root: Path) -> None:
    assert cann.driver_version(ascend_root) == "25.2.0"
    assert cann.firmware_version(ascend_root) == "7.7.0.6.236"
    assert cann.installed_home(ascend_root) == ascend_root / "cann"
    assert cann.cann_version(ascend_root / "cann") == "8.5.0"
    assert cann.ops_version(ascend_root / "cann") == "8.5.1"


def test_version_of_an_older_layout(tmp_path: Path) -> None:
    (tmp_path / "version.cfg").write_text("# version: 1.0\ntoolkit_running_version=[8.0.RC1:8.0.RC1]\n")
    assert cann.cann_version(tmp_path) == "8.0.RC1"
    assert cann.ops_version(tmp_path) is None


def test_driver_version_from_npu_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without the driver's files."""
    smi = tmp_path / "npu-smi"
    smi.write_text("#!/bin/sh\necho '| npu-smi 25.2.0                   Version: 25.2.0          |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert cann.driver_version(tmp_path) == "25.2.0"
    smi.write_text("#!/bin/sh\nexit 1\n")
    assert cann.driver_version(tmp_path) is None


def test_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [cann.driver_version(tmp_path), cann.firmware_version(tmp_path), cann.installed_home(tmp_path)] == [None, None, None]


def test_cann_that_is_installed_but_not_set_up(ascend_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in cann.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cann.installed_home, "__defaults__", (ascend_root,))
    assert environment._cann_text() == f"not set up: it is in {ascend_root / 'cann'}, source its set_env.sh"
    monkeypatch.setenv("ASCEND_HOME_PATH", str(ascend_root / "cann"))
    assert environment._cann_text() == f"8.5.0 in {ascend_root / 'cann'}, operators 8.5.1"
    monkeypatch.setenv("ASCEND_HOME_PATH", str(ascend_root / "elsewhere"))
    assert environment._cann_text() == f"of unknown version in {ascend_root / 'elsewhere'}"


# devices


def test_devices_are_counted_and_the_other_targets_explained(doctor: Callable[..., Result], machine: Callable[..., None]) -> None:
    machine("Ascend910_9382", "Ascend910_9382")
    assert npu.soc() == "ascend910_93"
    assert environment.missing_for("ascend910_93") is None
    assert environment.missing_for("ascend910b") == "the devices here are ascend910_93"
    out = doctor().out
    assert "2 x Ascend910_9382" in out
    assert "Ascend ops here" in out


def test_torch_npu_that_fails_on_its_devices_is_no_crash(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine("Ascend910B3")

    def broken() -> int:
        raise RuntimeError("drvErr=87, driver does not answer")

    monkeypatch.setattr(torch.get_device_module("npu"), "device_count", broken)
    assert npu.device_names() == []
    assert npu.soc() is None


def test_ops_that_are_missing_or_have_another_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    library.prepare(emulate=True)
    monkeypatch.setattr("npu_fusion.lowerings.ascend.installed.define_ops", lambda: frozenset({"npu::npu_swiglu"}))
    monkeypatch.setattr(sgl, "installed", lambda: True)
    other = types.SimpleNamespace(_schema=torch.ops.npu.npu_gelu.default._schema)
    real = library.overload_of
    monkeypatch.setattr("npu_fusion.lowerings.ascend.installed.overload_of", lambda op: other if op.opname == "npu_rms_norm" else real(op))
    states, _, names = (map(str, column.cells) for column in npu.presence_table().columns)
    shown = dict(zip(states, names, strict=True))
    assert shown["missing"] == "npu.npu_swiglu"
    assert shown["another schema"] == "npu.npu_rms_norm"
    assert "npu.npu_gemma_rms_norm" in shown["present"]


# self test


def test_self_test_of_the_cpu_kernels_passes(doctor: Callable[..., Result]) -> None:
    result = doctor("--self-test", "--device", "cpu", "--op", "npu_rms_norm", "--op", "npu.npu_swiglu")
    assert result.code == 0, result.out + result.err
    assert "Self test of ascend910b on cpu" in result.out
    assert "bf16 [2, 16, 4096]" in result.out
    assert "11 cases of 2 ops: 11 ok" in result.out


def test_a_wrong_kernel_is_a_mismatch_and_exit_code_1(doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = emulation.emulated_ops()["npu::npu_fast_gelu"]
    monkeypatch.setitem(vars(emulated), "kernel", lambda input: input * torch.sigmoid(1.4 * input.float()).to(input.dtype))
    result = doctor("--self-test", "--device", "cpu", "--op", "npu_fast_gelu")
    assert result.code == 1
    assert "mismatch: y differs" in result.out
    assert "3 cases of 1 op: 3 mismatch" in result.out


def test_self_test_without_an_npu_says_why(doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setattr(library, "has_torch_npu", lambda: False)
    result = doctor("--self-test")
    assert result.code == 2
    assert "torch_npu is not installed; --device cpu compares" in result.err
    monkeypatch.setattr(library, "has_torch_npu", lambda: True)
    assert "torch_npu sees no npu device" in doctor("--self-test").err


def test_torch_npu_that_cannot_be_imported_is_one_line(doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:

    def fails() -> bool:
        raise RuntimeError("acl init failed\nwith a long story")

    monkeypatch.setattr(library, "has_torch_npu", fails)
    result = doctor("--self-test")
    assert result.code == 2
    assert "npu-fusion: torch_npu cannot be imported: acl init failed" in result.err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--self-test", "--device", "cpu", "--op", "npu_x"], "unknown op 'npu_x'. Known on ascend910b: npu."),
        (["--self-test", "--device", "gpu"], "unknown device 'gpu'. Known: npu, cpu"),
        (["--op", "npu_rms_norm"], "give --self-test as well"),
        (["--device", "cpu"], "give --self-test as well"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(doctor: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = doctor(*arguments)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("npu-fusion: ")
    assert message in line


def _outcome(verdict: str) -> Outcome:
    return Outcome(Case("npu::npu_gelu", "fp16", lambda inputs: {}), verdict)  # type: ignore[arg-type]


def test_exit_code_of_the_self_test() -> None:
    """An absent op is not emitted, and no failure; that nothing could run at all is one."""
    ok, mismatch, error, missing = (_outcome(verdict) for verdict in ("ok", "mismatch", "error", "missing"))
    assert not npu.failed([ok, missing])
    assert npu.failed([ok, mismatch])
    assert npu.failed([ok, error])
    assert npu.failed([missing])
    assert npu.failed([])
    assert npu.summary([ok, ok, error, missing]) == "4 cases of 1 op: 2 ok, 1 error, 1 missing"
