"""Rewriting: where the new node goes, what it carries, and what must stay."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import npu_fusion
from npu_fusion.match import Match
from npu_fusion.ops.norm import add_rms_norm, rms_norm
from npu_fusion.pattern import Pattern, lit, op, sem, tanh, var
from npu_fusion.provenance import module_of, source_of
from npu_fusion.rule import Call, Rule
from npu_fusion.semantic import SemanticOp
from tests.graphs import aten_graph, calls_of, fuse_with, muladd, scaled_tanh, sumdiff, test_op

x, y, z = var("x"), var("y"), var("z")


def abs_(inner: Pattern) -> Pattern:
    return op("abs", inner)


aten = torch.ops.aten


def muladd_rule(**args: Any) -> Rule:
    return Rule(
        "muladd",
        ((x * y).as_("product") + z).as_("site"),
        lambda m: Call(muladd, {"a": m["x"], "b": m["y"], "c": m["z"], **args}, [m.root]),
        muladd.name,
        idioms={"glu": "site"},
    )


SUMDIFF = Rule(
    "sumdiff",
    op("mul", (x + y).as_("sum"), (x - y).as_("difference"), commutative=True).as_("site"),
    lambda m: Call(sumdiff, {"a": m["x"], "b": m["y"]}, [m["sum"], m["difference"]]),
    sumdiff.name,
    idioms={"glu": "site"},
)
INPUTS = (torch.rand(4, 8), torch.rand(4, 8), torch.rand(4, 8))


def check(fn: Any, *rules: Rule, inputs: tuple[Tensor, ...] = INPUTS, dynamic: bool = False) -> GraphModule:
    """Rewrite, and compare with what the function computes, mutated inputs included."""
    gm = aten_graph(fn, *inputs, dynamic=dynamic)
    fuse_with(gm, rules)
    gm.graph.lint()
    mine, theirs = [t.clone() for t in inputs], [t.clone() for t in inputs]
    torch.testing.assert_close(gm(*mine), fn(*theirs))
    torch.testing.assert_close(mine, theirs)
    return gm


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


# -------------------------------------------------------------------- one node for many


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_match_becomes_one_node(dynamic: bool) -> None:
    gm = check(lambda a, b, c: a * b + c, muladd_rule(), dynamic=dynamic)
    assert targets(gm)[-1] is muladd.overload
    assert aten.mul.Tensor not in targets(gm)


def test_metadata_comes_from_the_fake_kernel() -> None:
    gm = aten_graph(lambda a, b, c: a * b + c, *INPUTS, dynamic=True)
    before = next(iter(gm.graph.find_nodes(op="output"))).args[0].meta["val"]
    fuse_with(gm, [muladd_rule()])
    (call,) = calls_of(gm, muladd)
    assert call.meta["val"].shape == before.shape
    assert call.meta["val"] is not before
    assert call.meta["npu_fusion_rule"] == "muladd"
    assert {"mul", "add"} <= set(call.meta["npu_fusion_replaced"])


class _Inner(nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a * b + c


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Inner()

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return self.inner(a, b, c).exp()


def test_stack_trace_and_module_path_survive() -> None:
    compiled = torch.compile(_Outer(), backend="npu_fusion", options={"rules": (), "extra_rules": (muladd_rule(),)})
    with torch.no_grad():
        compiled(*INPUTS)
    report = npu_fusion.report(compiled)
    (call,) = calls_of(report.graph("fused"), muladd)
    (site,) = report.sites
    assert module_of(call) == site.module == "inner"
    assert source_of(call) == site.source
    assert (source_of(call) or "").rpartition(":")[0] == __file__
    assert site.call == call.name


def test_an_intermediate_with_other_users_stays_computed() -> None:
    gm = check(lambda a, b, c: (a * b + c, (a * b).exp()), muladd_rule())
    assert len(calls_of(gm, muladd)) == 1
    assert aten.mul.Tensor in targets(gm)


def test_views_of_a_fused_result_tolerate_other_strides() -> None:
    """The rule's op returns a transposed tensor: `view` would refuse it."""

    rule = Rule("turned", tanh(abs_(x)), lambda m: Call(turned_tanh, {"a": m["x"]}, [m.root]), turned_tanh.name)
    gm = check(lambda a, b, c: a.abs().tanh().view(-1) + torch.ops.aten._unsafe_view(b.abs().tanh().clone(), [32]), rule)
    assert len(calls_of(gm, turned_tanh)) == 2
    assert targets(gm).count(aten.reshape.default) == 2


