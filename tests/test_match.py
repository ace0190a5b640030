"""Matching: where rules are tried, in which order, and what happens to those that fail."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import FusionConfig
from npu_fusion.match import Match, find_gists
from npu_fusion.pattern import exp, lit, mean, op, opt_cast, rsqrt, sem, square, tanh, var
from npu_fusion.rule import Call, GroupRule, Reject, Rule
from npu_fusion.view import Form, View
from tests.graphs import calls_of, fuse_with, matches_of, muladd, scaled_tanh, sumdiff, test_op, view_of

x, y, z = var("x"), var("y"), var("z")
INPUTS = (torch.rand(4, 8), torch.rand(4, 8), torch.rand(4, 8))


def muladd_call(m: Match) -> Call:
    return Call(muladd, {"a": m["x"], "b": m["y"], "c": m["z"]}, [m.root])


def muladd_rule(**options: Any) -> Rule:
    return Rule("muladd", ((x * y).as_("product") + z).as_("site"), muladd_call, muladd.name, idioms={"glu": "site"}, **options)


def names(matches: Sequence[Match]) -> list[str]:
    return [m.root.node.name for m in matches if m.root.node is not None]


# -------------------------------------------------------------------- where


def test_every_occurrence_is_found_once() -> None:
    view, _ = view_of(lambda a, b, c: ((a * b + c) * b + c, a * c + b, a * b + c), *INPUTS)
    found = matches_of(view, muladd_rule())
    assert names(found.matches) == ["add", "add_1", "add_2"], "the fourth is the same value as the first"
    assert not found.errors


def test_a_rule_is_tried_only_around_its_rarest_operator() -> None:
    """A hundred sums, one square root: one attempt from there, not a hundred from the sums."""

    def fn(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        for _ in range(100):
            a = a + b
        return a * torch.rsqrt(c + 1e-6) + b

    tried: list[str] = []

    def spy(m: Match) -> Reject | None:
        tried.append(m.root.op)
        return None

    view, _ = view_of(fn, *INPUTS)
    rule = Rule("rare", x * rsqrt(y + lit("eps")) + z, muladd_call, muladd.name, check=spy)
    found = matches_of(view, rule)
    assert len(found.matches) == len(tried) == 1
    assert [value.op for value in found.failures["rare"]] == [], "no attempt failed: none was made elsewhere"


def test_a_rule_whose_operators_are_not_all_there_is_not_tried() -> None:
    view, _ = view_of(lambda a, b, c: a * b + c, *INPUTS)
    found = matches_of(view, Rule("absent", tanh(x) * y + z, muladd_call, muladd.name))
    assert not found.matches
    assert not found.failures["absent"]


def test_the_anchor_may_be_below_a_semantic_form() -> None:
    """There are two forms and one tanh, which only the form's argument contains: the search must start from the forms."""
    view, _ = view_of(lambda a, b, c: ((a * b + c.tanh()).exp(), (c * b + a).exp()), *INPUTS)
    outer = Rule("outer", exp(sem(muladd.name, c=tanh(x))), lambda m: Call(scaled_tanh, {"a": m["x"]}, [m.root]), scaled_tanh.name)
    assert names([m for m in matches_of(view, muladd_rule(), outer).matches if m.rule is outer]) == ["exp"]


def test_a_match_knows_what_it_ran_through() -> None:
    view, (root,) = view_of(lambda a, b, c: (a * b).bfloat16() + c.bfloat16(), *INPUTS)
    rule = Rule("muladd", opt_cast(x * y) + z, muladd_call, muladd.name)
    (match,) = matches_of(view, rule).matches
    assert match.root is root
    assert {value.op for value in match.visited} == {"add", "cast", "mul"}
    assert match.outputs == [root]
    assert match["z"].op == "cast"
    assert "w" not in match
    assert match.get("w") is None


# -------------------------------------------------------------------- failures


def test_a_rejection_is_recorded_with_its_reason_and_value() -> None:
    view, _ = view_of(lambda a, b, c: a * b + c, *INPUTS)
    rule = muladd_rule(check=lambda m: Reject("b is too small", m["y"]))
    found = matches_of(view, rule)
    assert not found.matches
    (failure,) = found.failures["muladd"].values()
    assert failure.reason == "b is too small"
    assert failure.value in (view.of[node] for node in view.graph.find_nodes(op="placeholder"))


def test_another_way_to_match_is_tried_after_a_rejection() -> None:
    """x and y commute: the check accepts one order only."""
    view, _ = view_of(lambda a, b, c: a * b + c, *INPUTS)
    rule = muladd_rule(check=lambda m: None if m["x"].node.name == "b_1" else Reject("the other way around"))
    (match,) = matches_of(view, rule).matches
    assert match["x"].node.name == "b_1"


