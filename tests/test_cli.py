"""The command line, run in process; where nothing but the result matters, on models of a few thousand parameters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from npu_fusion import lower
from npu_fusion.cli import cann, environment, loading
from npu_fusion.cli.loading import ModelOptions, load
from npu_fusion.config import TARGETS
from npu_fusion.errors import UnsupportedInputError
from npu_fusion.lower import Provider
from tests.command_line import Result, call

TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}
MODELS = """
import torch
from torch import nn

class Norm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

class Fixed(Norm):
    example_inputs = {"x": torch.ones(2, 8)}

def pair(): return Norm(), (torch.ones(2, 8),)
def triple(): return Norm(), (), {"x": torch.ones(2, 8)}
def module(): return Fixed()
def function(x): return Norm()(x)
function.example_inputs = lambda: torch.ones(2, 8)
instance = Fixed()

number = 3
def needs(x): return x
def wrong_inputs(x): return x
wrong_inputs.example_inputs = 7
def fails(): return (lambda x: x @ x), (torch.ones(2, 8),)
"""


class Run:
    """Calls the console script's entry point in a folder of its own that holds `models_for_cli.py` and `config.json`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        (folder / "models_for_cli.py").write_text(MODELS)
        (folder / "config.json").write_text(json.dumps(TINY))
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str) -> Result:
        sys.modules.pop("models_for_cli", None)
        return call(self._monkeypatch, self._capsys, *arguments)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, monkeypatch, capsys)


# explain


