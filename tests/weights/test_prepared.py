"""Weights as kernels want them: laid out at every call by default; kept, shared and replayed on new weights where that is asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_fusion
from npu_fusion import prepare
from npu_fusion.numerics import assert_within_contract

K, N, GROUP = 256, 64, 64
ASCEND = {"emulate": True}
KEPT = {**ASCEND, "keep_prepared_weights": True}
DTYPE = torch.bfloat16


class Quantised(nn.Module):
    """A linear with AWQ's buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows in (("qweight", K), ("qzeros", K // GROUP)):
            self.register_buffer(name, torch.randint(-(2**31), 2**31, (rows, N // 8)).to(torch.int32))
        self.register_buffer("scales", (torch.rand(K // GROUP, N) / 64 + 0.01).to(DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])
        weight, zeros = (((words.unsqueeze(-1) >> shifts) & 15).flatten(1) for words in (self.qweight, self.qzeros))
        difference = weight - zeros.repeat_interleave(GROUP, 0)
        return x @ (difference * self.scales.repeat_interleave(GROUP, 0))


def compiled(model: nn.Module, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="npu_fusion", fullgraph=True, dynamic=False, options=options)


def check(run: Callable[[Tensor], Tensor], model: nn.Module, rows: int = 3) -> None:
    x = torch.randn(rows, K).to(DTYPE)
    with torch.no_grad():
        eager = model(x)
        exact = x.double() @ _dense(model)
        assert_within_contract(run(x), eager, exact, DTYPE)


def _dense(model: nn.Module) -> Tensor:
    """The weight [K, N] in float64."""
    with torch.no_grad():
        return model(torch.eye(K, dtype=DTYPE)).double()  # type: ignore[no-any-return]


def targets(run: Any) -> list[str]:
    return [str(node.target) for node in npu_fusion.report(run).graph("lowered").graph.nodes]


def kept_bytes() -> int:
    return sum(kept.tensor.nbytes for entries in prepare._KEPT.values() for kept in entries)


def live_bytes() -> int:
    gc.collect()
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)}
    return sum(found.values())


def test_nothing_is_kept_by_default() -> None:
    model = Quantised()
    run = compiled(model, **ASCEND)
    gc.collect()
    before = kept_bytes()
    check(run, model)
    held = live_bytes()
    check(run, model)
    assert live_bytes() <= held
    assert kept_bytes() == before
    assert "aten.bitwise_xor.Scalar" in targets(run)
    model.qweight.data.copy_(model.qweight.flip(0))  # type: ignore[operator]
    check(run, model)


def test_what_is_kept_is_not_computed_again() -> None:
    model = Quantised()
    run = compiled(model, **KEPT)
    check(run, model)
    assert not {"aten.bitwise_xor.Scalar", "aten.neg.default", "aten.bitwise_and.Scalar"} & set(targets(run))
    assert any("kept as kernels want them" in note for note in npu_fusion.report(run).notes)
    version = [kept.tensor._version for entries in prepare._KEPT.values() for kept in entries]
    check(run, model)
    assert [kept.tensor._version for entries in prepare._KEPT.values() for kept in entries] == version


def test_graphs_share_what_is_kept() -> None:
    torch.compiler.reset()
    gc.collect()
    model, before = Quantised(), kept_bytes()
    run = compiled(model, **KEPT)
    check(run, model, rows=3)
    once = kept_bytes()
    check(run, model, rows=5)
    assert len(npu_fusion.report(run).records) == 2
    assert kept_bytes() == once > before
    del run, model
    torch.compiler.reset()
    gc.collect()
    assert kept_bytes() == before


@pytest.mark.parametrize("load", ["copy", "load_state_dict", "rebind", "data"])
def test_new_weights(load: str) -> None:
    model, other = Quantised(), Quantised()
    run = compiled(model, **KEPT)
    check(run, model)
    if load == "copy":
        with torch.no_grad():
            model.qweight.copy_(other.qweight)  # type: ignore[operator]
    elif load == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif load == "rebind":
        model.qweight, model.scales = other.qweight, other.scales
    else:
        model.qzeros.data.copy_(other.qzeros)  # type: ignore[union-attr]
        npu_fusion.reload_weights(run)
    check(run, model)


def test_activations_are_no_weights() -> None:
    """Words that come as an argument are laid out at every call."""
    model = Quantised()

    def layer(x: Tensor, qweight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"qweight": qweight}, (x,))  # type: ignore[no-any-return]

    run = torch.compile(layer, backend="npu_fusion", options=KEPT)
    x = torch.randn(3, K).to(DTYPE)
    with torch.no_grad():
        for words in (model.qweight, model.qweight.flip(0)):  # type: ignore[operator]
            torch.testing.assert_close(run(x, words), layer(x, words), atol=0.1, rtol=0.02)
