"""Which records belong to whom: a compiled module, function or method is asked, and has what was compiled for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npu_fusion import torch_private
from npu_fusion.backend import npu_fusion_backend, records_of, register
from tests.blocks import Block, assert_close, compiled, single


class TestRecords:
    x = torch.randn(2, 3, 16)

    def test_a_module(self) -> None:
        run = compiled(Block().eval())
        assert records_of(run) == []
        with torch.no_grad():
            run(self.x)
            run(self.x)
        record = single(run)
        assert record.calls == 2
        assert (record.config.target, record.config.executor) == ("cpu", "eager")
        assert set(record.stages) == {"aten", "fused", "lowered"}

    def test_a_function_and_a_method(self) -> None:
        block = Block().eval()

        def function(x: Tensor) -> Tensor:
            return block(x) + 1

        with torch.no_grad():
            for run in (compiled(function), compiled(block.forward)):
                run(self.x)
                assert single(run).calls == 1

    def test_a_module_compiled_in_place(self) -> None:
        block = Block().eval()
        block.compile(backend=npu_fusion_backend)
        with torch.no_grad():
            block(self.x)
        assert single(block).calls == 1

    def test_compiled_layers_of_a_module(self) -> None:
        model = nn.Sequential(Block(), Block(), Block()).eval()
        for layer in model[1:]:
            layer.compile(backend=npu_fusion_backend)
        with torch.no_grad():
            model(self.x)
        # Dynamo compiles the first, and the second runs the same graph.
        assert single(model).calls == 2
        assert records_of(model[0]) == []

    def test_two_wrappers_with_different_options(self) -> None:
        block = Block().eval()
        first, second = compiled(block), compiled(block, options={"rounding": "exact"})
        with torch.no_grad():
            first(self.x)
            assert records_of(second) == []
            second(self.x)
        assert single(first).config.rounding == "fp32_internal"
        assert single(second).config.rounding == "exact"
        assert single(first) is not single(second)

    def test_two_modules_that_share_a_graph(self) -> None:
        first, second = compiled(Block().eval()), compiled(Block().eval())
        with torch.no_grad():
            first(self.x)
            second(self.x)
        assert single(first) is single(second)
        assert single(first).calls == 2

    def test_two_modules_of_one_class_that_do_not(self) -> None:
        first, second = compiled(Block(16).eval()), compiled(Block(8).eval())
        with torch.no_grad():
            first(self.x)
            second(torch.randn(2, 3, 8))
        assert single(first) is not single(second)

    def test_recompiles(self) -> None:
        run = compiled(Block().eval(), dynamic=False)
        with torch.no_grad():
            run(self.x)
            run(torch.randn(2, 5, 16))
            run(self.x)
        assert [record.calls for record in records_of(run)] == [2, 1]

    def test_graph_breaks(self) -> None:
        block = Block().eval()

        def broken(x: Tensor) -> Tensor:
            x = block(x)
            torch._dynamo.graph_break()
            return helper(x)

        def helper(x: Tensor) -> Tensor:
            y = x * 2
            torch._dynamo.graph_break()
            return y + block(x)

        run, other = compiled(broken), compiled(lambda x: x - 1)
        with torch.no_grad():
            assert_close(run(self.x), broken(self.x))
            other(self.x)
        assert len(records_of(run)) >= 3
        assert all(record.calls == 1 for record in records_of(run))
        assert single(other) not in records_of(run)

    def test_under_a_name(self) -> None:
        register()
        register()
        run = torch.compile(Block().eval(), backend="npu_fusion")
        with torch.no_grad():
            run(self.x)
        assert single(run).calls == 1

    def test_reset_forgets(self) -> None:
        run = compiled(Block().eval())
        with torch.no_grad():
            run(self.x)
            torch.compiler.reset()
            assert records_of(run) == []
            run(self.x)
        assert single(run).calls == 1

    def test_a_compiled_object_that_dies(self) -> None:
        from npu_fusion import backend

        before = len(backend._OWNED)
        run = compiled(lambda x: x + 1)
        run(self.x)
        assert len(backend._OWNED) == before + 1
        del run
        assert len(backend._OWNED) == before

    def test_what_is_not_compiled_has_none(self) -> None:
        assert records_of(Block()) == []
        assert records_of(len) == []
        assert torch_private.current_compile_context() is None
