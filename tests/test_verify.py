"""`verify=True`: a wrong rule is caught at the first call, a right one is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion
from npu_fusion import FusionConfig, VerificationError
from npu_fusion.match import Match
from npu_fusion.ops.norm import rms_norm
from npu_fusion.pattern import LAST, lit, mean, rsqrt, square, tanh, var
from npu_fusion.rule import Call, Rule
from npu_fusion.verify import compare
from tests.graphs import aten_graph, fuse_with, scaled_tanh, test_op

x, weight = var("x"), var("weight")


def norm_rule(eps: float | None = None, weight_offset: int = 0) -> Rule:
    """RMSNorm, with the eps and the offset that the model has or with others."""

    def rewrite(m: Match) -> Call:
        args = {"x": m["x"], "weight": m["weight"], "eps": m["eps"] if eps is None else eps, "weight_offset": weight_offset}
        return Call(rms_norm, args, [m.root])

    normed = x * rsqrt(mean(square(x), dims=LAST) + lit("eps"))
    return Rule("my_norm", normed * weight, rewrite, rms_norm.name, idioms={})


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def run(fn: Any, rule: Rule, *inputs: Tensor, verify: bool = True, dynamic: bool = False) -> Any:
    torch.compiler.reset()
    config = npu_fusion.register_rule(FusionConfig(rules=(), verify=verify), rule)
    options = {"rules": (), "verify": verify, "extra_rules": config.extra_rules}
    compiled = torch.compile(fn, backend="npu_fusion", options=options, dynamic=dynamic)
    with torch.no_grad():
        result = compiled(*inputs)
        assert npu_fusion.report(compiled).ops
        assert torch.equal(compiled(*inputs), result)
    return result


INPUTS = (torch.randn(4, 8), torch.rand(8) + 0.5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_rule_passes(dynamic: bool, dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in INPUTS]
    torch.testing.assert_close(run(norm, norm_rule(), *inputs, dynamic=dynamic), norm(*inputs), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("wrong", [norm_rule(eps=0.3), norm_rule(weight_offset=1)])
def test_a_wrong_rule_is_caught_and_named(wrong: Rule) -> None:
    with pytest.raises(VerificationError, match=r"'my_norm'.*node"):
        run(norm, wrong, *INPUTS)


def test_without_verify_a_wrong_rule_runs() -> None:
    result = run(norm, norm_rule(weight_offset=1), *INPUTS, verify=False)
    assert not torch.allclose(result, norm(*INPUTS), rtol=0.1)


def test_a_wrong_rule_cannot_hide_behind_another_node() -> None:
    """The error is measured where the op stands, not at the end of the model, where it would drown."""

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return norm(x, weight) * 1e-6 + x

    with pytest.raises(VerificationError):
        run(fn, norm_rule(weight_offset=1), *INPUTS)


@test_op("(Tensor a) -> Tensor")
def nan_tanh(a: Tensor) -> Tensor:
    """tanh(abs(a)), but for one element."""
    result = a.abs().tanh()
    result.view(-1)[0] = float("nan")
    return result


@test_op("(Tensor a) -> Tensor")
def wrong_index(a: Tensor) -> Tensor:
    """The index of the largest, off by one."""
    return a.abs().argmax(-1) + 1


def test_results_that_are_not_finite_and_integers() -> None:
    from npu_fusion.pattern import op

    nan = Rule("nan", tanh(op("abs", x)), lambda m: Call(nan_tanh, {"a": m["x"]}, [m.root]), nan_tanh.name)
    index = Rule(
        "index", op("argmax", op("abs", x), dim=-1, keepdim=False), lambda m: Call(wrong_index, {"a": m["x"]}, [m.root]), wrong_index.name
    )
    with pytest.raises(VerificationError, match="'nan'"):
        run(lambda a: a.abs().tanh(), nan, INPUTS[0])
    with pytest.raises(VerificationError, match=r"'index'.*differs"):
        run(lambda a: a.abs().argmax(-1), index, INPUTS[0])


def test_inputs_that_the_model_writes_are_left_to_the_model() -> None:
    def fn(x: Tensor, weight: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return norm(x, weight) * count

    count = torch.zeros(())
    torch.compiler.reset()
    compiled = torch.compile(fn, backend="npu_fusion", options={"verify": True})
    with torch.no_grad():
        compiled(*INPUTS, count)
        compiled(*INPUTS, count)
    assert count.item() == 2


def test_random_numbers_are_the_models() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return norm(torch.rand_like(x), weight)

    torch.manual_seed(5)
    verified = run_once(fn, verify=True)
    torch.manual_seed(5)
    assert torch.equal(verified, run_once(fn, verify=False))


def run_once(fn: Any, verify: bool) -> Tensor:
    torch.compiler.reset()
    with torch.no_grad():
        result: Tensor = torch.compile(fn, backend="npu_fusion", options={"verify": verify})(*INPUTS)
    return result


def test_checks_compare_each_op_with_the_inputs_that_the_model_gave_it() -> None:
    """Two ops in a row: the second is checked with the first one's unfused result."""
    from npu_fusion.pattern import op

    rule = Rule("scaled", tanh(op("abs", x)), lambda m: Call(scaled_tanh, {"a": m["x"], "scale": 1}, [m.root]), scaled_tanh.name)
    positive = torch.rand(4) + 0.1
    gm = aten_graph(lambda a: a.abs().tanh().abs().tanh(), positive)
    record = fuse_with(gm, [rule], verify=True)
    assert [check.rule for check in record.checks] == ["scaled", "scaled"]
    compare(record.stages["aten"], record.checks, [positive])
    with pytest.raises(VerificationError):
        compare(record.stages["aten"], record.checks, [-positive])
