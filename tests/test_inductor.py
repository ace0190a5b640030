"""Inductor as an executor, and as the route through its custom passes."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion.backend import records_of
from npu_fusion.errors import ConfigError
from npu_fusion.lowerings import inductor
from npu_fusion.lowerings.inductor import inductor_options
from npu_fusion.report import report
from tests.blocks import Block, assert_close, compiled, single

aten = torch.ops.aten


class TestInductor:
    x = torch.randn(2, 3, 16)

    def test_cost_is_that_of_the_fused_graph(self) -> None:
        """What a semantic op is expanded into for Inductor is no more launches: Inductor fuses it again."""
        block = Block().eval()
        run = compiled(block, options={"executor": "inductor"})
        with torch.no_grad():
            run(self.x)
        found = report(run)
        assert found.launches_after < found.launches_before

    def test_executor(self) -> None:
        block = Block().eval()
        run = compiled(block, options={"executor": "inductor"}, dynamic=True)
        with torch.no_grad():
            for length in (3, 5):
                x = torch.randn(2, length, 16)
                assert_close(run(x), block(x))
        assert {record.config.executor for record in records_of(run)} == {"inductor"}

    def test_executor_with_a_cache(self) -> None:
        def step(cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            cache.index_copy_(1, pos, F.silu(x))
            return F.rms_norm(cache, (4,), None, 1e-6)

        run = compiled(step, options={"executor": "inductor"})
        mine = torch.randn(2, 6, 4)
        theirs = mine.clone()
        with torch.no_grad():
            for i in range(3):
                x, pos = torch.randn(2, 1, 4), torch.tensor([i])
                assert_close(run(mine, x, pos), step(theirs, x, pos))
                assert_close(mine, theirs)

    def test_custom_passes(self) -> None:
        block = Block().eval()
        run = torch.compile(block, backend="inductor", options=inductor_options())
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            assert_close(run(self.x), block(self.x))
        record = single(run)
        aten_calls = {node.target for node in record.stages["aten"].graph.nodes}
        assert aten.silu.default in aten_calls
        assert torch.ops.npu_fusion_lifted.scaled_dot_product_attention.default in aten_calls
        assert torch.ops.npu_fusion_lifted.rms_norm.default in aten_calls

    def test_executor_options_are_inductors(self) -> None:
        run = compiled(torch.sin, options={"executor": "inductor", "executor_options": {"epilogue_fusion": False}})
        assert_close(run(self.x), self.x.sin())
        run = compiled(torch.cos, options={"executor": "inductor", "executor_options": {"epilog_fusion": False}})
        with pytest.raises(Exception, match="ConfigError: Inductor has no option 'epilog_fusion'"):
            run(self.x)

    def test_passes_that_torch_npu_would_set_later_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It puts its passes into the configuration when Inductor first compiles for an NPU, over whatever stands there."""

        def its_pass(graph: Any) -> None:
            return None

        def load() -> None:
            torch._inductor.config.pre_grad_custom_pass = its_pass

        monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
        monkeypatch.setattr(torch, "get_device_module", lambda device: types.SimpleNamespace(is_available=lambda: True))
        monkeypatch.setattr(inductor, "_missing_for_npu", lambda: None)
        monkeypatch.setattr(inductor.torch_private, "load_npu_inductor", load)
        with torch._inductor.config.patch(pre_grad_custom_pass=None):
            options = inductor_options()
        assert options["pre_grad_custom_pass"].before == (its_pass,)

    @pytest.mark.slow
    def test_custom_passes_leave_training_alone(self) -> None:
        block = Block()
        twin = copy.deepcopy(block)
        run = torch.compile(block, backend="inductor", options=inductor_options())
        with torch._inductor.config.patch(force_disable_caches=True):
            run(self.x).sum().backward()
        twin(self.x).sum().backward()
        assert block.up.weight.grad is not None
        assert twin.up.weight.grad is not None
        assert torch.allclose(block.up.weight.grad, twin.up.weight.grad, atol=1e-5)
        assert records_of(run) == []

    @pytest.mark.slow
    def test_passes_set_before_still_run(self) -> None:
        seen: list[str] = []
        patches = {"pre_grad_custom_pass": lambda graph: seen.append("pre"), "post_grad_custom_pre_pass": lambda graph: seen.append("post")}
        with torch._inductor.config.patch(patches):
            options = inductor_options()
        run = torch.compile(Block().eval(), backend="inductor", options=options)
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            run(self.x)
        assert seen == ["pre", "post"]
        assert options["post_grad_custom_pre_pass"].uuid() is None

    def test_uuid_covers_the_configuration(self) -> None:
        def uuid(**options: Any) -> Any:
            return inductor_options(**options)["post_grad_custom_pre_pass"].uuid()

        assert uuid() == uuid()
        assert len({uuid(), uuid(rounding="exact"), uuid(target="cpu"), uuid(rules=())}) == 4
        with pytest.raises(ConfigError, match="unknown option"):
            inductor_options(rouding="exact")
