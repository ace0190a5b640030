"""`npu-fusion ops`: what runs each semantic op on a target, and the table of Ascend ops, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from npu_fusion.config import TARGETS
from npu_fusion.lowerings.ascend.table import ascend_ops
from npu_fusion.semantic import semantic_ops
from tests.command_line import Result, call

WIDTH = 120


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    return lambda *arguments: call(monkeypatch, capsys, "ops", *arguments)


def test_ascend_target_lists_the_table(ops: Callable[..., Result]) -> None:
    result = ops("--target", "ascend910b")
    assert result.code == 0
    assert "Ascend ops on ascend910b" in result.out
    text = "".join(result.out.split())
    for op in ascend_ops().values():
        assert (op.shown in text) == ("ascend910b" in op.targets), op.name
    emitted, others = text.split("neveremitted:")
    for op in ascend_ops().values():
        if "ascend910b" in op.targets:
            assert op.shown in (emitted if op.uses else others)
    row = next(line for line in result.out.splitlines() if line.strip().startswith("npu.npu_add_rms_norm "))
    since = ascend_ops()["npu::npu_add_rms_norm"].since
    assert row.split() == f"npu.npu_add_rms_norm y x fp16 bf16 fp32 310P A2 A3 A5 safe yes yes {since}".split()


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("ascend")])
def test_fits_a_terminal_of_120_columns(ops: Callable[..., Result], target: str) -> None:
    assert max(map(len, ops("--target", target).out.splitlines())) <= WIDTH


@pytest.mark.parametrize("target", ["cpu", "cuda", "auto"])
def test_other_targets_have_no_ascend_table(ops: Callable[..., Result], target: str) -> None:
    assert "Ascend ops" not in ops("--target", target).out


def test_limits_are_those_of_the_target(ops: Callable[..., Result]) -> None:
    """npu_interleave_rope is not on A5, whose table must not have it."""
    assert "npu_interleave_rope" in ops("--target", "ascend910b").out
    assert "npu_interleave_rope" not in ops("--target", "ascend950").out


def test_json(ops: Callable[..., Result]) -> None:
    made = json.loads(ops("--target", "ascend910b", "--json").out)
    assert made["target"] == "ascend910b"
    assert [op["name"] for op in made["ops"]] == [op.name for op in semantic_ops()]
    providers = {op["name"]: op["providers"] for op in made["ops"]}
    assert providers["add_rms_norm"][:2] == ["npu.npu_add_rms_norm", "npu.npu_add_rms_norm_cast"]
    assert all(names[-1] == "reference" and len(set(names)) == len(names) for names in providers.values())
    assert {rule["name"] for rule in made["rules"]} >= {"rms_norm", "rotary", "attention"}
    rows = {op["name"]: op for op in made["ascend_ops"]}
    assert set(rows) == {op.name for op in ascend_ops().values() if "ascend910b" in op.targets}
    assert rows["npu::npu_rms_norm"]["uses"] == ["y"]
    assert any("input fp16" in line for line in rows["npu::npu_rms_norm"]["limits"])


def test_json_of_a_target_without_a_table(ops: Callable[..., Result]) -> None:
    made = json.loads(ops("--target", "cpu", "--json").out)
    assert made["ascend_ops"] == []
    assert {tuple(op["providers"]) for op in made["ops"]} == {("reference",)}
