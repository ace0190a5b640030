"""Rules: registration, scope, order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import npu_fusion
from npu_fusion import FusionConfig, RuleError
from npu_fusion.match import Match
from npu_fusion.pattern import exp, sem, tanh, var
from npu_fusion.rule import AnyRule, Call, GroupRule, Rule, in_order, register_builtin, registered_rules, rules_of
from tests.graphs import muladd, scaled_tanh

x, y, z = var("x"), var("y"), var("z")


def maker(name: str, produces: str, *consumes: str) -> Rule:
    """A rule that makes one op from others."""
    pattern = exp(x) if not consumes else exp(sem(consumes[0]))
    for op in consumes[1:]:
        pattern = pattern * sem(op)
    return Rule(name, pattern, lambda m: Call(muladd, {}, []), produces)


def order(*rules: AnyRule) -> list[str]:
    return [rule.name for rule in in_order(rules)]


# -------------------------------------------------------------------- order


def test_a_rule_runs_after_those_whose_ops_it_starts_from() -> None:
    norm, add, quant = maker("norm", "norm"), maker("add", "add_norm", "norm"), maker("quant", "quant", "add_norm", "norm")
    for rules in ((norm, add, quant), (quant, add, norm), (add, quant, norm)):
        assert order(*rules) == ["norm", "add", "quant"]


def test_a_rule_that_refines_an_op_runs_between_its_makers_and_its_users() -> None:
    make, refine, use = maker("make", "norm"), maker("refine", "norm", "norm"), maker("use", "add_norm", "norm")
    for rules in ((make, refine, use), (use, refine, make)):
        assert order(*rules) == ["make", "refine", "use"]


def test_two_rules_that_refine_one_op_are_no_circle() -> None:
    first, second, make = maker("first", "norm", "norm"), maker("second", "norm", "norm"), maker("make", "norm")
    assert order(first, second, make)[0] == "make"


def test_groups_of_an_op_come_after_the_rules_that_refine_it() -> None:
    group = GroupRule("group", "rotary", lambda form: 0, lambda forms: None, "rotary")
    refine, make = maker("refine", "rotary", "rotary"), maker("make", "rotary")
    assert order(group, refine, make) == ["make", "refine", "group"]


def test_a_circle_is_an_error_that_names_its_rules() -> None:
    a, b, bystander = maker("a_from_b", "a", "b"), maker("b_from_a", "b", "a"), maker("bystander", "c")
    with pytest.raises(RuleError, match="a_from_b, b_from_a") as error:
        in_order([a, b, bystander])
    assert "bystander" not in str(error.value)


def test_the_packages_own_rules_have_an_order() -> None:
    names = order(*registered_rules())
    assert sorted(names) == sorted(rule.name for rule in registered_rules())
    assert names.index("rms_norm") < names.index("add_rms_norm")


# -------------------------------------------------------------------- scope


@npu_fusion.rule("exp_of_tanh", pattern=exp(tanh(x)).as_("site"), produces=scaled_tanh.name, idioms={"glu": "site"})
def exp_of_tanh(m: Match) -> Call:
    return Call(scaled_tanh, {"a": m["x"], "scale": 0.5}, [m.root])


def test_a_rule_is_declared_by_a_decorator() -> None:
    assert isinstance(exp_of_tanh, Rule)
    assert (exp_of_tanh.name, exp_of_tanh.produces, exp_of_tanh.missed_idiom) == ("exp_of_tanh", scaled_tanh.name, "glu")
    assert "exp_of_tanh" not in {rule.name for rule in registered_rules()}


def test_a_users_rule_is_in_force_under_its_config_only() -> None:
    config = npu_fusion.register_rule(FusionConfig(), exp_of_tanh)
    assert exp_of_tanh in rules_of(config)
    assert exp_of_tanh not in rules_of(FusionConfig())
    assert FusionConfig().extra_rules == ()

    def fn(a: Tensor) -> Tensor:
        return a.tanh().exp()

    a = torch.rand(4)
    with torch.no_grad():
        with_rule = torch.compile(fn, backend="npu_fusion", options={"extra_rules": (exp_of_tanh,)})(a)
        torch.compiler.reset()
        without = torch.compile(fn, backend="npu_fusion")(a)
    torch.testing.assert_close(with_rule, a.tanh() * 0.5)  # what its author, wrongly, asked for
    torch.testing.assert_close(without, fn(a))


def test_rules_are_chosen_and_disabled_by_name() -> None:
    everything = {rule.name for rule in rules_of(FusionConfig())}
    assert everything == {rule.name for rule in registered_rules()}
    assert {rule.name for rule in rules_of(FusionConfig(rules=["rms_norm"]))} == {"rms_norm"}
    assert {rule.name for rule in rules_of(FusionConfig(disable=["rms_norm"]))} == everything - {"rms_norm"}
    assert rules_of(FusionConfig(rules=())) == []
    config = FusionConfig(rules=(), extra_rules=(exp_of_tanh,))
    assert rules_of(config) == [exp_of_tanh]
    assert rules_of(FusionConfig(rules=(), extra_rules=(exp_of_tanh,), disable=("exp_of_tanh",))) == []


def test_names_are_unique() -> None:
    with pytest.raises(RuleError, match="'rms_norm'"):
        npu_fusion.register_rule(FusionConfig(), maker("rms_norm", "norm"))
    with pytest.raises(RuleError, match="'exp_of_tanh'"):
        npu_fusion.register_rule(FusionConfig(), exp_of_tanh, exp_of_tanh)
    with pytest.raises(RuleError, match="registered twice"):
        register_builtin(maker("rms_norm", "norm"))


def test_a_disabled_rule_makes_room_for_a_users_own() -> None:
    config = npu_fusion.register_rule(FusionConfig(disable=("rms_norm",)), exp_of_tanh)
    assert exp_of_tanh in rules_of(config)


def test_what_a_rule_consumes() -> None:
    assert maker("r", "out", "norm", "glu").consumes == {"norm", "glu"}
    assert maker("r", "out").consumes == set()
    assert GroupRule("g", "rotary", lambda form: 0, lambda forms: None, "rotary", absorbs={"rms_norm": lambda form: None}).consumes == {
        "rotary",
        "rms_norm",
    }