@test_op("(Tensor a) -> Tensor")
def turned_tanh(a: Tensor) -> Tensor:
    """tanh(abs(a)), stored in the reverse order of dimensions."""
    order = list(range(a.dim()))[::-1]
    return a.abs().tanh().permute(order).contiguous().permute(order)


def test_what_leaves_the_graph_keeps_its_memory_layout() -> None:
    rule = Rule("turned", tanh(abs_(x)), lambda m: Call(turned_tanh, {"a": m["x"]}, [m.root]), turned_tanh.name)
    for fn in (
        lambda a, b, c: a.abs().tanh(),
        lambda a, b, c: a.t().abs().tanh(),
        lambda a, b, c: a.abs().tanh().as_strided((3, 3), (2, 1)),
    ):
        gm = check(fn, rule)
        assert len(calls_of(gm, turned_tanh)) == 1
        assert gm(*INPUTS).stride() == fn(*INPUTS).stride()


def test_copies_that_are_returned_stay_apart() -> None:
    """The caller may write to one of them."""

    def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        total = a * b + c
        return total, total.clone()

    gm = check(fn, muladd_rule())
    assert len(calls_of(gm, muladd)) == 1
    first, second = gm(*INPUTS)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


# -------------------------------------------------------------------- where it goes


def test_the_outputs_of_one_call_replace_several_values() -> None:
    gm = check(lambda a, b, c: (a + b) * (a - b), SUMDIFF)
    assert len(calls_of(gm, sumdiff)) == 1
    assert not {aten.add.Tensor, aten.sub.Tensor} & set(targets(gm))


def test_users_of_an_early_output_move_behind_the_call() -> None:
    """One input is computed between the outputs' users: the call can stand only after it."""

    scaled_sum = Rule(
        "sum_and_scaled",
        ((x + y).as_("sum")).as_("root") * z,
        lambda m: Call(fused_pair, {"a": m["x"], "b": m["y"], "c": m["z"]}, [m["sum"], m.root]),
        fused_pair.name,
    )

    def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        total = a + b
        early = total.exp()
        late = c.sin()
        return total * late, early, early.cos()

    gm = check(fn, scaled_sum)
    (call,) = calls_of(gm, fused_pair)
    order = list(gm.graph.nodes)
    exp_node, sin_node = (next(node for node in order if node.target is target) for target in (aten.exp.default, aten.sin.default))
    assert order.index(sin_node) < order.index(call) < order.index(exp_node)


