"""The pattern language: what each word matches, how it backtracks, and what it says when it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion.errors import RuleError
from npu_fusion.pattern import (
    LAST,
    AttrAs,
    AttrIs,
    Pattern,
    any_of,
    anything,
    cat,
    exp,
    lit,
    mean,
    op,
    op_any_args,
    opt_cast,
    opt_round,
    opt_upcast,
    opt_view,
    prod,
    rsqrt,
    sem,
    sliced,
    square,
    tanh,
    through,
    total,
    var,
)
from npu_fusion.rule import Call, Rule
from npu_fusion.view import Literal, Value
from tests.graphs import failure_of, matches_of, muladd, scaled_tanh, sumdiff, view_of, ways

x, y, z = var("x"), var("y"), var("z")


def value(fn: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> Value:
    return view_of(fn, *args, dynamic=dynamic)[1][0]


@pytest.fixture
def ab() -> tuple[Tensor, Tensor]:
    return torch.rand(4, 8), torch.rand(4, 8)


# -------------------------------------------------------------------- leaves


def test_a_variable_is_any_tensor_and_the_same_one_twice(ab: tuple[Tensor, Tensor]) -> None:
    assert len(ways(exp(x) - x, value(lambda a, b: a.exp() - a, *ab))) == 1
    assert failure_of(exp(x) - x, value(lambda a, b: a.exp() - b, *ab)) == "expected the same tensor as the other 'x'"


def test_a_variable_is_no_number(ab: tuple[Tensor, Tensor]) -> None:
    assert failure_of(op("div", x, y), value(lambda a, b: 2 / (a + 1), *ab)) == "expected a tensor for 'x'"


@pytest.mark.parametrize("number", [1e-6, 2, -3.5])
def test_a_literal_holds_the_number(number: float, ab: tuple[Tensor, Tensor]) -> None:
    (found,) = ways(x + lit("n"), value(lambda a, b: a + number, *ab))
    assert found["n"] == Literal(number)
    assert found["n"].known


def test_a_literal_in_a_0d_tensor(ab: tuple[Tensor, Tensor]) -> None:
    (found,) = ways(x + lit("n"), value(lambda a, b: a + torch.full((), 0.5), *ab))
    assert found["n"].value == 0.5


def test_a_literal_that_is_known_at_run_time_only(ab: tuple[Tensor, Tensor]) -> None:
    eps = torch.tensor(1e-6, dtype=torch.float64)
    for fn in (lambda a, e: a + e, lambda a, e: a + e.to(torch.float32)):
        (found,) = ways(x + lit("eps"), value(fn, ab[0], eps))
        assert found["eps"].value is None
        assert not found["eps"].known
        assert found["eps"].source.op == "input"


def test_a_0d_tensor_of_the_model_is_no_literal(ab: tuple[Tensor, Tensor]) -> None:
    assert "expected a number for 'n'" in failure_of(x + lit("n"), value(lambda a, s: a + s, ab[0], torch.tensor(1.0)))


def test_a_literal_twice_is_the_same_number(ab: tuple[Tensor, Tensor]) -> None:
    pattern = exp(x + lit("n")) * tanh(x + lit("n"))
    assert ways(pattern, value(lambda a, b: (a + 1).exp() * (a + 1).tanh(), *ab))
    assert failure_of(pattern, value(lambda a, b: (a + 1).exp() * (a + 2).tanh(), *ab)).startswith("expected the number 1 again")


def test_a_number_is_that_number(ab: tuple[Tensor, Tensor]) -> None:
    plus_one = value(lambda a, b: a + 1, *ab)
    assert ways(x + 1, plus_one)
    assert ways(1.0 + x, plus_one)
    assert failure_of(x + 2, plus_one) == "expected the number 2, found 1"
    assert failure_of(x + 1, value(lambda a, b: a + b, *ab)) == "expected the number 1, found input"


def test_anything_matches_numbers_too(ab: tuple[Tensor, Tensor]) -> None:
    assert ways(op("div", anything(), anything()), value(lambda a, b: 2 / (a + 1), *ab))


# -------------------------------------------------------------------- operators


OPERATORS: list[tuple[Pattern, Callable[..., Any]]] = [
    (x + y, lambda a, b: a + b),
    (x - y, lambda a, b: a - b),
    (x * y, lambda a, b: a * b),
    (x / y, lambda a, b: a / b),
    (-x, lambda a, b: -a),
    (x - 0.5, lambda a, b: a - 0.5),
    (0.5 * x, lambda a, b: a * 0.5),
    (square(x), lambda a, b: a * a),
    (mean(x, dims=LAST), lambda a, b: a.mean(-1, True)),
    (cat(x, y, dim=1), lambda a, b: torch.cat([a, b], 1)),
    (sliced(x, dim=1, start=2, stop=6, step=1), lambda a, b: a[:, 2:6]),
    (op("lt", x, y), lambda a, b: b > a),
    (op("where", x, y, lit("n")), lambda a, b: torch.where(a > 0, b, 1.0)),
    (op("matmul", x, op("permute", y, dims=(1, 0))), lambda a, b: F.linear(a, b)),
]


@pytest.mark.parametrize("index", range(len(OPERATORS)))
def test_operators(index: int, ab: tuple[Tensor, Tensor]) -> None:
    pattern, fn = OPERATORS[index]
    assert ways(pattern, value(fn, *ab))
    assert not ways(pattern, value(lambda a, b: (a + b).cosh(), *ab))


def test_sums_and_products_commute_and_others_do_not(ab: tuple[Tensor, Tensor]) -> None:
    for fn in (lambda a, b: a.exp() + b, lambda a, b: b + a.exp()):
        assert len(ways(exp(x) + y, value(fn, *ab))) == 1
    both = ways(x + y, value(lambda a, b: a + b, *ab))
    assert {(found["x"].node.name, found["y"].node.name) for found in both} == {("a_1", "b_1"), ("b_1", "a_1")}
    assert not ways(exp(x) - y, value(lambda a, b: b - a.exp(), *ab))


def test_attributes_are_compared_tested_or_bound(ab: tuple[Tensor, Tensor]) -> None:
    half = value(lambda a, b: a[:, :4], *ab)
    (found,) = ways(sliced(x, dim=AttrAs("dim"), start=0, stop=AttrAs("stop")), half)
    assert (found["dim"], found["stop"]) == (1, 4)
    even = AttrIs("an even number", lambda stop, value: stop % 2 == 0)
    assert ways(sliced(x, stop=even), half)
    assert failure_of(sliced(x, start=1), half) == "slice has start = 0, expected 1"
    assert failure_of(sliced(x, stop=even), value(lambda a, b: a[:, :3], *ab)) == "slice has stop = 3, expected an even number"
    assert failure_of(mean(x, dims=LAST), value(lambda a, b: a.mean(0, True), *ab)) == "mean has dims = (0,), expected the last dimension"


def test_an_attribute_bound_twice_must_be_equal(ab: tuple[Tensor, Tensor]) -> None:
    pattern = sliced(x, stop=AttrAs("n")) * sliced(y, stop=AttrAs("n"))
    assert ways(pattern, value(lambda a, b: a[:, :4] * b[:, :4], *ab))
    assert "expected" in failure_of(pattern, value(lambda a, b: a[:, 0:4] * b[:, 1:5], *ab))


def test_an_attribute_of_a_failed_alternative_is_forgotten(ab: tuple[Tensor, Tensor]) -> None:
    pattern = exp(sliced(x, stop=AttrAs("n"))) * tanh(y) | op("mul", anything(), anything())
    (found,) = ways(pattern, value(lambda a, b: a[:, :4].exp() * b[:, 1:5].sin(), *ab))
    assert "n" not in found


def test_operands_are_counted(ab: tuple[Tensor, Tensor]) -> None:
    three = value(lambda a, b: torch.cat([a, b, a]), *ab)
    assert failure_of(cat(x, y), three) == "expected cat of 2 operands, found 3"
    assert ways(op_any_args("cat", dim=0), three)


# -------------------------------------------------------------------- what may stand in between


def test_optional_casts(ab: tuple[Tensor, Tensor]) -> None:
    pattern = exp(opt_cast(tanh(x)))
    for fn in (lambda a, b: a.tanh().exp(), lambda a, b: a.tanh().bfloat16().exp(), lambda a, b: a.tanh().bfloat16().float().exp()):
        (found,) = ways(pattern, value(fn, *ab))
        assert found["x"].node.name == "a_1"


def test_widening_and_narrowing_casts_are_told_apart(ab: tuple[Tensor, Tensor]) -> None:
    wide = value(lambda a, b: a.tanh().double().exp(), *ab)
    narrow = value(lambda a, b: a.tanh().bfloat16().exp(), *ab)
    assert ways(exp(opt_upcast(tanh(x))), wide)
    assert not ways(exp(opt_upcast(tanh(x))), narrow)
    assert not ways(exp(opt_round(tanh(x))), wide)
    assert ways(exp(opt_round(tanh(x))), narrow)


def test_an_optional_cast_of_a_variable_yields_both_ways(ab: tuple[Tensor, Tensor]) -> None:
    found = ways(exp(opt_upcast(x)), value(lambda a, b: a.double().exp(), *ab))
    assert [match["x"].dtype for match in found] == [torch.float32, torch.float64], "the innermost comes first"


def test_optional_views(ab: tuple[Tensor, Tensor]) -> None:
    viewed = value(lambda a, b: a.tanh().view(2, 2, 8).transpose(0, 1).unsqueeze(0).expand(3, 2, 2, 8).exp(), *ab)
    assert ways(exp(opt_view(tanh(x))), viewed)
    assert not ways(exp(opt_view(tanh(x), "reshape")), viewed)
    assert ways(exp(through(["slice"], tanh(x))), value(lambda a, b: a.tanh()[:, :4].exp(), *ab))


# -------------------------------------------------------------------- alternatives and products


def test_alternatives_are_all_tried(ab: tuple[Tensor, Tensor]) -> None:
    pattern = exp(x) | tanh(x) | any_of(x + 1, x * 2)
    for fn in (lambda a, b: a.exp(), lambda a, b: a.tanh(), lambda a, b: a + 1, lambda a, b: a * 2):
        assert len(ways(pattern, value(fn, *ab))) == 1
    assert not ways(pattern, value(lambda a, b: a * 3, *ab))


def test_backtracking_into_an_earlier_operand(ab: tuple[Tensor, Tensor]) -> None:
    """The first way to match the left operand binds x to what the right one then does not have."""
    pattern = exp(x + y) * tanh(x)
    assert len(ways(pattern, value(lambda a, b: (a + b).exp() * b.tanh(), *ab))) == 1
    assert len(ways(pattern, value(lambda a, b: (a + b).exp() * a.tanh(), *ab))) == 1


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b, c: (a.exp() * b.tanh()) * c,
        lambda a, b, c: a.exp() * (b.tanh() * c),
        lambda a, b, c: (c * a.exp()) * b.tanh(),
        lambda a, b, c: c * (b.tanh() * a.exp()),
    ],
)
def test_products_associate_freely(fn: Callable[..., Any]) -> None:
    inputs = (torch.rand(4), torch.rand(4), torch.rand(4))
    found = ways(prod(exp(x), tanh(y), z), value(fn, *inputs))
    assert [(m["x"].node.name, m["y"].node.name, m["z"].node.name) for m in found] == [("a_1", "b_1", "c_1")]
    assert not ways(prod(exp(x), tanh(y), tanh(z)), value(fn, *inputs))


def test_sums_associate_freely() -> None:
    inputs = (torch.rand(4), torch.rand(4), torch.rand(4))
    for fn in (lambda a, b, c: (a + b.exp()) + (c + 1), lambda a, b, c: ((1 + c) + b.exp()) + a):
        assert ways(total(exp(y), x, z, 1), value(fn, *inputs))


def test_the_number_of_factors_counts() -> None:
    inputs = (torch.rand(4), torch.rand(4), torch.rand(4))
    assert "operands" in failure_of(prod(exp(x), tanh(y), z), value(lambda a, b, c: a.exp() * b.tanh(), *inputs))


# -------------------------------------------------------------------- names and predicates


def test_names(ab: tuple[Tensor, Tensor]) -> None:
    root = value(lambda a, b: (a + 1).exp(), *ab)
    (found,) = ways(exp((x + 1).as_("sum")).as_("root"), root)
    assert found["root"] is root
    assert found["sum"] is root.args[0]
    assert found["root.form"] is None


def test_one_name_in_two_alternatives(ab: tuple[Tensor, Tensor]) -> None:
    pattern = exp(x).as_("site") | tanh(x).as_("site")
    for fn in (lambda a, b: a.exp(), lambda a, b: a.tanh()):
        root = value(fn, *ab)
        assert ways(pattern, root)[0]["site"] is root


def test_predicates(ab: tuple[Tensor, Tensor]) -> None:
    pattern = exp(x.where(lambda v: v.ndim == 3, "x has three dimensions"))
    assert failure_of(pattern, value(lambda a, b: a.exp(), *ab)) == "x has three dimensions"
    assert ways(pattern, value(lambda a, b: a[None].exp(), *ab))


def test_the_deepest_failure_is_reported(ab: tuple[Tensor, Tensor]) -> None:
    pattern = any_of(tanh(x), exp(rsqrt(mean(square(x)) + lit("eps"))))
    reason = failure_of(pattern, value(lambda a, b: torch.exp(torch.rsqrt(a.abs().mean(-1, True) + 1e-6)), *ab))
    assert reason == "expected square, found abs"


def test_failures_are_described_in_words(ab: tuple[Tensor, Tensor]) -> None:
    assert failure_of(exp(tanh(x)), value(lambda a, b: a.exp(), *ab)) == "expected tanh, found an input of the graph"
    assert failure_of(tanh(x) / y, value(lambda a, b: 2 / (b + 1), *ab)) == "expected tanh, found the number 2"


# -------------------------------------------------------------------- semantic forms


MULADD = Rule("muladd", (x * y).as_("product") + z, lambda m: Call(muladd, {"a": m["x"], "b": m["y"], "c": m["z"]}, [m.root]), muladd.name)
SUMDIFF = Rule(
    "sumdiff",
    tanh(x + y) * (x - y),
    lambda m: Call(sumdiff, {"a": m["x"], "b": m["y"]}, [m.root.args[0].args[0], m.root.args[1]]),
    sumdiff.name,
)


def test_a_semantic_form_and_its_arguments() -> None:
    view, (root,) = view_of(lambda a, b, c: torch.tanh(a.exp() * b + c), torch.rand(4), torch.rand(4), torch.rand(4))
    matches_of(view, MULADD)
    (found,) = ways(tanh(sem(muladd.name, a=x, b=exp(y), c=z).as_("inner")), root)
    assert found["inner.form"].args["c"] is found["z"]
    assert found["y"].node.name == "a_1"
    assert "test_muladd has" not in failure_of(tanh(sem(scaled_tanh.name)), root)
    assert failure_of(tanh(sem(muladd.name, c=exp(z))), root).startswith("expected exp, found an input")


def test_attributes_of_a_semantic_form(ab: tuple[Tensor, Tensor]) -> None:
    rule = Rule("scaled", tanh(x) * lit("s"), lambda m: Call(scaled_tanh, {"a": m["x"], "scale": 3}, [m.root]), scaled_tanh.name)
    view, (root,) = view_of(lambda a, b: (a.tanh() * 3).exp(), *ab)
    matches_of(view, rule)
    assert ways(exp(sem(scaled_tanh.name, scale=3)), root)
    assert failure_of(exp(sem(scaled_tanh.name, scale=4)), root) == "test_scaled_tanh has scale = 3, expected 4"


def test_the_outputs_of_a_semantic_form_are_told_apart(ab: tuple[Tensor, Tensor]) -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(a + b) * (a - b), (a + b).exp(), (a - b).exp()

    view, (_, of_sum, of_difference) = view_of(fn, *ab)
    matches_of(view, SUMDIFF)
    assert ways(exp(sem(sumdiff.name)), of_sum)
    assert ways(exp(sem(sumdiff.name, output=1)), of_difference)
    assert not ways(exp(sem(sumdiff.name, output=1)), of_sum)


# -------------------------------------------------------------------- where a pattern can be


@pytest.mark.parametrize(
    ("pattern", "roots", "required"),
    [
        (exp(x) + 1, {"add"}, [{"add"}, {"exp"}]),
        (opt_cast(exp(x)), {"cast", "exp"}, [{"exp"}]),
        (exp(x) | tanh(x), {"exp", "tanh"}, [{"exp", "tanh"}]),
        (exp(x) * (tanh(y) | y), {"mul"}, [{"mul"}, {"exp"}]),
        (prod(exp(x), y, 2), {"mul"}, [{"mul"}, {"exp"}]),
        (sem("muladd", a=exp(x)), {"form:muladd"}, [{"form:muladd"}]),
        (exp(x).as_("a").where(lambda v: True, "never"), {"exp"}, [{"exp"}]),
    ],
)
def test_what_every_match_contains(pattern: Pattern, roots: set[str], required: list[set[str]]) -> None:
    footprint = pattern.footprint
    assert footprint.roots == roots
    assert [set(names) for names in footprint.required] == required


def test_a_rule_needs_an_operator_at_its_root() -> None:
    with pytest.raises(RuleError, match="must be an operator, not a variable"):
        Rule("bad", x, lambda m: Call(muladd, {}, []), "muladd")
    with pytest.raises(RuleError, match="must be an operator"):
        Rule("bad", exp(x) | y, lambda m: Call(muladd, {}, []), "muladd")
    with pytest.raises(RuleError, match="gist needs an idiom"):
        Rule("bad", exp(x), lambda m: Call(muladd, {}, []), "muladd", gist=exp(x))
    with pytest.raises(RuleError, match="gist's root"):
        Rule("bad", exp(x), lambda m: Call(muladd, {}, []), "muladd", gist=x, gist_idiom="glu")