@pytest.mark.parametrize("broken", ["check", "rewrite", "predicate"])
def test_a_rule_that_raises_skips_the_site_and_is_logged_once(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Any) -> Any:
        raise KeyError("a bug in the rule")

    pattern = ((x * y) + (z.where(fail, "never") if broken == "predicate" else z)).as_("site")
    bad = Rule(
        "bad",
        pattern,
        fail if broken == "rewrite" else muladd_call,
        muladd.name,
        idioms={"glu": "site"},
        check=fail if broken == "check" else None,
        gist=((x * y) + z).as_("site"),
    )
    good = Rule("good", tanh(exp(x)), lambda m: Call(scaled_tanh, {"a": m["x"]}, [m.root]), scaled_tanh.name)
    view, _ = view_of(lambda a, b, c: (a * b + c, b * c + a, a.exp().tanh()), *INPUTS)
    with caplog.at_level(logging.WARNING, logger="npu_fusion.match"):
        found = matches_of(view, bad, good)
    assert [match.rule for match in found.matches] == [good]
    assert found.errors == {"bad": "KeyError: 'a bug in the rule'"}
    assert ["'bad'" in record.getMessage() for record in caplog.records] == [True]


def test_a_gist_that_raises_does_not_take_the_graph_with_it() -> None:
    def fail(_: Any) -> bool:
        raise KeyError("a bug in the gist")

    from tests.graphs import aten_graph

    gm = aten_graph(lambda a, b, c: a * b + c, *INPUTS)
    record = fuse_with(gm, [muladd_rule(gist=(x * y).where(fail, "never").as_("site"))])
    assert len(calls_of(gm, muladd)) == 1
    assert "KeyError" in record.rule_errors["muladd"]


def test_the_deepest_failure_near_a_gist_is_the_reason_of_a_miss() -> None:
    from tests.graphs import aten_graph

    rule = Rule(
        "norm",
        (x * rsqrt(mean(square(x)) + lit("eps"))).as_("site") * y,
        lambda m: Call(muladd, {"a": m["x"], "b": m["y"], "c": m["x"]}, [m.root]),
        muladd.name,
        idioms={"rms_norm": "site"},
        gist=rsqrt(mean(square(x)) + lit("eps")).as_("site"),
    )
    gm = aten_graph(lambda a, b, c: a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-6) - b, *INPUTS)
    (site,) = fuse_with(gm, [rule]).sites
    assert (site.idiom, site.fused, site.rule) == ("rms_norm", False, "norm")
    assert site.reason
    assert site.node


# -------------------------------------------------------------------- layers of rules


def test_later_rules_see_the_forms_of_earlier_ones() -> None:
    view, _ = view_of(lambda a, b, c: (a * b + c).exp().tanh(), *INPUTS)
    inner = muladd_rule()
    middle = Rule("middle", exp(sem(muladd.name).as_("n")), lambda m: Call(scaled_tanh, {"a": m["n"]}, [m.root]), scaled_tanh.name)
    outer = Rule("outer", tanh(sem(scaled_tanh.name)), lambda m: Call(wide, {"a": m.root}, [m.root]), wide.name, idioms={"glu": "top"})
    found = matches_of(view, outer, middle, inner)
    assert [match.rule.name for match in found.matches] == ["muladd", "middle", "outer"]
    last = found.matches[-1]
    assert [part.rule.name for part in last.parts] == ["middle"]
    assert [idiom for idiom, _ in last.sites] == ["glu"], "the site of what it absorbed"
    assert {"add", "mul", "exp", "tanh"} == {value.op for value in last.visited}


@test_op("(Tensor a) -> Tensor")
def wide(a: Tensor) -> Tensor:
    """A copy of a."""
    return a.clone()


def test_a_rule_may_refine_an_op_into_itself() -> None:
    refine = Rule(
        "refine", tanh(sem(muladd.name).as_("n")), lambda m: Call(muladd, {**m.form("n").args, "c": m["n"]}, [m.root]), muladd.name
    )
    view, (root,) = view_of(lambda a, b, c: (a * b + c).tanh(), *INPUTS)
    found = matches_of(view, refine, muladd_rule())
    assert [match.rule.name for match in found.matches] == ["muladd", "refine"]
    assert root.form(muladd.name) is not None


# -------------------------------------------------------------------- groups


def tanh_rule() -> Rule:
    return Rule(
        "tanh",
        tanh(op("abs", x)).as_("site"),
        lambda m: Call(scaled_tanh, {"a": m["x"]}, [m.root]),
        scaled_tanh.name,
        idioms={"rope": "site"},
    )


