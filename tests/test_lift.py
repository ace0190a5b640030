"""Lift: which calls become opaque ops, with which arguments, and which must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from npu_fusion import lift as lifting
from npu_fusion.lift import LIFTED, LiftReport, bind, find_lifted, lift, lift_aten, restore

SDPA, RMS_NORM = LIFTED


def dynamo_graph(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> tuple[GraphModule, list[Any]]:
    """The first graph Dynamo makes of `fn`, and its fake inputs, lifted with the modes that are in force here."""
    caught: list[tuple[GraphModule, list[Any], LiftReport]] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        report = lift(gm, inputs)
        caught.append((gm, list(inputs), report))
        return gm.forward

    torch.compile(fn, backend=backend, dynamic=dynamic)(*args)
    gm, inputs, report = caught[0]
    gm.meta["report"] = report
    return gm, inputs


def lifted_calls(gm: GraphModule) -> list[dict[str, Any]]:
    found = [(find_lifted(node.target), node) for node in gm.graph.nodes]
    return [bind(entry, node.args, dict(node.kwargs)) for entry, node in found if entry is not None]


def report_of(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> LiftReport:
    return dynamo_graph(fn, *args, dynamic=dynamic)[0].meta["report"]


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)


class TestAttention:
    def test_every_argument_survives(self, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v = qkv[0], qkv[1][:, :2], qkv[2][:, :2]
        mask = torch.randn(1, 1, 5, 7)
        with torch.no_grad():
            gm, _ = dynamo_graph(
                lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, 0.0, False, scale=0.3, enable_gqa=True), q, k, v, mask
            )
        (call,) = lifted_calls(gm)
        assert call["attn_mask"] is not None
        assert (call["dropout_p"], call["is_causal"], call["scale"], call["enable_gqa"]) == (0.0, False, 0.3, True)

    def test_all_keywords(self, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        with torch.no_grad():
            gm, _ = dynamo_graph(lambda q, k, v: F.scaled_dot_product_attention(value=v, query=q, key=k, is_causal=True), *qkv)
        (call,) = lifted_calls(gm)
        assert [call[name].name for name in ("query", "key", "value")] == ["l_q_", "l_k_", "l_v_"]
        assert call["is_causal"] is True

    @pytest.mark.parametrize("layout", ["contiguous", "heads inside", "last dim strided"])
    @pytest.mark.parametrize("variant", ["plain", "causal", "mask", "bool mask", "gqa", "narrow value", "three dims"])
    def test_equals_torch_in_values_and_layout(self, layout: str, variant: str) -> None:
        """The fake kernel, the implementation and the restored graph agree with each other, and with torch in value."""
        q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
        if layout == "heads inside":
            q = torch.randn(2, 5, 4, 8).transpose(1, 2)
        if layout == "last dim strided":
            q = torch.randn(2, 4, 5, 16)[..., ::2]
        kwargs: dict[str, Any] = {
            "causal": {"is_causal": True},
            "mask": {"attn_mask": torch.randn(5, 7)},
            "bool mask": {"attn_mask": torch.rand(2, 1, 5, 7) > 0.3},
            "gqa": {"enable_gqa": True},
        }.get(variant, {})
        if variant == "gqa":
            k, v = k[:, :2], v[:, :2]
        if variant == "narrow value":
            v = v[..., :4]
        if variant == "three dims":
            q, k, v = q[0], k[0], v[0]
        expected = F.scaled_dot_product_attention(q, k, v, **kwargs)
        actual = torch.ops.npu_fusion_lifted.scaled_dot_product_attention(q, k, v, **kwargs)
        assert torch.equal(actual, expected)
        torch.library.opcheck(SDPA.overload, (q, k, v), kwargs, test_utils=("test_schema", "test_faketensor"))

    def test_causal_with_more_keys_than_queries_is_top_left(self, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v = qkv
        mask = torch.ones(5, 7, dtype=torch.bool).tril()
        causal = torch.ops.npu_fusion_lifted.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        assert torch.allclose(causal, F.scaled_dot_product_attention(q, k, v, mask), atol=1e-6)

    def test_dropout_stays(self, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        with torch.no_grad():
            report = report_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), *qkv)
        assert not report.lifted
        assert "dropout" in report.notes[0]

    def test_symbolic_scale(self) -> None:
        """A scale computed from a dynamic size stays an expression."""

        def attend(q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, scale=q.shape[-2] ** -0.5)

        with torch.no_grad():
            gm, _ = dynamo_graph(attend, torch.randn(1, 2, 6, 8), dynamic=True)
        (call,) = lifted_calls(gm)
        assert isinstance(call["scale"], torch.fx.Node)

    @pytest.mark.parametrize("noticed", [True, False])
    def test_a_layout_that_is_noticed_is_kept(self, noticed: bool) -> None:
        """Attention over three dimensions is contiguous in torch, and laid out as the query when lifted: `view` could tell."""
        q = torch.randn(5, 4, 8).transpose(0, 1)

        def attend(q: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(q, q, q)
            return y.view(-1) if noticed else y.transpose(0, 1).reshape(5, 32).contiguous()

        assert F.scaled_dot_product_attention(q, q, q).is_contiguous()
        with torch.no_grad():
            gm, _ = dynamo_graph(attend, q)
        attention = next(node for node in gm.graph.nodes if find_lifted(node.target))
        assert [user.target for user in attention.users] == (["contiguous"] if noticed else ["transpose"])
        assert torch.equal(gm(q)[0], attend(q))


class TestRMSNorm:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_default_eps_is_the_computation_dtypes(self, dtype: torch.dtype) -> None:
        x = (torch.randn(3, 16) * 1e-3).to(dtype)
        with torch.no_grad():
            gm, _ = dynamo_graph(lambda x: F.rms_norm(x, (16,)), x)
        (call,) = lifted_calls(gm)
        assert call["eps"] == torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert torch.equal(gm(x)[0], F.rms_norm(x, (16,)))

    @pytest.mark.parametrize("spelling", ["module", "functional", "torch"])
    def test_every_spelling(self, spelling: str) -> None:
        module = torch.nn.RMSNorm(16, eps=1e-5)
        weight = module.weight
        spellings: dict[str, Callable[[Tensor], Tensor]] = {
            "module": module,
            "functional": lambda x: F.rms_norm(x, [16], weight=weight, eps=1e-5),
            "torch": lambda x: torch.rms_norm(x, (16,), weight, 1e-5),
        }
        with torch.no_grad():
            gm, _ = dynamo_graph(spellings[spelling], torch.randn(3, 16))
        (call,) = lifted_calls(gm)
        assert list(call["normalized_shape"]) == [16]
        assert call["eps"] == 1e-5
        assert call["weight"] is not None

    @pytest.mark.parametrize("shape", [(3, 16), (2, 3, 16), (2, 5, 4, 16)])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_equals_torch(self, shape: tuple[int, ...], transposed: bool) -> None:
        x = torch.randn(shape)
        if transposed:
            x = x.transpose(0, -2)
        weight = torch.randn(16)
        assert torch.equal(torch.ops.npu_fusion_lifted.rms_norm(x, [16], weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6))
        torch.library.opcheck(RMS_NORM.overload, (x, [16], weight, 1e-6), test_utils=("test_schema", "test_faketensor"))

    def test_several_dimensions(self) -> None:
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            gm, _ = dynamo_graph(lambda x: F.rms_norm(x, (3, 16)), x)
        assert list(lifted_calls(gm)[0]["normalized_shape"]) == [3, 16]

    def test_weight_of_another_dtype_stays(self) -> None:
        weight = torch.randn(16)
        with torch.no_grad(), pytest.warns(UserWarning, match="Mismatch dtype"):
            report = report_of(lambda x: F.rms_norm(x, (16,), weight, 1e-6), torch.randn(3, 16).bfloat16())
        assert report.skipped == [("rms_norm", "weight and input differ in dtype")]


class TestUnsafeGraphs:
    def normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (8,))

    def test_gradients(self) -> None:
        assert "gradients" in report_of(self.normed, torch.randn(2, 8, requires_grad=True)).notes[0]

    def test_gradients_turned_on_inside(self) -> None:
        def inner(x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.normed(x)

        with torch.no_grad():
            assert "gradients" in report_of(inner, torch.randn(2, 8, requires_grad=True)).notes[0]

    def test_no_input_that_needs_gradients(self) -> None:
        assert report_of(self.normed, torch.randn(2, 8)).lifted == {"rms_norm": 1}

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            assert report_of(self.normed, torch.randn(2, 8)).lifted == {"rms_norm": 1}

    def test_autocast_outside(self) -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert "autocast" in report_of(self.normed, torch.randn(2, 8)).notes[0]

    def test_autocast_inside(self) -> None:
        def inner(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.normed(x)

        with torch.no_grad():
            assert "autocast" in report_of(inner, torch.randn(2, 8)).notes[0]

    def test_vmap(self) -> None:
        with torch.no_grad():
            assert "functorch" in report_of(torch.vmap(self.normed), torch.randn(3, 2, 8)).notes[0]

    def test_graph_without_calls_has_nothing_to_say(self) -> None:
        assert report_of(lambda x: x + 1, torch.randn(2, requires_grad=True)) == LiftReport()


class TestAten:
    def test_exported_programs(self) -> None:
        class Block(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = torch.nn.RMSNorm(8)

            def forward(self, q: Tensor) -> Tensor:
                return self.norm(F.scaled_dot_product_attention(q, q, q, is_causal=True))

        q = torch.randn(1, 2, 4, 8)
        block = Block().eval()
        with torch.no_grad():
            gm = torch.export.export(block, (q,)).run_decompositions({}).module()
            assert isinstance(gm, GraphModule)
            assert lift_aten(gm).lifted == {"scaled_dot_product_attention": 1, "rms_norm": 1}
            assert torch.equal(gm(q), block(q))
            assert restore(gm) == 2
            assert torch.equal(gm(q), block(q))
        assert not lifted_calls(gm)


class TestTable:
    def test_schemas_are_those_of_aten(self) -> None:
        for entry in LIFTED:
            ours, theirs = entry.overload._schema.arguments, entry.aten._schema.arguments
            assert [(a.name, str(a.type), a.default_value, a.kwarg_only) for a in ours] == [
                (a.name, str(a.type), a.default_value, a.kwarg_only) for a in theirs
            ]

    def test_bind_rejects_what_python_would(self) -> None:
        with pytest.raises(TypeError, match="unknown or given twice: eps"):
            bind(RMS_NORM, (1, 2, 3, 4), {"eps": 1.0})
        with pytest.raises(TypeError, match="takes 4 arguments"):
            bind(RMS_NORM, (1, 2, 3, 4, 5), {})

    @pytest.mark.parametrize(
        ("strides", "order"),
        [((60, 20, 5, 1), [0, 1, 2, 3]), ((60, 5, 15, 1), [0, 2, 1, 3]), ((20, 20, 5, 1), None), ((120, 40, 10, 2), None)],
    )
    def test_dim_order(self, strides: tuple[int, ...], order: list[int] | None) -> None:
        tensor = torch.empty(1000).as_strided((2, 3, 4, 5), strides)
        assert lifting._dim_order(tensor) == order
