"""The backend end to end: correctness in every mode, and which records belong to whom."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_fusion.backend import FusionBackend, records_of, soc_target
from npu_fusion.config import FusionConfig
from npu_fusion.errors import ConfigError, VerificationError
from tests.blocks import Block, assert_close, compiled, single

aten = torch.ops.aten


class TestModes:
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_inference(self, context: Callable[[], Any], dynamic: bool) -> None:
        block = Block().eval()
        run = compiled(block, dynamic=dynamic)
        with context():
            for length in (3, 5, 7):
                x = torch.randn(2, length, 16)
                assert_close(run(x), block(x))
        assert sum(record.calls for record in records_of(run)) == 3
        assert not any("unfused" in note for record in records_of(run) for note in record.notes)

    def test_training_is_correct_and_says_that_it_is_unfused(self) -> None:
        block = Block()
        twin = copy.deepcopy(block)
        run = compiled(block)
        for _ in range(2):
            x = torch.randn(2, 3, 16)
            run(x).sum().backward()
            twin(x).sum().backward()
        for mine, theirs in zip(block.parameters(), twin.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)
        record = single(run)
        assert record.calls == 2
        assert "gradients are recorded" in record.notes[0]
        assert not record.sites
        assert set(record.stages) == {"aten", "fused", "lowered"}

    def test_training_then_inference(self) -> None:
        block = Block()
        run = compiled(block)
        x = torch.randn(2, 3, 16)
        run(x).sum().backward()
        with torch.no_grad():
            assert_close(run(x), block(x))
        assert [any("unfused" in note for note in record.notes) for record in records_of(run)] == [True, False]

    def test_autocast(self) -> None:
        block = Block().eval()
        run = compiled(block)
        x = torch.randn(2, 3, 16)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(run(x), block(x), 2e-2)
        assert any("autocast" in note for note in single(run).notes)

    def test_mixed_dtypes(self) -> None:
        def mixed(x: Tensor, w: Tensor) -> Tensor:
            return F.rms_norm(x, (16,), None, 1e-6) * w + x.to(torch.float64)

        x, w = torch.randn(3, 16).bfloat16(), torch.randn(16)
        with torch.no_grad():
            assert_close(compiled(mixed)(x, w), mixed(x, w), 2e-2)

    def test_inputs_that_are_not_contiguous(self) -> None:
        block = Block().eval()
        run = compiled(block)
        with torch.no_grad():
            for x in (torch.randn(3, 2, 16).transpose(0, 1), torch.randn(2, 3, 32)[..., ::2], torch.randn(1, 3, 16).expand(2, 3, 16)):
                assert_close(run(x), block(x))

    def test_integer_and_symbolic_arguments(self) -> None:
        def take(x: Tensor, n: int, scale: float) -> tuple[Tensor, int]:
            return F.rms_norm(x[:n], (8,), None, 1e-5) * scale, n + 1

        run = compiled(take, dynamic=True)
        x = torch.randn(6, 8)
        with torch.no_grad():
            for n, scale in ((2, 0.5), (3, 0.5), (5, 0.25)):
                assert_close(run(x, n, scale), take(x, n, scale))

    def test_varying_eps_under_dynamic(self) -> None:
        """Two modules of one class share a graph, with eps an input of it."""
        x = torch.randn(3, 16) * 1e-2
        with torch.no_grad():
            for eps in (1e-6, 1e-1, 1e-3):
                norm = nn.RMSNorm(16, eps=eps)
                assert_close(compiled(norm, dynamic=True)(x), norm(x))


class TestMutationAndAliasing:
    def test_inputs_mutated_and_aliased_outputs(self) -> None:
        def fn(cache: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
            cache.index_copy_(0, pos, x)
            x.add_(1)
            return cache, cache[1:], x.view(-1), cache.sum() + x

        run = compiled(fn)
        mine = [torch.zeros(4, 3), torch.randn(1, 3), torch.tensor([2])]
        theirs = [t.clone() for t in mine]
        with torch.no_grad():
            for _ in range(3):
                results, expected = run(*mine), fn(*theirs)
                assert_close(results, expected)
                assert_close(mine, theirs)
                assert results[0] is mine[0]
                assert results[1].untyped_storage().data_ptr() == mine[0].untyped_storage().data_ptr()

    def test_arguments_that_share_memory(self) -> None:
        """Apart, one tensor, overlapping. (From overlapping to apart torch 2.13 itself lacks a guard, with every AOT backend.)"""

        def fn(a: Tensor, b: Tensor, pos: Tensor) -> Tensor:
            a.index_copy_(0, pos, torch.ones(1, 3))
            return a + b

        run = compiled(fn)
        pos = torch.tensor([1])
        pairs: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = [
            lambda t: (t[:3], torch.full((3, 3), 5.0)),
            lambda t: (t, t),
            lambda t: (t[:3], t[1:]),
        ]
        with torch.no_grad():
            for pair in pairs:
                mine, theirs = torch.zeros(4, 3), torch.zeros(4, 3)
                assert_close(run(*pair(mine), pos), fn(*pair(theirs), pos))
                assert_close(mine, theirs)

    def test_buffers(self) -> None:
        class Counter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("count", torch.zeros(2, 3, 4))

            def forward(self, x: Tensor) -> Tensor:
                self.count[:, 1] = x
                return self.count.sum()

        module = Counter()
        twin = copy.deepcopy(module)
        run = compiled(module)
        with torch.no_grad():
            for _ in range(2):
                x = torch.randn(2, 4)
                assert_close(run(x), twin(x))
        assert torch.equal(module.count, twin.count)
        assert [site.fused for site in single(run).sites if site.idiom == "kv_update"] == [True]


class TestTensorSubclasses:
    @pytest.fixture
    def mesh(self) -> Iterator[Any]:
        from torch.distributed.device_mesh import init_device_mesh

        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()

    def test_dtensor(self, mesh: Any) -> None:
        from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

        # Attention has no sharding strategy on a CPU, in eager neither.
        block = nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 16), nn.SiLU())
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            expected = block(x)
            distributed = distribute_module(block, mesh)
            run = compiled(distributed)
            actual = run(distribute_tensor(x, mesh, [Shard(0)]))
        assert isinstance(actual, DTensor)
        assert_close(actual.full_tensor(), expected)
        assert any("tensor subclass" in note for note in single(run).notes)

    def test_two_tensors_in_one(self) -> None:
        from torch.testing._internal.two_tensor import TwoTensor

        def fn(x: Tensor) -> Tensor:
            return F.silu(F.rms_norm(x, (8,), None, 1e-5)) * 2

        a, b = torch.randn(3, 8), torch.randn(3, 8)
        run = compiled(fn)
        with torch.no_grad():
            actual = run(TwoTensor(a, b))
            assert isinstance(actual, TwoTensor)
            assert_close([actual.a, actual.b], [fn(a), fn(b)])
        assert any("tensor subclass" in note for note in single(run).notes)


class TestFailures:
    x = torch.randn(2, 3, 16)

    def test_a_failing_engine_leaves_the_model_running(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        def broken(gm: torch.fx.GraphModule, *_: Any) -> None:
            node = next(node for node in gm.graph.nodes if node.op == "call_function")
            node.replace_all_uses_with(next(iter(gm.graph.nodes)))
            raise RuntimeError("half-way through")

        monkeypatch.setattr("npu_fusion.pipeline.fuse_graph", broken)
        block = Block().eval()
        run = compiled(block, dynamic=False)
        with torch.no_grad(), caplog.at_level(logging.ERROR, "npu_fusion"):
            assert_close(run(self.x), block(self.x))
            assert_close(run(self.x[:, :2]), block(self.x[:, :2]))
        assert len([entry for entry in caplog.records if entry.exc_info]) == 1
        for record in records_of(run):
            assert record.notes == ["npu_fusion failed on this graph, which runs unfused: RuntimeError: half-way through"]
            assert not record.sites
            assert all("npu_fusion" not in str(node.target) for node in record.stages["lowered"].graph.nodes)

    @pytest.mark.parametrize("error", [VerificationError("off by one"), ConfigError("no such rule")])
    def test_what_the_user_asked_to_hear_of_is_raised(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def raising(*_: Any) -> None:
            raise error

        monkeypatch.setattr("npu_fusion.pipeline.fuse_graph", raising)
        with torch.no_grad(), pytest.raises(Exception, match=str(error)):
            compiled(Block().eval())(self.x)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [({"options": {"targt": "cpu"}}, "unknown option 'targt'"), ({"mode": "max-autotune"}, "unknown mode 'max-autotune'")],
    )
    def test_unknown_options_and_modes(self, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(Exception, match=message):
            compiled(Block().eval(), **kwargs)(self.x)

    def test_dynamos_own_exceptions_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A rule that makes a float a literal restarts Dynamo through the backend."""
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis

        tries: list[int] = []
        from npu_fusion import pipeline

        original = pipeline.fuse_graph

        def restart_once(*args: Any) -> None:
            tries.append(1)
            if len(tries) == 1:
                raise TensorifyScalarRestartAnalysis
            original(*args)

        monkeypatch.setattr("npu_fusion.pipeline.fuse_graph", restart_once)
        block = Block().eval()
        run = compiled(block)
        with torch.no_grad():
            assert_close(run(self.x), block(self.x))
        assert len(tries) == 2
        assert single(run).calls == 1


