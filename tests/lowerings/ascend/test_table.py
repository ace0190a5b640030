"""The table of Ascend ops: that its rows are whole, that each kind of limit works, and that every op of it has its kernels."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_fusion.config import TARGETS
from npu_fusion.lowerings.ascend import library, table
from npu_fusion.lowerings.ascend.emulation import emulated_ops
from npu_fusion.lowerings.ascend.table import SOCS, AscendOp, Limit, TableError, ascend_ops, find_op, host_lists, violation
from tests.graphs import aten_graph

OPS = list(ascend_ops().values())
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def schema_of(op: AscendOp) -> torch._C.FunctionSchema:
    return torch._C.parse_schema(f"{op.namespace}::{op.schema}")


def places(limit: Limit) -> set[str]:
    """The arguments that a limit speaks of."""
    sized = [*limit.sizes, *(place for group in limit.same_sizes for place in group if isinstance(place, str))]
    named = (limit.dtypes, limit.same_dtype, limit.rank, limit.values, limit.absent, limit.nonempty)
    return {name for names in named for name in names} | {place.partition("[")[0] for place in sized}


# -------------------------------------------------------------------- rows


@every_op
def test_rows_are_whole(op: AscendOp) -> None:
    assert op.computes
    assert op.source
    assert op.targets
    assert set(op.targets) <= set(SOCS)
    assert op.capture
    written = {argument.name for argument in schema_of(op).arguments if argument.alias_info and argument.alias_info.is_write}
    assert set(op.uses) <= set(op.outputs) | written
    assert op.namespace in library.PACKAGES
    assert op.since or library.package_of(op) != "torch_npu"
    for limit in op.limits:
        assert limit.source, "a limit without a source"
        assert set(limit.targets) <= set(op.targets)


@every_op
def test_schemas_parse_and_fit_the_row(op: AscendOp) -> None:
    schema = schema_of(op)
    assert schema.name == f"{op.namespace}::{op.opname}"
    assert (schema.overload_name or "default") == op.overload
    assert len(op.outputs) == len(schema.returns)
    assert len(set(op.outputs)) == len(op.outputs)
    arguments = {argument.name for argument in schema.arguments}
    assert set(op.host_lists) <= arguments
    for limit in op.limits:
        assert places(limit) <= arguments


@every_op
def test_dtypes_of_limits_exist(op: AscendOp) -> None:
    for limit in op.limits:
        for dtypes in limit.dtypes.values():
            assert all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in dtypes)


def test_every_target_has_ops() -> None:
    for target in TARGETS:
        if target.startswith("ascend"):
            assert sum(target in op.targets and bool(op.uses) for op in OPS) > 5
    assert {target for op in OPS for target in op.targets} == set(SOCS)


# -------------------------------------------------------------------- kernels


@every_op
def test_every_op_has_a_cpu_kernel_and_a_fake_kernel(op: AscendOp) -> None:
    emulated = emulated_ops()[op.name]
    overload = library.overload_of(op)
    assert overload is not None
    assert overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)
    assert len(emulated._fakes) == 1


@every_op
def test_kernels_have_the_parameters_of_the_schema(op: AscendOp) -> None:
    """In names, order, kind and defaults, so that none is forgotten. Fake kernels name those that they need."""
    emulated = emulated_ops()[op.name]
    arguments = {argument.name: argument for argument in schema_of(op).arguments}
    assert list(inspect.signature(emulated.kernel).parameters) == list(arguments)
    for kernel in (emulated.kernel, *emulated._fakes):
        parameters = inspect.signature(kernel).parameters.values()
        for parameter in (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)):
            argument = arguments[parameter.name]
            assert (parameter.default is not parameter.empty) == argument.has_default_value(), parameter
            assert not argument.has_default_value() or parameter.default == argument.default_value, parameter
            assert argument.kwarg_only or parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter


def test_no_kernel_without_a_row() -> None:
    assert emulated_ops().keys() <= ascend_ops().keys()


# -------------------------------------------------------------------- limits

SIZED = {"a[1]": {"min": 4}, "a[-1]": {"max": 8}, "a[0]": {"multiple_of": 2}, "b[0]": {"one_of": [3, 5]}}


def arguments(**changed: Any) -> dict[str, Any]:
    return {"a": torch.ones(2, 4, 8), "b": torch.ones(3, dtype=torch.float16), "mode": "BSND", "n": 1, "none": None, **changed}


@pytest.mark.parametrize(
    ("limit", "changed", "reason"),
    [
        (Limit(dtypes={"a": ["float32"], "b": ["float16", "float32"], "none": ["int32"]}), {}, None),
        (Limit(dtypes={"a": ["float16", "bfloat16"]}), {}, "a is float32, not float16 or bfloat16"),
        (Limit(same_dtype=["a", "none"]), {}, None),
        (Limit(same_dtype=["a", "b"]), {}, "a is float32, b is float16: they must have one dtype"),
        (Limit(rank={"a": [1, 3], "none": [1, 1]}), {}, None),
        (Limit(rank={"a": [1, 2]}), {}, "a has 3 dimensions, not 1 to 2"),
        (Limit(sizes=SIZED), {}, None),
        (Limit(sizes=SIZED), {"a": torch.ones(2, 3, 8)}, "a[1] is 3, not known to be at least 4"),
        (Limit(sizes=SIZED), {"a": torch.ones(2, 4, 9)}, "a[-1] is 9, not known to be at most 8"),
        (Limit(sizes=SIZED), {"a": torch.ones(3, 4, 8)}, "a[0] is 3, not known to be a multiple of 2"),
        (Limit(sizes=SIZED), {"b": torch.ones(4)}, "b[0] is 4, not 3 or 5"),
        (Limit(sizes={"none[0]": {"min": 1}}), {}, None),
        (Limit(sizes={"a[:-1]": {"max": 8}}), {}, None),
        (Limit(sizes={"a[:-1]": {"max": 7}}), {}, "a[:-1] is 8, not known to be at most 7"),
        (Limit(same_sizes=[["a[0]", 2], ["none[0]", "a[0]"]]), {}, None),
        (Limit(same_sizes=[["a[0]", "b[0]"]]), {}, "a[0], b[0] are 2, 3: they must be equal"),
        (Limit(values={"mode": ["BSND", "TND"], "n": [0, 1], "none": ["None", 3]}), {}, None),
        (Limit(values={"mode": ["TND"]}), {}, "mode='BSND', not 'TND'"),
        (Limit(values={"n": [0, 2]}), {}, "n=1, not 0 or 2"),
        (Limit(absent=["none"]), {}, None),
        (Limit(absent=["b"]), {}, "it takes no b"),
        (Limit(nonempty=["a", "none"]), {}, None),
        (Limit(nonempty=["a"]), {"a": torch.ones(2, 0, 8)}, "a is empty"),
    ],
)
def test_limits(limit: Limit, changed: dict[str, Any], reason: str | None) -> None:
    assert violation(limit, arguments(**changed)) == reason


def row(*limits: Limit, targets: tuple[str, ...] = ("ascend910b", "ascend910_93")) -> AscendOp:
    return AscendOp("npu::op", "", ["y"], ["y"], "", targets, "2.1", True, True, "safe", "", limits=limits)


def test_limits_of_a_target() -> None:
    op = row(Limit(targets=["ascend910b"], absent=["b"]))
    assert op.refusal(arguments(), "ascend910b") == "it takes no b"
    assert op.refusal(arguments(), "ascend910_93") is None
    assert op.refusal(arguments(), "ascend950") == "not on ascend950"


def test_all_limits_hold_but_of_alternatives_one() -> None:
    fits, first, second = Limit(any="dtypes"), Limit(any="dtypes", absent=["a"]), Limit(any="dtypes", absent=["b"])
    assert row(first, fits).refusal(arguments(), "ascend910b") is None
    assert row(first, second).refusal(arguments(), "ascend910b") == "dtypes: it takes no a and it takes no b"
    assert row(first, fits, Limit(absent=["a"])).refusal(arguments(), "ascend910b") == "it takes no a"
    elsewhere = Limit(any="dtypes", targets=["ascend910_93"])
    assert row(first, elsewhere).refusal(arguments(), "ascend910b") == "dtypes: it takes no a"
    assert row(Limit(any="other", absent=["a"]), fits).refusal(arguments(), "ascend910b") == "other: it takes no a"


def test_a_size_that_is_not_known_does_not_fit() -> None:
    gm = aten_graph(lambda x: x + 1, torch.ones(6, 8), dynamic=True)
    [node] = gm.graph.find_nodes(op="placeholder")
    for condition in ({"max": 1024}, {"multiple_of": 2}, {"one_of": [6]}, {"min": 7}):
        assert violation(Limit(sizes={"x[0]": condition}), {"x": node}) is not None
    assert violation(Limit(sizes={"x[0]": {"min": 1}}), {"x": node}) is None
    assert violation(Limit(same_sizes=[["x[0]", "x[0]"]]), {"x": node}) is None
    assert violation(Limit(same_sizes=[["x[0]", "x[1]"]]), {"x": node}) is not None
    assert not node.meta["val"].fake_mode.shape_env.guards


# -------------------------------------------------------------------- reading


def test_an_op_is_found_by_its_call_target() -> None:
    library.prepare()
    found = find_op(torch.ops.npu.npu_rms_norm.default)
    assert found is not None
    assert (found.name, found.shown, found.capturable) == ("npu::npu_rms_norm", "npu.npu_rms_norm", True)
    assert find_op(torch.ops.aten.add.Tensor) is None
    assert find_op(torch.relu) is None
    assert host_lists(torch.ops.npu.npu_rms_norm.default) == ()


def test_names_of_an_overload() -> None:
    op = AscendOp("npu::op.out", "", [], [], "", [], "", True, True, "it syncs", "")
    assert (op.namespace, op.opname, op.overload, op.capturable) == ("npu", "op", "out", False)
    assert row().overload == "default"


WHOLE = """
schema = ""
outputs = []
uses = []
computes = ""
targets = []
since = ""
meta = true
ge_converter = true
capture = "safe"
source = ""
"""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (['["npu::x"]\nschemata = ""'], "0.toml: npu::x: .*schemata"),
        (['["npu::x"]\nschema = ""'], "0.toml: npu::x: .*missing"),
        ([f'["npu::x"]{WHOLE}[["npu::x".limits]]\nsize = 1'], "0.toml: npu::x: .*size"),
        ([f'["npu::x"]{WHOLE}'] * 2, "1.toml: npu::x is in the table twice"),
    ],
    ids=["unknown field", "missing field", "unknown limit", "twice"],
)
def test_a_malformed_table_names_file_and_op(files: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, text in enumerate(files):
        (tmp_path / f"{number}.toml").write_text(text)
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    with pytest.raises(TableError, match=message):
        ascend_ops.__wrapped__()
