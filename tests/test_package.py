"""The package as it is distributed: what is in it, how it is found, and what must not be importable."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("patterns", "lowerings", "kernels")


def _python(*arguments: str, path: Path = ROOT, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a fresh interpreter with `path` as its whole PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd or path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_are_relative_links(name: str) -> None:
    link = ROOT / "npu_fusion" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


@pytest.mark.parametrize("name", ["patterns", "lowerings"])
def test_linked_folders_refuse_their_bare_name(name: str) -> None:
    run = _python("-c", f"import {name}")
    assert run.returncode != 0
    assert f"ImportError: import npu_fusion.{name}" in run.stderr


def test_our_kernels_do_not_stand_in_for_the_kernels_package() -> None:
    """transformers imports `kernels`, a package of the Hugging Face hub, where it finds one: ours must give way, installed or not."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers.utils.import_utils import is_kernels_available as found; import transformers.activations; print(found())"
    run = _python("-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "False"


def test_the_real_kernels_package_wins(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'hub'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.name)"
    assert _python("-c", code).stdout.strip() == "hub"


def test_backend_is_found_by_name_without_an_import() -> None:
    """Through the entry point alone: the metadata that tools/run keeps in the checkout, or an installation."""
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="npu_fusion")
    assert {entry.value for entry in entries} == {"npu_fusion.backend:npu_fusion_backend"}
    code = "import torch; print(torch.compile(lambda x: x + 1, backend='npu_fusion')(torch.ones(2)).tolist())"
    run = _python("-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[2.0, 2.0]"


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_linked_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    listed = subprocess.run(["tar", "-C", str(ROOT), "-cf", "-", *_sources()], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-C", str(source), "-xf", "-"], input=listed, check=True)
    code = "import sys; from setuptools import build_meta as b; target = sys.argv[1]; b.build_sdist(target); b.build_wheel(target)"
    run = _python("-c", code, str(tmp_path), path=source)
    assert run.returncode == 0, run.stderr

    expected = {
        f"npu_fusion/{path.relative_to(ROOT)}" for name in LINKED for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".toml")
    }
    expected |= {"npu_fusion/__init__.py", "npu_fusion/py.typed", "npu_fusion/cli/__init__.py"}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "npu_fusion" / "templates").iterdir()}
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert expected <= in_wheel
    assert expected <= in_sdist
    assert not {name.split("/")[0] for name in in_wheel} & {*LINKED, "tests", "examples", "benchmarks", "tools"}

    code = "import npu_fusion.patterns, npu_fusion.lowerings; print(npu_fusion.__file__)"
    run = _python("-c", code, path=tmp_path / "installed", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith(str(tmp_path / "installed"))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/environment.py with a cache of its own, where building makes an empty file and notes that it did."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "REQUIREMENTS", {name: tmp_path / f"{name}.txt" for name in ("main", "npu", "ascend")})
    module.REQUIREMENTS["main"].write_text("torch==2.13.0\n")
    module.REQUIREMENTS["npu"].write_text("torch==2.13.0\ntorch_npu==2.13.0\n")
    module.REQUIREMENTS["ascend"].write_text("triton-ascend==3.2.0\n")

    def build(folder: Path, requirements: Path) -> None:
        time.sleep(0.2)  # long enough for other callers to arrive
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()
        with (tmp_path / "builds").open("a") as builds:
            builds.write("x")

    monkeypatch.setattr(module, "build", build)
    return module


def test_environment_is_built_once_for_parallel_callers(environment: ModuleType, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        pythons = list(pool.map(lambda _: environment.ensure(), range(4)))
    assert len(set(pythons)) == 1
    assert pythons[0].exists()
    assert tmp_path in pythons[0].parents
    assert (tmp_path / "builds").read_text() == "x"


def test_environment_is_another_for_other_requirements(environment: ModuleType) -> None:
    first = environment.ensure()
    environment.REQUIREMENTS["main"].write_text("torch==2.11.0\n")
    second = environment.ensure()
    others = [environment.ensure(name) for name in ("npu", "ascend")]
    assert len({first, second, *others}) == 4
    assert first.exists()


@pytest.mark.parametrize(("name", "variable"), [("npu", "NPU_FUSION_NPU_PYTHON"), ("ascend", "NPU_FUSION_ASCEND_PYTHON")])
def test_an_existing_python_stands_in_for_an_environment(
    environment: ModuleType, name: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["environment.py", name])
    monkeypatch.setenv(variable, "elsewhere/python")
    environment.main()
    assert capsys.readouterr().out == "elsewhere/python\n"
    assert not (tmp_path / "builds").exists()
    monkeypatch.delenv(variable)
    environment.main()
    assert capsys.readouterr().out == f"{environment.ensure(name)}\n"


def test_environments_are_built_at_the_same_time(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together = threading.Barrier(2, timeout=10)
    build = environment.build

    def meet(folder: Path, requirements: Path) -> None:
        together.wait()
        build(folder, requirements)

    monkeypatch.setattr(environment, "build", meet)
    monkeypatch.setattr(sys, "argv", ["environment.py", "npu", "ascend"])
    environment.main()
    assert capsys.readouterr().out.split() == [str(environment.ensure(name)) for name in ("npu", "ascend")]
    assert (tmp_path / "builds").read_text() == "xx"


def test_an_unknown_environment_is_an_error(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["environment.py", "gpu"])
    with pytest.raises(SystemExit):
        environment.main()
    assert "there is no environment 'gpu', only main, npu, ascend" in capsys.readouterr().err


def test_half_a_build_is_not_used(environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, requirements: Path) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environment, "build", interrupted)
        with pytest.raises(KeyboardInterrupt):
            environment.ensure()
    environment.ensure()
    assert (tmp_path / "builds").read_text() == "x"


def _sources() -> list[str]:
    return ["npu_fusion", *LINKED, "pyproject.toml", "README.md", "LICENSE"]


def test_requirements_fit_the_package() -> None:
    """The environment that tools/environment.py builds has every dependency, at a version that the package allows."""
    from packaging.requirements import Requirement

    lines = (ROOT / "tools" / "requirements.txt").read_text().splitlines()
    pinned = {req.name: req.specifier for req in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    for text in importlib.metadata.requires("npu-fusion") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "test"}):
            assert requirement.name in pinned
            versions = [spec.version for spec in pinned[requirement.name] if spec.operator == "=="]
            assert all(requirement.specifier.contains(version) for version in versions)


def test_no_file_names_this_machine_or_a_package_host() -> None:
    """What the checkout says must hold on any machine."""
    forbidden = ["index" + "-url", "find" + "-links=", "/opt" + "/dev", "/work" + "/"]
    files = [path for folder in ("tools", "examples", "benchmarks", ".ci") for path in (ROOT / folder).iterdir() if path.is_file()]
    files += [ROOT / name for name in ("Makefile", "pyproject.toml", "README.md")]
    found = {f"{path.relative_to(ROOT)}: {text}" for path in files for text in forbidden if text in path.read_text()}
    assert not found