class TestConfiguration:
    def test_a_config_and_a_backend_object(self) -> None:
        x = torch.randn(2, 3, 16)
        backend = FusionBackend(FusionConfig(rounding="exact"))
        run = torch.compile(Block().eval(), backend=backend)
        other = compiled(Block().eval(), options=FusionConfig(rounding="exact"))
        with torch.no_grad():
            run(x)
            other(x)
        assert backend.records == records_of(run)
        assert single(other).config.rounding == "exact"

    def test_reduce_overhead_on_a_cpu(self) -> None:
        block, x = Block().eval(), torch.randn(2, 3, 16)
        run = compiled(block, mode="reduce-overhead")
        with torch.no_grad():
            assert_close(run(x), block(x))
        assert single(run).config.executor == "eager"
        assert "executor eager in place of graph" in single(run).notes[-1]

    def test_dry_run_computes_without_the_lowered_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For a target that is not here: compiled as for it, run as traced."""
        block, x = Block().eval(), torch.randn(2, 3, 16)

        def no_executor(*_: Any) -> None:
            raise AssertionError("a dry run builds no executor")

        monkeypatch.setattr("npu_fusion.backend.execute", no_executor)
        backend = FusionBackend(dry_run=True)
        with torch.no_grad():
            assert_close(torch.compile(block, backend=backend)(x), block(x))
        assert "lowered" in backend.records[0].stages

    def test_meta_tensors_and_none_at_all_are_for_the_cpu(self) -> None:
        backend = FusionBackend(dry_run=True)
        run = torch.compile(lambda: torch.ones(3) * 2, backend=backend)
        run()
        torch.compile(Block().eval().to("meta"), backend=backend)(torch.empty(2, 3, 16, device="meta"))
        assert {record.config.target for record in backend.records} == {"cpu"}

    @pytest.mark.parametrize(
        ("name", "target"),
        [
            ("Ascend910B3", "ascend910b"),
            ("Ascend910_9382", "ascend910_93"),
            ("Ascend950PR_9599", "ascend950"),
            ("Ascend910_9599", "ascend950"),
        ],
    )
    def test_targets_of_devices(self, name: str, target: str) -> None:
        assert soc_target(name) == target


class TestCaches:
    """Whole decode steps of transformers models with a static cache."""

    @staticmethod
    def model(kind: str) -> Any:
        from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

        size: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
        }
        configs: dict[str, Callable[[], Any]] = {
            "llama": lambda: LlamaConfig(**size),
            "qwen3": lambda: Qwen3Config(**size),
            "gemma3": lambda: Gemma3TextConfig(**size, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        }
        return AutoModelForCausalLM.from_config(configs[kind]()).eval()

    @pytest.mark.parametrize(("kind", "dynamic"), [("llama", False), ("llama", True), ("qwen3", False), ("gemma3", False)])
    def test_decode_writes_into_the_cache(self, kind: str, dynamic: bool) -> None:
        from transformers import StaticCache

        model = self.model(kind)
        mine, theirs = (StaticCache(config=model.config, max_cache_len=24) for _ in range(2))
        run = compiled(model, dynamic=dynamic)
        ids = torch.randint(0, 64, (1, 6))
        with torch.no_grad():
            for step in range(6):
                tokens = ids if step == 0 else ids[:, step - 1 : step]
                assert_close(run(tokens, past_key_values=mine).logits, model(tokens, past_key_values=theirs).logits)
        for ours, expected in zip(mine.layers, theirs.layers, strict=True):
            assert_close([ours.keys, ours.values], [expected.keys, expected.values])
        decodes = [record for record in records_of(run) if any(site.idiom == "kv_update" for site in record.sites)]
        assert decodes
        for record in decodes:
            updates = [site for site in record.sites if site.idiom == "kv_update"]
            assert len(updates) == 4
            assert all(site.fused for site in updates)
            assert {site.module for site in updates} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
            graph = record.stages["lowered"].graph
            # The window of a full sliding layer moves as a whole: its copy is the write itself.
            rolled = {user for node in graph.nodes if node.target is aten.roll.default for user in _flow(node)}
            copies = [node for node in graph.nodes if node.target is aten.copy_.default and node.args[0].meta["val"].dim() == 4]
            assert all(node.args[1] in rolled for node in copies)


def _flow(node: torch.fx.Node) -> set[torch.fx.Node]:
    return {node, *node.users}
