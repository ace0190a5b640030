"""The self test: its cases cover every emitted op, the CPU kernels take them all, and what is off is found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from npu_fusion.config import TARGETS
from npu_fusion.lowerings.ascend import library, selftest, sgl
from npu_fusion.lowerings.ascend.emulation import emulated_ops
from npu_fusion.lowerings.ascend.installed import schema_of, state_of
from npu_fusion.lowerings.ascend.selftest import Case, elementwise_error, run_case
from npu_fusion.lowerings.ascend.table import AscendOp, ascend_ops
from npu_fusion.torch_private import FakeTensorMode

SOCS = [target for target in TARGETS if target.startswith("ascend")]
EMITTED = [op for op in ascend_ops().values() if op.uses and not op.collective]
CASES = list(selftest.cases())


# cases


@pytest.mark.parametrize("target", SOCS)
def test_every_emitted_op_has_cases_that_its_limits_allow(target: str) -> None:
    planned = {case.op for case in selftest.planned(target)}
    assert planned == {op.name for op in EMITTED if target in op.targets}


def test_labels_tell_cases_apart() -> None:
    labels = [str(case) for case in CASES]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("case", CASES[:: len(CASES) // 10], ids=str)
def test_arguments_are_equal_at_every_call_and_nobody_elses(case: Case) -> None:
    first, second = case.arguments(), case.arguments()
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second[name])
            assert value.data_ptr() != second[name].data_ptr()
        else:
            assert value == second[name]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arguments_are_those_of_the_schema(case: Case) -> None:
    schema = schema_of(ascend_ops()[case.op])
    arguments = case.arguments()
    assert set(arguments) <= {spec.name for spec in schema.arguments}
    assert {spec.name for spec in schema.arguments if not spec.has_default_value()} <= set(arguments)


def test_calls_that_the_table_refuses_on_a_target_are_not_planned() -> None:
    """310P's npu_rms_norm takes no bf16, and a gamma of the dtype of x only."""
    labels = [case.label for case in selftest.planned("ascend310p", ["npu_rms_norm"])]
    assert labels == ["fp16 [3, 5, 8, 128]", "fp32 [7, 1536]"]


def test_unknown_op_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(selftest.SelfTestError, match=r"unknown op 'npu_rope'. Known on ascend910b: .*npu\.npu_rotary_mul"):
        selftest.planned("ascend910b", ["npu_rope"])


# the CPU kernels on the cases


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_kernel_gives_what_the_kernel_gives(case: Case) -> None:
    library.prepare(emulate=True)
    op = ascend_ops()[case.op]
    real = _call(op, lambda *args, **kwargs: emulated_ops()[op.name].kernel(*args, **kwargs), case.arguments())
    overload = library.overload_of(op)
    assert overload is not None
    mode = FakeTensorMode()
    arguments = pytree.tree_map_only(Tensor, mode.from_tensor, case.arguments())
    with mode:
        fake = _call(op, overload, arguments)
    assert [_metadata(value) for value in pytree.tree_leaves(fake)] == [_metadata(value) for value in pytree.tree_leaves(real)]


