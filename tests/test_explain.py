"""`explain`: what it compiles, what it runs, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from npu_fusion.config import FusionConfig
from npu_fusion.errors import ConfigError
from npu_fusion.explain import explain
from npu_fusion.graph_breaks import describe, title_of


class Norm(nn.Module):
    """RMSNorm as transformers writes it, with a buffer that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


def test_a_single_graph_does_not_run() -> None:
    module = Norm()
    made = explain(module, torch.ones(2, 16))
    assert len(made.records) == 1
    assert made.records[0].calls == 0
    assert module.calls == 0
    assert made.graph_breaks == []
    assert made.launches_before > made.launches_after > 0
    made.expect(rms_norm=1)


def test_a_target_that_is_not_here() -> None:
    made = explain(Norm(), torch.ones(2, 16), config=FusionConfig(target="ascend910b"))
    assert made.effective_config.target == "ascend910b"
    made.expect(rms_norm=1)


def test_options_may_be_given_by_name() -> None:
    assert explain(Norm(), torch.ones(2, 16), config={"rounding": "exact"}).effective_config.rounding == "exact"
    with pytest.raises(ConfigError, match="unknown target 'ascend'"):
        explain(Norm(), torch.ones(2, 16), config={"target": "ascend"})


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_data(device: str) -> None:
    if device == "meta":
        made = explain(Norm().to("meta"), torch.ones(2, 16, device="meta"))
    else:
        with FakeTensorMode():
            module, x = Norm(), torch.ones(2, 16)
        made = explain(module, x)
    made.expect(rms_norm=1)


def test_dynamic_sizes_are_named_by_the_signature() -> None:
    made = explain(Norm(), x=torch.ones(2, 16), dynamic=True)
    assert [str(symbol) in made.symbols for symbol in made.bytes_after.free_symbols] == [True]
    assert made.symbols[str(next(iter(made.bytes_after.free_symbols)))] == "x.size(0)"


def test_sizes_of_an_earlier_call_do_not_make_a_later_one_dynamic() -> None:
    module = Norm()
    for rows in (2, 3, 4):
        assert not explain(module, torch.ones(rows, 16)).bytes_after.free_symbols


def test_module_paths_and_sources_are_the_authors() -> None:
    made = explain(nn.Sequential(nn.Linear(16, 16), Norm()), torch.ones(2, 16))
    (site,) = [site for site in made.sites if site.idiom == "rms_norm"]
    assert site.module == "1"
    assert site.source is not None
    assert "test_explain.py:" in site.source


def branching(x: Tensor) -> Tensor:
    y = x * 2
    if y.sum() > 0:
        return y + 1
    return y - 1


def test_graph_breaks_have_reason_and_place() -> None:
    line = branching.__code__.co_firstlineno + 2
    made = explain(lambda x: branching(x).exp(), torch.ones(3))
    (reason,) = made.graph_breaks
    assert reason.startswith("Data-dependent branching, at ")
    assert reason.endswith(f"test_explain.py:{line}")
    assert len(made.records) == 3


def test_a_break_before_any_tensor_op_is_reported_too() -> None:
    def announces(x: Tensor) -> Tensor:
        print("called")  # noqa: T201
        return x + 1

    (reason,) = explain(announces, torch.ones(3)).graph_breaks
    assert "print" in reason


def test_the_compiled_module_is_left_as_it_was() -> None:
    module = Norm()
    compiled = torch.compile(module, backend="eager")
    x = torch.ones(2, 16)
    with torch.no_grad():
        compiled(x)
        frames = counters["frames"]["ok"]
        made = explain(compiled, x)
        counters["frames"]["ok"] = frames
        compiled(x)
    assert counters["frames"]["ok"] == frames
    made.expect(rms_norm=1)


def test_errors_of_the_function_reach_the_caller() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        explain(fails, torch.ones(2))


def test_grad_mode_is_restored() -> None:
    assert torch.is_grad_enabled()
    explain(Norm(), torch.ones(2, 16))
    assert torch.is_grad_enabled()


def test_reasons_are_one_line() -> None:
    long = "Unsupported call\n  Explanation: Dynamo cannot do this.\n  Hint: something\n"
    assert title_of(long) == "Unsupported call"
    assert describe(long) == "Unsupported call (Dynamo cannot do this)"
    assert describe("generic_jump TensorVariable()") == "Data-dependent branching"


def test_experts_that_look_up_their_tokens_are_told_the_way_to_one_graph() -> None:
    def experts(x: Tensor, mask: Tensor) -> Tensor:
        expert_hit = mask.sum(0).nonzero()
        return x * 2 + expert_hit.sum()

    [reason] = explain(experts, torch.ones(2, 4), torch.ones(2, 4)).graph_breaks
    assert "nonzero" in reason
    assert "grouped_mm" in reason


def test_other_lookups_are_not() -> None:
    def rows(x: Tensor) -> Tensor:
        return x * 2 + (x > 0).nonzero().sum()

    [reason] = explain(rows, torch.ones(2, 4)).graph_breaks
    assert "grouped_mm" not in reason