@test_op("(Tensor a, Tensor b, Tensor c) -> (Tensor, Tensor)")
def fused_pair(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """a + b and (a + b) * c."""
    return a + b, (a + b) * c


def pair_rule() -> Rule:
    return Rule(
        "pair",
        (x + y).as_("sum") * z,
        lambda m: Call(fused_pair, {"a": m["x"], "b": m["y"], "c": m["z"]}, [m["sum"], m.root]),
        fused_pair.name,
    )


def test_a_call_that_would_need_its_own_output_is_rejected() -> None:
    """z is computed from x + y, which the call would make."""
    gm = check(lambda a, b, c: (a + b) * (a + b).sin().exp(), pair_rule())
    assert not calls_of(gm, fused_pair)


def test_an_input_before_the_last_one_that_needs_an_output_is_rejected() -> None:
    rule = Rule(
        "two_late_inputs",
        (x + y).as_("sum") * op("atan2", var("u"), var("v")),
        lambda m: Call(fused_four, {"a": m["x"], "b": m["y"], "c": m["u"], "d": m["v"]}, [m["sum"], m.root]),
        fused_four.name,
    )

    def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        total = a + b
        u = total.exp()
        v = c.exp()
        return total, total * torch.atan2(u, v)

    assert not calls_of(check(fn, rule), fused_four)


@test_op("(Tensor a, Tensor b, Tensor c, Tensor d) -> (Tensor, Tensor)")
def fused_four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """a + b and (a + b) * atan2(c, d)."""
    return a + b, (a + b) * torch.atan2(c, d)


# -------------------------------------------------------------------- side effects


def test_side_effects_are_untouched() -> None:
    def fn(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        total = a * b + c
        c.copy_(total)
        return total * 2

    gm = check(fn, muladd_rule())
    assert len(calls_of(gm, muladd)) == 1
    assert targets(gm).count(aten.copy_.default) == 1


def test_an_input_that_is_overwritten_before_the_result_is_due() -> None:
    """a * b + c with a, b, c as they were: at the end of the pattern a is another."""

    def fn(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        product = a * b
        a.add_(1)
        return product + c

    gm = check(fn, muladd_rule())
    assert not calls_of(gm, muladd)


def test_values_before_and_after_a_mutation_are_not_confused() -> None:
    def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        before = a * b + c
        a.mul_(3)
        return before, a * b + c

    gm = check(fn, muladd_rule())
    assert len(calls_of(gm, muladd)) == 1, "what reads a tensor after it was written to stays as it is"


def test_a_copy_that_is_written_to_is_not_merged_with_its_original() -> None:
    def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        total = a * b + c
        scratch = total.clone()
        scratch.add_(1)
        return total, scratch * 1.0

    check(fn, muladd_rule())


def test_random_numbers_are_drawn_as_often_as_before() -> None:
    def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand_like(a) * b + c, torch.rand_like(a) * b + c

    gm = aten_graph(fn, *INPUTS)
    fuse_with(gm, [muladd_rule()])
    assert len(calls_of(gm, muladd)) == 2
    torch.manual_seed(3)
    fused = gm(*INPUTS)
    torch.manual_seed(3)
    torch.testing.assert_close(fused, fn(*INPUTS))


# -------------------------------------------------------------------- arguments


def test_values_that_exist_in_canonical_form_only_are_emitted() -> None:
    """The graph has x / sqrt(y); the rule names rsqrt(y), a slice of a concatenation, and a rounded copy."""

    rule = Rule(
        "emits",
        tanh(x) * op("rsqrt", y),
        lambda m: Call(muladd, {"a": tanh_of(m), "b": m.root.args[1], "c": half_sum(m)}, [m.root]),
        muladd.name,
    )

    def tanh_of(m: Match) -> Any:
        return m.view.canon.unary("tanh", m["x"])

    def half_sum(m: Match) -> Any:
        canon = m.view.canon
        joined = canon.cat([m["x"], canon.cast(m["y"], m["x"].dtype)], 1)
        return canon.binary("mul", canon.slice(joined, 1, 4, 12), canon.const(0.0))

    gm = check(lambda a, b, c: a.tanh() / b.sqrt(), rule)
    assert len(calls_of(gm, muladd)) == 1
    assert {aten.rsqrt.default, aten.cat.default, aten.slice.Tensor} <= set(targets(gm))


def test_literals_known_at_run_time_are_passed_at_run_time() -> None:
    rule = Rule(
        "scaled", tanh(x) * lit("scale"), lambda m: Call(scaled_tanh, {"a": m["x"], "scale": m["scale"]}, [m.root]), scaled_tanh.name
    )
    gm = aten_graph(lambda a, s: a.tanh() * s, INPUTS[0], torch.tensor(2.0, dtype=torch.float64), dynamic=True)
    fuse_with(gm, [rule])
    assert len(calls_of(gm, scaled_tanh)) == 1
    for scale in (2.0, -0.5):
        torch.testing.assert_close(gm(INPUTS[0], torch.tensor(scale, dtype=torch.float64)), INPUTS[0].tanh() * scale)


@test_op("(Tensor a) -> Tensor")
def wrong_dtype(a: Tensor) -> Tensor:
    """tanh(a), rounded."""
    return a.tanh().bfloat16()


@test_op("(Tensor a) -> Tensor")
def wrong_shape(a: Tensor) -> Tensor:
    """tanh(a), flattened."""
    return a.tanh().flatten()


@pytest.mark.parametrize(
    ("wrong", "args", "reason"),
    [
        (wrong_dtype, {}, "gives torch.bfloat16, the model torch.float32"),
        (wrong_shape, {}, "gives shape (32,), the model (4, 8)"),
        (scaled_tanh, {"unknown": 1}, "unknown arguments ['unknown']"),
        (scaled_tanh, {"scale": "much"}, ""),
    ],
)
def test_a_wrong_call_loses_the_site_and_not_the_model(
    wrong: SemanticOp, args: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    rule = Rule(
        "wrong",
        tanh(abs_(x)).as_("site"),
        lambda m: Call(wrong, {"a": m["x"], **args}, [m.root]),
        wrong.name,
        {"glu": "site"},
        gist=tanh(x).as_("site"),
    )
    gm = aten_graph(lambda a: a.abs().tanh() + a.exp().abs().tanh(), INPUTS[0])
    before = targets(gm)
    with caplog.at_level(logging.WARNING, logger="npu_fusion.rewrite"):
        record = fuse_with(gm, [rule])
    assert targets(gm) == before
    assert [site.fused for site in record.sites] == [False, False]
    assert all(reason in (site.reason or "") for site in record.sites)
    assert ("wrong" in record.rule_errors) is (not reason)
    assert len(caplog.records) == (0 if reason else 1), "a kernel that raises is logged once"
    torch.testing.assert_close(gm(INPUTS[0]), INPUTS[0].tanh() + INPUTS[0].exp().tanh())  # both are positive


def test_what_a_rejected_match_would_have_absorbed_is_applied() -> None:
    outer = Rule("outer", tanh(sem(muladd.name)), lambda m: Call(wrong_dtype, {"a": m.root.args[0]}, [m.root]), wrong_dtype.name)
    gm = check(lambda a, b, c: (a * b + c).tanh(), muladd_rule(), outer)
    assert len(calls_of(gm, muladd)) == 1
    assert not calls_of(gm, wrong_dtype)


def test_only_fake_kernels_of_new_nodes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses import FakeTensorMode

    gm = aten_graph(lambda a, b, c: (a * b + c).exp().tanh() @ c.t(), *INPUTS, dynamic=True)
    ran: list[Any] = []
    dispatch = FakeTensorMode.dispatch

    def spy(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ran.append(func)
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", spy)
    fuse_with(gm, [muladd_rule()])
    assert ran[0] is muladd.overload
    assert not {aten.exp.default, aten.tanh.default, aten.mm.default} & set(ran)


def test_consumers_and_producers_are_both_rewritten() -> None:
    def fn(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        first = a * b + c
        return (first + first) * first.sin() + (first * c + a)

    gm = check(fn, muladd_rule())
    assert len(calls_of(gm, muladd)) == 3


def test_real_rules_with_two_outputs() -> None:
    """Residual add + RMSNorm: the sum is used before the norm, and returned."""

    def fn(h: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        s = h + r
        skip = s.sin()
        y = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * w, s, skip

    gm = aten_graph(fn, torch.randn(3, 8), torch.randn(3, 8), torch.randn(8))
    npu_fusion.fuse(gm)
    assert len(calls_of(gm, add_rms_norm)) == 1
    assert not calls_of(gm, rms_norm)
    inputs = (torch.randn(3, 8), torch.randn(3, 8), torch.randn(8))
    torch.testing.assert_close(gm(*inputs), fn(*inputs))


def _returned(gm: GraphModule) -> list[Node]:
    return next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes


def test_the_output_node_keeps_its_structure() -> None:
    gm = check(lambda a, b, c: [a * b + c, {"k": c}], muladd_rule())
    assert _returned(gm)[0].target is muladd.overload
