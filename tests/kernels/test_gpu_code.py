"""Every kernel becomes machine code for an NVIDIA GPU, in the memory that a program has there."""

from __future__ import annotations

import ast

import pytest

from tests.kernels.gpu_code import ROOT, SHARED_MEMORY, Code, compile_all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def codes() -> list[Code]:
    return compile_all()


@pytest.mark.xdist_group("gpu_code")
def test_kernels_compile(codes: list[Code]) -> None:
    assert [code for code in codes if code.error] == []


@pytest.mark.xdist_group("gpu_code")
def test_kernels_fit_into_shared_memory(codes: list[Code]) -> None:
    assert [code for code in codes if code.shared > SHARED_MEMORY] == []


@pytest.mark.xdist_group("gpu_code")
def test_no_kernel_is_left_out(codes: list[Code]) -> None:
    files = sorted((ROOT / "kernels").glob("*.py"))
    functions = [node for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert {code.kernel for code in codes} == {node.name for node in functions if node.name.endswith("_kernel") and node.decorator_list}