def _call(op: AscendOp, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    positional = [arguments.pop(spec.name, spec.default_value) for spec in schema_of(op).arguments if not spec.kwarg_only]
    return function(*positional, **arguments)


def _metadata(value: Any) -> Any:
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else type(value)


@pytest.mark.parametrize("op", EMITTED, ids=lambda op: op.name)
def test_dispatched_on_cpu_every_op_agrees_with_its_kernel(op: AscendOp) -> None:
    target = next(target for target in SOCS if target in op.targets)
    outcomes = list(selftest.self_test(target, "cpu", [op.name]))
    assert [(outcome.case.label, outcome.verdict, outcome.detail) for outcome in outcomes if outcome.verdict != "ok"] == []
    assert all(outcome.error == 0.0 for outcome in outcomes)


# verdicts


GELU = next(case for case in CASES if case.op == "npu::npu_fast_gelu")
SCATTER = next(case for case in CASES if case.op == "npu::npu_scatter_nd_update_")


def _with_kernel(monkeypatch: pytest.MonkeyPatch, name: str, kernel: Callable[..., Any]) -> None:
    monkeypatch.setitem(vars(emulated_ops()[name]), "kernel", kernel)


def test_other_numbers_are_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    library.prepare(emulate=True)
    real = emulated_ops()[GELU.op].kernel
    _with_kernel(monkeypatch, GELU.op, lambda input: real(input) * 1.05)
    outcome = run_case(GELU, "cpu")
    assert outcome.verdict == "mismatch"
    assert outcome.failed
    assert outcome.error is not None
    assert outcome.allowed is not None
    assert 0.05 > outcome.error > outcome.allowed


def test_another_last_bit_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    library.prepare(emulate=True)
    real = emulated_ops()[GELU.op].kernel
    _with_kernel(monkeypatch, GELU.op, lambda input: (real(input).float() * (1 + torch.finfo(input.dtype).eps)).to(input.dtype))
    outcome = run_case(GELU, "cpu")
    assert outcome.verdict == "ok"
    assert outcome.error


def test_another_shape_or_dtype_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    library.prepare(emulate=True)
    real = emulated_ops()[GELU.op].kernel
    _with_kernel(monkeypatch, GELU.op, lambda input: real(input).float())
    assert run_case(GELU, "cpu").detail == "y is bfloat16 [4, 1024], the CPU kernel gives float32 [4, 1024]"
    _with_kernel(monkeypatch, GELU.op, lambda input: real(input)[:2])
    assert run_case(GELU, "cpu").detail == "y is bfloat16 [4, 1024], the CPU kernel gives bfloat16 [2, 1024]"


def test_what_an_op_writes_to_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    library.prepare(emulate=True)
    assert run_case(SCATTER, "cpu").verdict == "ok"
    _with_kernel(monkeypatch, SCATTER.op, lambda input, indices, updates: input)
    outcome = run_case(SCATTER, "cpu")
    assert (outcome.verdict, outcome.detail) == ("mismatch", "input differs")


def test_an_op_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    library.prepare(emulate=True)

    def fails(*args: Any) -> Any:
        raise RuntimeError("\nEZ9999: inner error\nwith a long story")

    monkeypatch.setattr("npu_fusion.lowerings.ascend.selftest.compare.overload_of", lambda op: fails)
    outcome = run_case(GELU, "cpu")
    assert (outcome.verdict, outcome.detail) == ("error", "RuntimeError: EZ9999: inner error")
    _with_kernel(monkeypatch, GELU.op, fails)
    assert run_case(GELU, "cpu").detail == "CPU kernel: RuntimeError: EZ9999: inner error"


def test_an_op_that_the_library_lacks_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_fusion.lowerings.ascend.selftest.compare.overload_of", lambda op: None)
    outcome = run_case(GELU, "cpu")
    assert (outcome.verdict, outcome.detail, outcome.failed) == ("missing", "not in the installed torch_npu", False)


def test_what_we_defined_ourselves_is_missing_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_fusion.lowerings.ascend.installed.define_ops", lambda: frozenset({GELU.op}))
    assert run_case(GELU, "npu").verdict == "missing"


def test_another_schema_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_fusion.lowerings.ascend.selftest.compare.state_of", lambda op: "another schema")
    outcome = run_case(GELU, "npu")
    assert outcome.verdict == "error"
    assert outcome.detail.startswith("the installed torch_npu has it as npu::npu_fast_gelu(")


# installed


def test_state_of_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    library.prepare(emulate=True)
    op = ascend_ops()["npu::npu_swiglu"]
    monkeypatch.setattr("npu_fusion.lowerings.ascend.installed.define_ops", frozenset)
    assert state_of(op) == "present"
    assert state_of(dataclasses.replace(op, schema="npu_swiglu(Tensor input) -> Tensor")) == "present"
    assert state_of(dataclasses.replace(op, schema="npu_swiglu(Tensor input, int dim=-1, int more=0) -> Tensor")) == "another schema"
    assert state_of(dataclasses.replace(op, schema="npu_swiglu(Tensor input, int axis=-1) -> Tensor")) == "another schema"
    assert state_of(dataclasses.replace(op, name="npu::npu_not_there")) == "missing"


def test_functions_of_sgl_are_present_where_the_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ascend_ops()["npu_fusion_sgl::split_qkv_rmsnorm_rope"]
    monkeypatch.setattr(sgl, "installed", lambda: True)
    assert state_of(op) == "present"
    monkeypatch.setattr(sgl, "installed", lambda: False)
    assert state_of(op) == "missing"


# errors of elements


def test_elementwise_error() -> None:
    reference = torch.tensor([3.0, -4.0, 0.0, 0.0])
    rms = 2.5
    assert elementwise_error(reference, reference) == 0
    assert elementwise_error(reference + torch.tensor([0.0, 0.0, 0.5, 0.0]), reference) == pytest.approx(0.5 / rms)
    assert elementwise_error(reference + torch.tensor([0.5, 0.0, 0.0, 0.0]), reference) == pytest.approx(0.5 / (rms + 3))
    assert elementwise_error(torch.zeros(0), torch.zeros(0)) == 0
    assert elementwise_error(torch.zeros(3), torch.zeros(3)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_elementwise_error_of_what_is_not_finite(value: float) -> None:
    finite, odd = torch.tensor([1.0, 2.0]), torch.tensor([1.0, value])
    assert elementwise_error(odd, odd) == 0
    assert elementwise_error(odd, finite) == math.inf
    assert elementwise_error(finite, odd) == math.inf
