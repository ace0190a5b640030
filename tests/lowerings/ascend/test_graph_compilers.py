"""Handing graphs to npugraph_ex and torchair, as far as it needs neither: what the handed graph looks like, and the hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from npu_fusion import torch_private
from npu_fusion.aot import trace
from npu_fusion.capture import CaptureFacts, facts
from npu_fusion.config import FusionConfig
from npu_fusion.errors import ConfigError
from npu_fusion.execute import eager
from npu_fusion.lowerings.ascend import graph_compilers
from npu_fusion.lowerings.ascend.graph_compilers import HOOK, fusion_pass, hand_over, load_compiler, npugraph_ex_options, torchair_config
from npu_fusion.record import GraphRecord
from npu_fusion.report import report
from tests.blocks import Block, assert_close

aten = torch.ops.aten
LIBRARY = torch.library.Library("npu_fusion_test_handover", "DEF")
LIBRARY.define("attend(Tensor x, *, SymInt[]? lengths=None) -> Tensor")
LIBRARY.define("attend.out(Tensor x, *, SymInt[]? lengths=None, Tensor[](a!) out) -> Tensor")
LIBRARY.impl("attend", lambda x, *, lengths=None: x * float(sum(lengths)), "CPU")
LIBRARY.impl("attend", lambda x, *, lengths=None: torch.empty_like(x), "Meta")
attend = torch.ops.npu_fusion_test_handover.attend


class Compiler:
    """Stands for npugraph_ex: keeps what it is given, and runs it."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.examples: list[list[Any]] = []
        self.options: list[dict[str, Any]] = []

    def compile_fx(self, gm: GraphModule, example_inputs: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
        if "unknown" in options:
            raise ValueError("Invalid option 'unknown'")
        self.graphs.append(gm)
        self.examples.append(example_inputs)
        self.options.append(options)
        return gm.forward


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(graph_compilers, "load_compiler", lambda name: made)
    return made


@pytest.fixture(autouse=True)
def _facts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ours = CaptureFacts(lambda target: ("lengths",) if getattr(target, "namespace", "") == LIBRARY.ns else (), lambda target: None)
    monkeypatch.setattr(facts, "_REGISTERED", [ours])
    with torch.no_grad():
        yield


def handed(fn: Any, *, dynamic: bool = False, prepare: Callable[[GraphModule], None] | None = None, **options: Any) -> Callable[..., Any]:
    """Compile a function whose graphs are handed over."""

    def compile_graph(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        if prepare is not None:
            prepare(gm)
        return hand_over(gm, inputs, GraphRecord(FusionConfig(**{"target": "ascend910b", "executor": "npugraph_ex", **options})))

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        return trace(gm, inputs, compile_graph, compile_graph, compile_graph)

    return torch.compile(fn, backend=backend, dynamic=dynamic)


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


class TestHandOver:
    def test_options(self, compiler: Compiler) -> None:
        run = handed(torch.sin, capture_limit=7, executor_options={"clone_output": False, "frozen_parameter": True})
        assert torch.equal(run(torch.ones(3)), torch.ones(3).sin())
        assert compiler.options == [{"clone_output": False, "capture_limit": 7, "frozen_parameter": True}]
        handed(torch.cos)(torch.ones(3))
        assert compiler.options[1] == {"clone_output": True, "capture_limit": 64}

    def test_an_unknown_option_is_our_error(self, compiler: Compiler) -> None:
        with pytest.raises(Exception, match="ConfigError: npugraph_ex: Invalid option 'unknown'"):
            handed(torch.sin, executor_options={"unknown": 1})(torch.ones(3))

    def test_inputs_that_stay_where_they_are_are_marked(self, compiler: Compiler) -> None:
        class Step(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = torch.nn.Parameter(torch.ones(4))

            def forward(self, cache: Tensor, x: Tensor) -> Tensor:
                cache[1:2] = x * self.scale
                return cache.sum(0)

        def write_through_a_view(gm: GraphModule) -> None:
            """What `reinplace` makes of a cache write."""
            from npu_fusion.reinplace import reinplace

            assert reinplace(gm) == 1

        run = handed(Step(), prepare=write_through_a_view)
        cache = torch.zeros(3, 4)
        run(cache, torch.full((1, 4), 2.0))
        assert cache[1].tolist() == [2.0] * 4
        marked = [hasattr(example, "_torchair_is_parameter") for example in compiler.examples[0]]
        shapes = [tuple(example.shape) for example, mark in zip(compiler.examples[0], marked) if mark]
        assert sorted(shapes) == [(3, 4), (4,)]
        assert len(marked) == 3

    @pytest.mark.parametrize(("mode", "marked"), [("reduce-overhead", True), ("max-autotune", False)])
    def test_the_graph_engine_takes_marked_inputs_for_constants(self, mode: str, marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[bool] = []

        def compile_graph(compiler: Any, gm: GraphModule, examples: list[Any], config: FusionConfig) -> Callable[..., Any]:
            seen.extend(hasattr(example, "_torchair_is_parameter") for example in examples)
            return gm.forward

        monkeypatch.setattr(graph_compilers, "load_compiler", lambda name: None)
        monkeypatch.setattr(graph_compilers, "_torchair", compile_graph)
        handed(lambda cache: cache.add_(1), executor="torchair", executor_options={"mode": mode})(torch.zeros(3))
        assert seen == [marked]

    def test_semantic_ops_become_their_references(self, compiler: Compiler) -> None:
        run = handed(lambda x: torch.ops.npu_fusion.glu(x, x * 2, activation="silu"))
        x = torch.randn(4)
        assert_close(run(x), torch.nn.functional.silu(x) * x * 2)
        assert not any("npu_fusion" in str(target) for target in targets(compiler.graphs[0]))

    def test_constants_of_the_device_become_inputs(self, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph_compilers, "_on_device", lambda node: True)
        constant = torch.arange(3.0)

        def add_constant(gm: GraphModule) -> None:
            gm.register_buffer("table", constant)
            (output,) = gm.graph.find_nodes(op="output")
            with gm.graph.inserting_before(output):
                table = gm.graph.get_attr("table")
                total = gm.graph.call_function(aten.add.Tensor, (output.args[0][0], table))  # type: ignore[index, arg-type]
            with torch_private.fake_mode_of(gm):
                table.meta["val"] = total.meta["val"] = torch.empty(3)
            output.args = ((total,),)

        run = handed(torch.sin, prepare=add_constant)
        for _ in range(2):
            x = torch.randn(3)
            assert torch.equal(run(x), x.sin() + torch.arange(3.0))
        assert list(compiler.graphs[0].graph.find_nodes(op="get_attr")) == []
        assert [hasattr(example, "_torchair_is_parameter") for example in compiler.examples[0]] == [False, True]

    def test_numbers_of_host_lists_are_worked_out_beside_the_graph(self, compiler: Compiler) -> None:
        def step(x: Tensor, a: int, b: int) -> tuple[int, Tensor, int, Tensor]:
            y = attend(x, lengths=[a, b + 1])
            return a, y, b + 1, attend(y + 1, lengths=[b + 1, 2 * a])

        run = handed(step, dynamic=True)
        for a, b in ((3, 5), (4, 7), (9, 2)):
            x = torch.randn(4)
            for actual, expected in zip(run(x, a, b), step(x, a, b), strict=True):
                assert actual == expected if isinstance(expected, int) else torch.equal(actual, expected)
        (gm,) = compiler.graphs
        placeholders = set(gm.graph.find_nodes(op="placeholder"))
        for node in gm.graph.find_nodes(op="call_function", target=attend.default):
            assert set(node.kwargs["lengths"]) <= placeholders
        numbers = {node for node in placeholders if isinstance(node.meta["val"], torch.SymInt)}
        users = {user.target for node in numbers for user in node.users}
        assert users <= {attend.default}, "nothing else depends on a length"

    def test_numbers_that_kernels_use_stay_in_the_graph(self, compiler: Compiler) -> None:
        def step(x: Tensor, a: int) -> Tensor:
            return attend(x, lengths=[a, a + 1]) * (a + 1)

        run = handed(step, dynamic=True)
        for a in (3, 4):
            x = torch.randn(4)
            assert torch.equal(run(x, a), step(x, a))

    def test_without_torch_npu_it_is_said(self) -> None:
        with pytest.raises(ConfigError, match="executor 'npugraph_ex' needs torch_npu, which is not installed here"):
            load_compiler("npugraph_ex")


class TestHooks:
    @staticmethod
    def compile_with(hook: Any, fn: Any) -> Any:
        """As npugraph_ex does: AOT, the hook, and the graph runs."""

        def compile_graph(gm: GraphModule, inputs: Sequence[Any]) -> Any:
            hook(gm, inputs, None)
            return eager(gm)

        def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
            return trace(gm, inputs, compile_graph, compile_graph, compile_graph)

        return torch.compile(fn, backend=backend)

    def test_a_pass_fuses_and_reports(self) -> None:
        block = Block().eval()
        run = self.compile_with(fusion_pass(FusionConfig(), "npugraph_ex"), block)
        x = torch.randn(2, 3, 16)
        assert_close(run(x), block(x))
        found = report(run)
        found.expect(rms_norm=1, glu=1)
        assert found.effective_config.executor == "npugraph_ex"
        assert not any("npu_fusion." in str(node.target) for node in found.graph("lowered").graph.nodes)

    def test_cache_writes_are_in_place_but_for_the_graph_engine(self) -> None:
        def step(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
            cache.index_copy_(0, at, x)
            return cache.sum(0)

        for executor, expected in (("npugraph_ex", True), ("torchair", False)):
            run = self.compile_with(fusion_pass(FusionConfig(), executor), step)
            mine, theirs = torch.zeros(4, 2), torch.zeros(4, 2)
            x, at = torch.randn(1, 2), torch.tensor([2])
            assert torch.equal(run(mine, x, at), step(theirs, x, at))
            assert torch.equal(mine, theirs)
            lowered = targets(report(run).graph("lowered"))
            assert (aten.index_copy_.default in lowered) is expected
            torch.compiler.reset()

    def test_the_pass_that_stood_there_runs_first(self) -> None:
        seen: list[list[Any]] = []
        options = npugraph_ex_options(base={HOOK: lambda gm, inputs, config: seen.append(targets(gm)), "clone_output": True})
        assert set(options) == {HOOK, "clone_output"}
        self.compile_with(options[HOOK], lambda x: torch.nn.functional.silu(x) * x)(torch.randn(4))
        assert seen == [[aten.silu.default, aten.mul.Tensor]]

    def test_torchair_config_keeps_the_users(self) -> None:
        class Config:
            """As torchair's: what is set on an option is its value."""

            def __init__(self, value: Any) -> None:
                self.__dict__[HOOK] = SimpleNamespace(value=value)

            def __setattr__(self, name: str, value: Any) -> None:
                self.__dict__[name].value = value

        seen: list[str] = []
        base = Config(lambda gm, inputs, config: seen.append("mine"))
        made = torchair_config(base=base)
        assert made is base
        self.compile_with(getattr(made, HOOK).value, torch.sin)(torch.randn(4))
        assert seen == ["mine"]

    def test_training_is_left_alone(self) -> None:
        block = Block()
        run = self.compile_with(fusion_pass(FusionConfig(), "npugraph_ex"), block)
        with torch.enable_grad():
            run(torch.randn(2, 3, 16)).sum().backward()
        assert block.up.weight.grad is not None

    def test_a_failure_of_the_engine_leaves_the_graph_as_it_was(self, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
        def broken(gm: GraphModule, *_: Any) -> None:
            gm.graph.erase_node(next(iter(reversed(gm.graph.nodes))))
            raise KeyError("broken")

        monkeypatch.setattr(graph_compilers, "fuse", broken)
        run = self.compile_with(fusion_pass(FusionConfig(), "npugraph_ex"), torch.sin)
        assert torch.equal(run(torch.ones(3)), torch.ones(3).sin())
        assert "npu_fusion failed on this graph, which runs unfused: KeyError: 'broken'" in report(run).notes
        assert len(caplog.records) == 1

    def test_unknown_options_are_errors(self) -> None:
        with pytest.raises(ConfigError, match="unknown option 'rouding'"):
            npugraph_ex_options(rouding="exact")

    def test_nothing_of_torch_npu_is_imported(self) -> None:
        npugraph_ex_options()
        assert "torch_npu" not in sys.modules
