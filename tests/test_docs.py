"""The examples in docs/ascend.md and README.md are run as they are written, one after another as a reader would."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```python *(?P<mark>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str, *marks: str) -> list[tuple[int, str]]:
    """The Python blocks of a document with one of the marks, each with its first line's number."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    return [(text.count("\n", 0, match.start("code")) + 1, match["code"]) for match in found if match["mark"] in marks]


def run(document: str, *marks: str) -> dict[str, object]:
    """Run the marked blocks in one module, which is importable meanwhile, as Dynamo asks; a traceback has the document's lines."""
    module = types.ModuleType("example_of_documentation")
    sys.modules[module.__name__] = module
    try:
        for line, code in blocks(document, *marks):
            exec(compile("\n" * (line - 1) + code, document, "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    return vars(module)


@pytest.fixture(autouse=True)
def _reset_dynamo() -> None:
    torch.compiler.reset()


def test_examples_of_ascend(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("docs/ascend.md", "")
    assert {"compiled", "report", "normed"} <= set(names)
    assert "{'rms_norm': 'npu.npu_rms_norm', 'glu': 'npu.npu_swiglu'}" in capsys.readouterr().out


def test_marks_are_known() -> None:
    marks = {match["mark"] for match in _BLOCK.finditer((ROOT / "docs" / "ascend.md").read_text(encoding="utf-8"))}
    assert marks == {"", "npu", "torchair", "notest"}
    for _, code in blocks("docs/ascend.md", *marks):
        compile(code, "docs/ascend.md", "exec")


@pytest.mark.parametrize("document", [path.relative_to(ROOT) for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md")], ids=str)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
