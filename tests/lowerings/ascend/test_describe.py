"""The op table in words, and its document."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from npu_fusion.lowerings.ascend.__main__ import main
from npu_fusion.lowerings.ascend.describe import dtypes_of, limit_lines, limit_text, op_record, op_table_markdown
from npu_fusion.lowerings.ascend.table import Limit, ascend_ops

DOCUMENT = Path(__file__).parents[3] / "docs" / "op-table.md"
OP = ascend_ops()["npu::npu_rms_norm"]


def test_document_is_current(tmp_path: Path) -> None:
    """`python -m npu_fusion.lowerings.ascend docs/op-table.md` writes what docs/op-table.md holds."""
    written = tmp_path / "op-table.md"
    main([str(written)])
    assert written.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")


def test_document_has_every_op_and_source() -> None:
    text = op_table_markdown()
    for op in ascend_ops().values():
        assert f"### `{op.name}`" in text
        assert op.schema in text
        assert f"- Source: {op.source}" in text


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (Limit(dtypes={"x": ["float16", "bfloat16"], "w": ["float16", "bfloat16"]}), "x and w fp16/bf16"),
        (Limit(dtypes={"x": ["float32"], "scale": ["int8"]}), "x fp32; scale int8"),
        (Limit(same_dtype=["a", "b", "c"]), "a, b and c of one dtype"),
        (Limit(rank={"x": [1, 8], "y": [1, 1]}), "x of 1 to 8 dimensions; y of 1 dimension"),
        (Limit(sizes={"x[-1]": {"min": 16, "multiple_of": 8}}), "x[-1] ≥ 16, a multiple of 8"),
        (Limit(sizes={"x[-1]": {"one_of": [64, 128]}, "x[0]": {"max": 9}}), "x[-1] = 64/128; x[0] ≤ 9"),
        (Limit(same_sizes=[["x[0]", "y[0]"], ["x[1]", 1]]), "x[0] = y[0]; x[1] = 1"),
        (Limit(values={"mode": ["half", "None"], "n": [0, 1]}), 'mode = "half"/None; n = 0/1'),
        (Limit(absent=["bias", "scale"], nonempty=["x"]), "no bias or scale; x not empty"),
    ],
)
def test_limits_in_words(limit: Limit, text: str) -> None:
    assert limit_text(limit) == text


def test_lines_are_those_of_the_target() -> None:
    limits = (
        Limit(nonempty=["x"]),
        Limit(dtypes={"x": ["float16"]}, targets=["ascend310p"]),
        Limit(dtypes={"x": ["bfloat16"]}, targets=["ascend910b"], any="dtypes"),
        Limit(dtypes={"x": ["float32"]}, targets=["ascend910b"], any="dtypes"),
        Limit(absent=["x"]),
    )
    op = dataclasses.replace(OP, limits=limits)
    assert limit_lines(op, "ascend310p") == ["x not empty", "x fp16", "no x"]
    assert limit_lines(op, "ascend910b") == ["x not empty", "no x", "(x bf16) or (x fp32)"]
    assert limit_lines(op) == ["x not empty", "ascend310p: x fp16", "no x", "ascend910b: (x bf16) or (x fp32)"]
    assert dtypes_of(op, "ascend910b") == ["bf16", "fp32"]
    assert dtypes_of(op) == ["fp16", "bf16", "fp32"]


def test_every_condition_of_the_table_has_words() -> None:
    for op in ascend_ops().values():
        for limit in op.limits:
            for condition in limit.sizes.values():
                assert set(condition) <= {"one_of", "min", "max", "multiple_of"}, op.name


def test_record_is_plain_data() -> None:
    record = op_record(OP, "ascend910b")
    assert record["outputs"] == ["y", "rstd"]
    assert record["package"] == "torch_npu"
    assert record["limits"] == limit_lines(OP, "ascend910b")
