"""The table of semantic ops, its document, and what every op must have."""

from __future__ import annotations

from pathlib import Path

import pytest

import npu_fusion.ops
from npu_fusion.ops.__main__ import main
from npu_fusion.semantic import semantic_ops

DOCUMENT = Path(__file__).parents[2] / "docs" / "ops.md"
OWN = [op for op in semantic_ops() if op.reference.__module__.startswith("npu_fusion.ops.")]


def test_document_is_current(tmp_path: Path) -> None:
    """`python -m npu_fusion.ops docs/ops.md` writes what docs/ops.md holds."""
    written = tmp_path / "ops.md"
    main([str(written)])
    assert written.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")


def test_table_lists_every_op() -> None:
    rows = npu_fusion.ops.op_table()
    assert [row.name for row in rows] == [op.name for op in OWN]
    assert {row.family for row in rows} >= {"norm", "rope", "glu", "attention"}
    assert all(row.signature.startswith(f"{row.name}(") for row in rows)
    rms_norm = next(row for row in rows if row.name == "rms_norm")
    assert rms_norm.summary.startswith("Root-mean-square normalisation")


@pytest.mark.parametrize("op", OWN, ids=lambda op: op.name)
def test_docstrings_say_what_the_design_asks(op: npu_fusion.ops.SemanticOp) -> None:
    for section in ("Maths:", "Args:", "Returns:", "Rounding:", "Raises:", "Source:"):
        assert section in op.doc, f"{op.name}: no {section}"
    for argument in op.overload._schema.arguments:
        assert argument.name in op.doc, f"{op.name}: {argument.name} is not described"
