"""Every kernel becomes machine code for an NVIDIA GPU, in the memory that a program has there."""

from __future__ import annotations

import ast

import pytest

from tests.kernels.gpu_code import ROOT, SHARED_MEMORY, Code, compile_all, scattered_reductions

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
def test_no_reduction_is_over_scattered_lanes(codes: list[Code]) -> None:
    assert [code for code in codes if code.scattered] == []


def test_scattered_lanes_are_seen() -> None:
    """As Triton 3.6 lays out [4, 8, 8] that is reshaped to [4, 64]: the lanes of a row are 0, 1, 2, 3 and 16 to 19."""
    layout = "#linear = #ttg.linear<{register = [[0, 1]], lane = [[0, 2], [0, 4], [1, 0], [2, 0], [0, 8]], warp = [[0, 16]], block = []}>\n"
    reduce = '%0 = "tt.reduce"(%1) <{{axis = {} : i32}}> ({{\n^bb0(%a: f32, %b: f32):\n}}) : (tensor<4x64xf32, {}>) -> tensor<4xf32>\n'
    assert scattered_reductions(layout + reduce.format(1, "#linear")) == 1
    assert scattered_reductions(layout + reduce.format(0, "#linear") + reduce.format(1, "#blocked")) == 0
    inner = "#ttg.slice<{dim = 0, parent = #linear}>"
    assert scattered_reductions(layout + reduce.format(0, inner) + reduce.format(0, "#ttg.slice<{dim = 1, parent = #linear}>")) == 1


@pytest.mark.xdist_group("gpu_code")
def test_no_kernel_is_left_out(codes: list[Code]) -> None:
    files = sorted((ROOT / "kernels").glob("*.py"))
    functions = [node for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert {code.kernel for code in codes} == {node.name for node in functions if node.name.endswith("_kernel") and node.decorator_list}
