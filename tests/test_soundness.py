"""The rules of soundness of the design, one or more named tests each."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import npu_fusion
from npu_fusion import FusionConfig, FusionReport
from npu_fusion.lower import REFERENCE, Arguments, Builder, Provider, providers_of, register_provider
from npu_fusion.match import Match
from npu_fusion.ops.norm import rms_norm
from npu_fusion.pattern import var
from npu_fusion.rule import Call, Rule
from tests.graphs import aten_graph, fuse_with, muladd

x, y, z = var("x"), var("y"), var("z")


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) + 1)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def compiled_and_checked(model: Any, *inputs: Tensor, **options: Any) -> FusionReport:
    """Compile, run, compare with eager, report."""
    compiled = torch.compile(model, backend="npu_fusion", **options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*[t.clone() for t in inputs]), model(*[t.clone() for t in inputs]), rtol=2e-2, atol=2e-2)
    return npu_fusion.report(compiled)


# -------------------------------------------------------------------- 1


def test_1_an_exception_in_a_rule_skips_the_site_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def broken(m: Match) -> Call:
        raise IndexError("a bug")

    rule = Rule("broken", (x * y + z).as_("site"), broken, muladd.name, idioms={"glu": "site"}, gist=(x * y + z).as_("site"))

    def fn(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a * b + c

    with caplog.at_level(logging.WARNING, logger="npu_fusion"):
        report = compiled_and_checked(fn, *torch.rand(3, 4), options={"extra_rules": (rule,)})
    assert report.rule_errors == {"broken": "IndexError: a bug"}
    assert len([record for record in caplog.records if "'broken'" in record.getMessage()]) == 1
    (missed,) = report.missed
    assert "IndexError" in (missed.reason or "")
    assert "broken" in str(report)


def test_1_what_is_not_certain_does_not_fire() -> None:
    """The weight is as long as the batch, not as the normalised dimension."""

    def fn(a: Tensor, w: Tensor) -> Tensor:
        return a * torch.rsqrt(a.pow(2).mean(0, keepdim=True) + 1e-6) * w

    assert not compiled_and_checked(fn, torch.randn(4, 8), torch.rand(8)).ops["rms_norm"]


# -------------------------------------------------------------------- 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_2_eps_is_taken_from_the_graph(eps: float, dynamic: bool) -> None:
    norm = Norm(8, eps)
    inputs = torch.randn(4, 8) * 0.1
    report = compiled_and_checked(norm, inputs, dynamic=dynamic)
    assert report.idioms["rms_norm"] == 1


def test_2_activations_are_taken_from_the_graph() -> None:
    for activation in (F.silu, F.gelu, lambda g: F.gelu(g, approximate="tanh"), torch.sigmoid):
        report = compiled_and_checked(lambda g, u, act=activation: act(g) * u, torch.randn(4, 8), torch.randn(4, 8))
        assert report.idioms["glu"] == 1


def test_2_a_mask_that_is_not_provably_causal_is_kept() -> None:
    """Causal but for one entry."""
    q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[0, 5] = True
    compiled_and_checked(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask), q, k, v, mask)


# -------------------------------------------------------------------- 3


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda a, b: (F.silu(a) * b, F.silu(a)), id="returned"),
        pytest.param(lambda a, b: (F.silu(a) * b, F.silu(a).view(-1)), id="returned as a view"),
        pytest.param(lambda a, b: (F.silu(a) * b, F.silu(a).exp()), id="used elsewhere"),
        pytest.param(lambda a, b: (F.silu(a) * b, F.silu(a).add_(1)), id="mutated"),
    ],
)
def test_3_intermediates_that_are_needed_stay_computed(fn: Any) -> None:
    report = compiled_and_checked(fn, torch.randn(4, 8), torch.randn(4, 8))
    graph = report.graph("lowered")
    assert any(node.target is torch.ops.aten.silu.default for node in graph.graph.nodes)


def test_3_mutated_inputs_are_written_once_with_the_right_values() -> None:
    def fn(a: Tensor, b: Tensor, cache: Tensor) -> Tensor:
        product = F.silu(a) * b
        cache[1:3].copy_(product[:2])
        return product + cache.sum()

    a, b, cache = torch.randn(4, 8), torch.randn(4, 8), torch.zeros(4, 8)
    expected_cache = cache.clone()
    expected = fn(a, b, expected_cache)
    compiled = torch.compile(fn, backend="npu_fusion")
    with torch.no_grad():
        torch.testing.assert_close(compiled(a, b, cache), expected)
    torch.testing.assert_close(cache, expected_cache)
    assert npu_fusion.report(compiled).idioms["glu"] == 1


def test_3_outputs_that_alias_inputs_still_do() -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(a) * b, a.view(-1)[:3]

    a, b = torch.randn(4, 8), torch.randn(4, 8)
    with torch.no_grad():
        _, alias = torch.compile(fn, backend="npu_fusion")(a, b)
    assert alias.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()


def test_3_results_that_the_caller_may_write_to_are_separate_tensors() -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        product = F.silu(a) * b
        return product, product.clone()

    a, b = torch.randn(4, 8), torch.randn(4, 8)
    compiled = torch.compile(fn, backend="npu_fusion")
    with torch.no_grad():
        first, second = compiled(a, b)
        first.zero_()
    assert npu_fusion.report(compiled).idioms["glu"] == 1
    torch.testing.assert_close(second, fn(a, b)[1])


# -------------------------------------------------------------------- 4


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_4_a_rule_fires_in_every_dtype_static_and_dynamic(dtype: torch.dtype, dynamic: bool) -> None:
    norm = Norm(8, 1e-6).to(dtype)
    assert compiled_and_checked(norm, torch.randn(3, 5, 8).to(dtype), dynamic=dynamic).idioms["rms_norm"] == 1


def test_4_look_alikes_are_not_conflated() -> None:
    def centred(a: Tensor, w: Tensor) -> Tensor:
        a = a - a.mean(-1, keepdim=True)
        return a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    def not_the_same(a: Tensor, w: Tensor) -> Tensor:
        return a * torch.rsqrt((a + 1).pow(2).mean(-1, keepdim=True) + 1e-6) * w

    for fn in (centred, not_the_same):
        assert not compiled_and_checked(fn, torch.randn(4, 8), torch.rand(8)).ops["rms_norm"]


# -------------------------------------------------------------------- 5


def test_5_what_a_provider_refuses_falls_to_the_next_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_fusion import lower

    def picky(b: Builder, a: Arguments) -> Node:
        b.emit(torch.ops.aten.exp.default, a.x)
        b.refuse("the last dimension is no multiple of 32")

    def willing(b: Builder, a: Arguments) -> Node:
        return b.emit(rms_norm.overload, a.x, a.weight, a.eps, out_dtype=a.out_dtype)

    monkeypatch.setattr(lower, "_PROVIDERS", [])
    register_provider(
        Provider("picky", "rms_norm", ("cpu",), picky),
        Provider("willing", "rms_norm", ("cpu",), willing, 1),
        Provider("elsewhere", "rms_norm", ("ascend910b",), willing, -1),
    )
    assert [provider.name for provider in providers_of("rms_norm", "cpu")] == ["picky", "willing"]
    report = compiled_and_checked(Norm(8, 1e-6), torch.randn(4, 8))
    (site,) = report.sites
    assert (site.fused, site.lowered_to) == (True, "willing")
    assert site.reason == "picky: the last dimension is no multiple of 32"
    assert torch.ops.aten.exp.default not in [node.target for node in report.graph("lowered").graph.nodes]


def test_5_the_reference_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_fusion import lower

    monkeypatch.setattr(lower, "_PROVIDERS", [])
    (site,) = compiled_and_checked(Norm(8, 1e-6), torch.randn(4, 8)).sites
    assert site.lowered_to == REFERENCE


def test_5_an_op_that_a_target_cannot_compute_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_fusion import lower

    monkeypatch.setattr(lower, "_PROVIDERS", [])
    register_provider(Provider("another", "glu", ("cpu",), lambda b, a: b.refuse("never")))
    (site,) = compiled_and_checked(Norm(8, 1e-6), torch.randn(4, 8)).sites
    assert (site.lowered_to, site.reason) == (REFERENCE, "nothing on cpu is known to compute it")


# -------------------------------------------------------------------- 6


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_6_two_models_of_different_geometry_in_one_process(dynamic: bool | None) -> None:
    for size, eps in ((8, 1e-6), (16, 0.25)):
        norm = Norm(size, eps)
        assert compiled_and_checked(norm, torch.randn(3, size), dynamic=dynamic).idioms["rms_norm"] == 1


def test_6_two_configs_in_one_process() -> None:
    norm = Norm(8, 1e-6)
    assert compiled_and_checked(norm, torch.randn(3, 8), options={"rules": ()}).idioms["rms_norm"] == 0
    torch.compiler.reset()
    assert compiled_and_checked(norm, torch.randn(3, 8)).idioms["rms_norm"] == 1


# -------------------------------------------------------------------- 7


def test_7_the_key_of_cached_artefacts_covers_rules_and_target() -> None:
    from npu_fusion import inductor_options

    def key(**options: Any) -> Any:
        passes = inductor_options(FusionConfig(**options))
        return [value.uuid() for value in passes.values() if hasattr(value, "uuid")]

    rule = Rule("my_rule", x * y + z, lambda m: Call(muladd, {}, []), muladd.name)
    keys = [key(), key(disable=("rms_norm",)), key(rounding="exact"), key(target="ascend910b")]
    assert all(keys)
    assert len({str(k) for k in keys}) == len(keys)
    assert key() == key()
    assert key(extra_rules=(rule,)) not in keys


# -------------------------------------------------------------------- 8


def _guards(gm: torch.fx.GraphModule) -> tuple[int, int]:
    env = next(node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")).fake_mode.shape_env
    return len(env.guards), sum(map(len, env.deferred_runtime_asserts.values()))


def test_8_fusing_adds_no_guard() -> None:
    def fn(h: Tensor, r: Tensor, w: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        s = h + r
        y = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        a, b = (y * F.silu(gate)).chunk(2, -1)
        return torch.cat([-b, a], -1).transpose(0, 1), s

    gm = aten_graph(fn, torch.randn(6, 10), torch.randn(6, 10), torch.randn(10), torch.randn(6, 10), dynamic=True)
    before = _guards(gm)
    npu_fusion.fuse(gm)
    assert {node.target for node in gm.graph.nodes} & {rms_norm.overload, torch.ops.npu_fusion.add_rms_norm.default}
    assert _guards(gm) == before
    inputs = (torch.randn(3, 4), torch.randn(3, 4), torch.randn(4), torch.randn(3, 4))
    torch.testing.assert_close(gm(*inputs), fn(*inputs))


def test_8_a_rule_that_asks_for_a_guard_loses_nothing_but_its_site() -> None:
    """Sizes in the view are expressions: their truth value is an error, not a guard."""
    rule = Rule(
        "guards",
        x * y + z,
        lambda m: Call(muladd, {"a": m["x"], "b": m["y"], "c": m["z"]}, [m.root]),
        muladd.name,
        check=lambda m: None if m["x"].shape[0] < 7 else npu_fusion.Reject("large"),
    )
    gm = aten_graph(lambda a, b, c: a * b + c, *(torch.randn(6, 10) for _ in range(3)), dynamic=True)
    before = _guards(gm)
    record = fuse_with(gm, [rule])
    assert "TypeError" in record.rule_errors["guards"]
    assert _guards(gm) == before
