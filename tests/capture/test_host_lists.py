"""Host lists: which are updated between replays, which make another capture, and that replays compute with the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.capture import CaptureFacts, facts
from npu_fusion.capture.device import GraphDevice
from npu_fusion.capture.host_lists import OutVariant
from tests.capture.recording import captured, recording_device

LIBRARY = torch.library.Library("npu_fusion_test_capture", "DEF")
OPS = torch.ops.npu_fusion_test_capture


def define(name: str, results: int, *, out: bool, workspace: bool) -> None:
    """An op that sums over the first elements of each row, as many as its list of lengths says, and variants of it."""
    returns = "(Tensor, Tensor)" if results == 2 else "Tensor"

    def compute(x: Tensor, *, lengths: Sequence[int] | None = None, scale: int = 1) -> Any:
        rows = [row[:n].sum() for row, n in zip(x, lengths or [x.size(1)] * x.size(0))]
        total = torch.stack(rows) * scale
        return (total, x * 2) if results == 2 else total

    def shapes(x: Tensor, *, lengths: Any = None, scale: int = 1) -> Any:
        total = x.new_empty(x.shape[:1])
        return (total, torch.empty_like(x)) if results == 2 else total

    def write(x: Tensor, *, lengths: Any = None, scale: int = 1, workspace: Any = None, out: list[Tensor]) -> Any:
        assert workspace is None or workspace.numel() == 7
        made = compute(x, lengths=lengths, scale=scale)
        for into, value in zip(out, made if results == 2 else (made,)):
            into.copy_(value)
        return tuple(out) if results == 2 else out[0]

    arguments = "(Tensor x, *, SymInt[]? lengths=None, int scale=1"
    LIBRARY.define(f"{name}{arguments}) -> {returns}")
    LIBRARY.impl(name, compute, "CPU")
    LIBRARY.impl(name, shapes, "Meta")
    if out:
        LIBRARY.define(f"{name}.out{arguments}{', Tensor? workspace=None' if workspace else ''}, Tensor[](a!) out) -> {returns}")
        LIBRARY.impl(f"{name}.out", write, "CPU")
    if workspace:
        LIBRARY.define(f"_{name}_get_max_workspace{arguments}) -> Tensor")
        LIBRARY.impl(f"_{name}_get_max_workspace", lambda x, **_: torch.empty(7), "CPU")


define("attend", 2, out=True, workspace=True)
define("total", 1, out=True, workspace=False)
define("frozen", 1, out=False, workspace=False)


@pytest.fixture(autouse=True)
def _facts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = CaptureFacts(lambda target: ("lengths",) if getattr(target, "namespace", "") == LIBRARY.ns else (), lambda target: None)
    monkeypatch.setattr(facts, "_REGISTERED", [ours])


@pytest.fixture
def device() -> GraphDevice:
    return recording_device(task_groups=True)


def test_out_variants_are_found_by_their_schema() -> None:
    attend = OutVariant.find(OPS.attend.default)
    assert attend is not None
    assert attend.out is OPS.attend.out
    assert attend.workspace is OPS._attend_get_max_workspace.default
    total = OutVariant.find(OPS.total.default)
    assert total is not None
    assert total.workspace is None
    assert OutVariant.find(OPS.frozen.default) is None
    assert OutVariant.find(torch.ops.aten.add.Tensor) is None


def test_one_capture_and_an_update_for_every_change(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: Tensor, a: int, b: int) -> tuple[Tensor, Tensor, int]:
        total, doubled = OPS.attend(x, lengths=[a, b + 1])
        again, _ = OPS.attend(doubled + 1, lengths=[a, b + 1])
        return total + again, doubled, b + 1

    mine = captured(step, device, monkeypatch, dynamic=True)
    for a, b in ((3, 5), (4, 6), (4, 6), (5, 2), (6, 5)):
        x = torch.randn(2, 8)
        for actual, expected in zip(mine.run(x, a, b), step(x, a, b), strict=True):
            assert actual == expected if isinstance(expected, int) else torch.equal(actual, expected)
    assert mine.log.count("capture") == 1
    assert mine.log.count("replay") == 4
    assert mine.log.count("update") == mine.replayer.updates == 4
    assert mine.record.notes == []


def test_a_single_result(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = captured(lambda x, n: OPS.total(x, lengths=[n, n]) + 1, device, monkeypatch, dynamic=True)
    for n in (3, 4, 5, 6):
        x = torch.randn(2, 8)
        assert torch.equal(mine.run(x, n), OPS.total(x, lengths=[n, n]) + 1)
    assert mine.log.count("capture") == 1


def test_a_length_that_something_else_uses_is_part_of_the_key(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: Tensor, n: int) -> Tensor:
        return OPS.total(x, lengths=[n, n]) * n

    mine = captured(step, device, monkeypatch, dynamic=True)
    for n in (3, 3, 4, 4, 3, 4):
        x = torch.randn(2, 8)
        assert torch.equal(mine.run(x, n), step(x, n))
    assert mine.log.count("capture") == 2
    assert mine.replayer.updates == 0


def test_sizes_of_inputs_are_lengths_as_well(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: Tensor, other: Tensor) -> Tensor:
        return OPS.total(x, lengths=[other.size(0), 2]) + 1

    mine = captured(step, device, monkeypatch, dynamic=True)
    for size in (3, 3, 4, 4, 3):
        x, other = torch.randn(2, 8), torch.randn(size)
        assert torch.equal(mine.run(x, other), step(x, other))


@pytest.mark.parametrize(
    ("op", "task_groups", "reason"),
    [(OPS.frozen, True, "no variant that writes to given memory"), (OPS.total, False, "the device cannot change captured launches")],
)
def test_lists_that_cannot_be_updated_are_said(op: Any, task_groups: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = captured(lambda x, n: op(x, lengths=[n, 1]) + 1, recording_device(task_groups=task_groups), monkeypatch, dynamic=True)
    for n in (3, 3, 4, 4, 3, 4):
        x = torch.randn(2, 8)
        assert torch.equal(mine.run(x, n), op(x, lengths=[n, 1]) + 1)
    assert mine.log.count("capture") == 2
    (note,) = mine.record.notes
    assert "is captured anew whenever its lengths changes" in note
    assert reason in note
    assert "test_host_lists.py:" in note


def test_constant_lists_are_ordinary_launches(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = captured(lambda x: OPS.total(x, lengths=[3, 4]), device, monkeypatch)
    for _ in range(3):
        mine.run(torch.randn(2, 8))
    assert device.module.groups == []


def test_an_update_that_fails_lets_the_graph_go_on(device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: Tensor, n: int) -> Tensor:
        return OPS.total(x, lengths=[n, n]) + OPS.total(x * 2, lengths=[n, 1])

    mine = captured(step, device, monkeypatch, dynamic=True)
    x = torch.randn(2, 8)
    for n in (3, 4):
        mine.run(x, n)

    def refuse(*_: Any) -> None:
        raise RuntimeError("refused")

    with monkeypatch.context() as patched:
        patched.setattr(device.module, "graph_task_update_begin", refuse)
        with pytest.raises(RuntimeError, match="refused"):
            mine.run(x, 5)
    assert device.module.started is None, "all events were recorded"
    assert torch.equal(mine.run(x, 6), step(x, 6))