@pytest.mark.parametrize("name", ["pair", "triple", "module", "function", "instance"])
@pytest.mark.parametrize("where", ["models_for_cli", "models_for_cli.py"])
def test_module_and_callable(run: Run, where: str, name: str) -> None:
    result = run("explain", f"{where}:{name}", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["idioms"] == {"rms_norm": {"covered": 1, "total": 1}}


def test_exported_program(run: Run) -> None:
    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    torch.export.save(torch.export.export(Scale(), (torch.ones(2, 8),)), run.folder / "norm.pt2")
    result = run("explain", "norm.pt2")
    assert result.code == 0, result.err
    assert result.out.startswith("exported program norm.pt2\nnpu_fusion: 1 of 1 site fused")


@pytest.mark.parametrize("spec", [".", "config.json"])
def test_transformers_config(run: Run, spec: str) -> None:
    result = run("explain", spec, "--seq", "8", "--html", "page.html", "--target", "ascend910b")
    assert result.code == 0, result.err
    assert result.out.startswith("Qwen3ForCausalLM, ")
    assert "bf16, batch 1, prefill of 8, sdpa" in result.out
    assert "target=ascend910b" in result.out
    assert "model.layers.0" in (run.folder / "page.html").read_text()


def test_decode_is_one_graph_against_a_static_cache(run: Run) -> None:
    result = run(
        "explain", "config.json", "--decode", "--seq", "16", "--batch", "2", "--attn", "eager", "--dtype", "fp32", "--dynamic", "--json"
    )
    assert result.code == 0, result.err
    made = json.loads(result.out)
    assert len(made["graphs"]) == 1
    assert made["graph_breaks"] == []
    assert made["idioms"]["kv_update"]["total"] == 2


def test_a_large_model_is_built_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "REAL_PARAMETERS", 0)
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING["qwen3"].from_dict(TINY)
    example = loading.build_from_config(config, ModelOptions(seq=8, decode=True))
    tensors = [*example.function.parameters(), example.kwargs["input_ids"], example.kwargs["past_key_values"].layers[0].keys]  # type: ignore[attr-defined]
    assert {type(tensor.data).__name__ for tensor in tensors} == {"FakeTensor"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "no such file: nowhere.json"),
        (["nowhere.pt2"], "no such file: nowhere.pt2"),
        (["config.json", "--target", "ascend910"], "unknown target 'ascend910'. Did you mean 'ascend910b'? Known: auto, ascend910b"),
        (["config.json", "--dtype", "int4"], "unknown dtype 'int4'. Known: bf16, fp16, fp32"),
        (["config.json", "--attn", "flash"], "unknown attention 'flash'. Known: sdpa, eager"),
        (["config.json", "--decode", "--seq", "1"], "the sequence at least 2 to decode"),
        (["config.json", "--html", "nowhere/page.html"], "no such folder"),
        (["unknown.json"], "model_type 'made-up'"),
        (["broken.json"], "broken.json is not JSON"),
        (["broken.pt2"], "broken.pt2 is not an exported program that this torch can load"),
        (["models_for_cli.py"], "cannot explain models_for_cli.py: expected a transformers config"),
        (["nowhere:thing"], "cannot import nowhere: ModuleNotFoundError"),
        (["nowhere.py:thing"], "no such file: nowhere.py"),
        (["models_for_cli:absent"], "models_for_cli has no 'absent'"),
        (["models_for_cli:number"], "must be a function or module with an attribute example_inputs"),
        (["models_for_cli:needs"], "calling it without arguments failed"),
        (["models_for_cli:wrong_inputs"], "must be a tensor, a tuple or a dictionary, not int"),
        (["models_for_cli:fails"], "cannot compile models_for_cli:fails: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    (run.folder / "unknown.json").write_text('{"model_type": "made-up"}')
    (run.folder / "broken.json").write_text("{")
    (run.folder / "broken.pt2").write_text("nothing")
    result = run("explain", *arguments)
    assert result.code == 2
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("npu-fusion: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.err


def test_missing_argument(run: Run) -> None:
    assert run("explain").code == 2


def test_an_unknown_model_id_is_bad_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:

    def offline(name: str, **_: Any) -> Any:
        raise OSError(f"{name} is not cached\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    result = run("explain", "someone/some-model")
    assert result.code == 2
    assert "cannot load 'someone/some-model'" in result.err
    assert "(someone/some-model is not cached)" in result.err


def test_a_model_that_takes_no_tokens(tmp_path: Path) -> None:
    tiny = {
        "model_type": "vit",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    with pytest.raises(UnsupportedInputError, match="takes pixel_values, not tokens"):
        load(str(tmp_path), ModelOptions(dtype="fp32"))


def test_the_current_folder_is_importable_for_the_time_of_the_import_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(run.folder))])
    before = list(sys.path)
    load("models_for_cli:pair", ModelOptions())
    assert sys.path == before


# ops, doctor


def test_ops_lists_ops_rules_and_providers(run: Run) -> None:
    result = run("ops")
    assert result.code == 0
    for name in ("rms_norm", "rotary", "glu", "attention", "reference"):
        assert name in result.out


def test_ops_of_a_target(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = (
        Provider(name, "rms_norm", ("cpu",), lower=lambda builder, arguments: builder.refuse("never called"), rank=rank)
        for rank, name in enumerate(("m.fast", "m.slow"))
    )
    monkeypatch.setattr(lower, "_PROVIDERS", [slow, fast])
    assert "m.fast, m.slow, reference" in run("ops", "--target", "cpu").out
    assert "m.fast (cpu), m.slow (cpu), reference" in run("ops").out
    assert "m.fast" not in run("ops", "--target", "ascend910b").out
    unknown = run("ops", "--target", "tpu")
    assert unknown.code == 2
    assert "unknown target 'tpu'" in unknown.err


def test_doctor_names_every_target_and_package(run: Run) -> None:
    result = run("doctor")
    assert result.code == 0
    for name in (*(target for target in TARGETS if target != "auto"), *environment.PACKAGES, torch.__version__):
        assert name in result.out


def test_doctor_never_imports_torch_npu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert run("doctor").code == 0


def test_what_ascend_wants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in cann.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(environment, "installed", lambda name: None)
    monkeypatch.setattr(environment, "npu_devices", list)
    assert environment.missing_for("ascend910b") == "torch_npu is not installed, CANN is not set up, no Ascend device"
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setattr(environment, "installed", lambda name: "2.13.0")
    monkeypatch.setattr(environment, "npu_devices", lambda: ["davinci0"])
    assert environment.missing_for("ascend910b") is None
    assert environment.missing_for("cpu") is None


def test_npu_devices(tmp_path: Path) -> None:
    for name in ("davinci0", "davinci11", "davinci_manager", "null"):
        (tmp_path / name).touch()
    assert environment.npu_devices(tmp_path) == ["davinci0", "davinci11"]