def _combine(forms: Sequence[Form]) -> Call:
    return Call(pair_of_tanh, {"a": forms[0].args["a"], "b": forms[1].args["a"]}, [form.match.root for form in forms])


@test_op("(Tensor a, Tensor b) -> (Tensor, Tensor)")
def pair_of_tanh(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """tanh of the magnitudes of both."""
    return a.abs().tanh(), b.abs().tanh()


def group_rule(**options: Any) -> GroupRule:
    return GroupRule("pairs", scaled_tanh.name, lambda form: form.args["a"].shape, _combine, pair_of_tanh.name, **options)


def grouped(fn: Any, *rules: Any) -> tuple[View, list[list[str]]]:
    view, _ = view_of(fn, *INPUTS)
    found = matches_of(view, tanh_rule(), *(rules or (group_rule(),)))
    assert not found.errors, found.errors
    return view, [[output.node.name for output in m.outputs] for m in found.matches if isinstance(m.rule, GroupRule)]


def test_neighbours_are_grouped_in_graph_order() -> None:
    _, groups = grouped(lambda a, b, c: (a.abs().tanh(), b.abs().tanh(), c.abs().tanh(), (a + b).abs().tanh()))
    assert groups == [["tanh", "tanh_1"], ["tanh_2", "tanh_3"]]


def test_the_members_of_a_group_do_not_depend_on_one_another() -> None:
    _, groups = grouped(lambda a, b, c: a.abs().tanh().sin().abs().tanh())
    assert groups == []


def test_members_with_different_keys_are_not_grouped() -> None:
    _, groups = grouped(lambda a, b, c: (a.abs().tanh(), b[:2].abs().tanh(), c.abs().tanh()))
    assert groups == [["tanh", "tanh_2"]]


def test_a_key_of_none_keeps_a_member_out() -> None:
    rule = GroupRule("pairs", scaled_tanh.name, lambda form: None, _combine, pair_of_tanh.name)
    assert grouped(lambda a, b, c: (a.abs().tanh(), b.abs().tanh()), rule)[1] == []


def test_a_group_that_cannot_be_combined() -> None:
    rule = GroupRule("pairs", scaled_tanh.name, lambda form: 1, lambda forms: None, pair_of_tanh.name)
    assert grouped(lambda a, b, c: (a.abs().tanh(), b.abs().tanh()), rule)[1] == []


def test_a_group_rule_that_raises_is_reported() -> None:
    def fail(_: Any) -> Any:
        raise ValueError("no key")

    view, _ = view_of(lambda a, b, c: (a.abs().tanh(), b.abs().tanh()), *INPUTS)
    found = matches_of(view, tanh_rule(), GroupRule("pairs", scaled_tanh.name, fail, _combine, pair_of_tanh.name))
    assert len(found.matches) == 2
    assert found.errors == {"pairs": "ValueError: no key"}


def test_a_group_covers_the_sites_of_its_members_and_is_applied() -> None:
    from tests.graphs import aten_graph

    def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return a.abs().tanh() + 1, b.abs().tanh() + c

    gm = aten_graph(fn, *INPUTS)
    record = fuse_with(gm, [tanh_rule(), group_rule()])
    assert len(calls_of(gm, pair_of_tanh)) == 1
    assert not calls_of(gm, scaled_tanh)
    assert [(site.idiom, site.fused, site.op) for site in record.sites] == [("rope", True, pair_of_tanh.name)] * 2
    torch.testing.assert_close(gm(*INPUTS), fn(*INPUTS))


def test_the_config_reaches_the_rules() -> None:
    seen: list[bool] = []
    view, _ = view_of(lambda a, b, c: a * b + c, *INPUTS)
    rule = muladd_rule(check=lambda m: seen.append(m.exact))
    matches_of(view, rule, config=FusionConfig(rounding="exact"))
    matches_of(view, rule, config=FusionConfig())
    assert seen == [True, False]


def test_gists_are_found_with_what_they_ran_through() -> None:
    view, _ = view_of(lambda a, b, c: (a.exp().tanh(), b.tanh()), *INPUTS)
    rule = muladd_rule(gist=tanh(exp(x)).as_("site"))
    ((site, visited),) = find_gists(view, rule)
    assert site.op == "tanh"
    assert {value.op for value in visited} == {"tanh", "exp"}


def test_an_output_that_replaces_nothing() -> None:
    view, _ = view_of(lambda a, b, c: (a + b).exp(), *INPUTS)
    rule = Rule("half", exp((x + y).as_("sum")), lambda m: Call(sumdiff, {"a": m["x"], "b": m["y"]}, [m["sum"], None]), sumdiff.name)
    (match,) = matches_of(view, rule).matches
    assert match.outputs == [match["sum"]]
