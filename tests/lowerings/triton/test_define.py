"""How kernels become torch ops and providers: definitions, checks of arguments, when Triton is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import FusionConfig
from npu_fusion.kernels.launch import Device, Launch
from npu_fusion.lower import REFERENCE, Refused, providers_of
from npu_fusion.lowerings import triton as package
from npu_fusion.lowerings.triton import checks, define, provide
from npu_fusion.ops.norm import l2_norm
from tests.lowerings.ascend.checks import lower_call

CUDA, CPU = FusionConfig(target="cuda"), FusionConfig(target="cuda", emulate=True)

# -------------------------------------------------------------------- define


class Kernel:
    """Stands for a `@triton.jit` function: remembers what it is launched with."""

    def __init__(self) -> None:
        self.launched: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.launched.append((grid, arguments))


def test_a_launch_is_a_grid_with_arguments_constants_and_options() -> None:
    kernel, x = Kernel(), torch.ones(3)
    define.launch(Launch(kernel, 7, {"BLOCK": 64}, {"num_warps": 4}), x, x_ptr=x, rows=3)
    assert kernel.launched == [((7,), {"x_ptr": x, "rows": 3, "BLOCK": 64, "num_warps": 4})]


def test_the_device_of_a_plan() -> None:
    assert define.device_for(torch.ones(1), 12) == Device("cpu", 12, 12)


def test_every_op_is_documented_and_has_a_fake_kernel() -> None:
    ops = define.triton_ops()
    assert {"rms_norm", "add_rms_norm", "layer_norm", "l2_norm", "dynamic_quantize", "rms_norm_quant"} <= ops.keys()
    for name, op in ops.items():
        assert op.name == name
        assert str(op.overload) == f"npu_fusion_triton.{name}.default"
        assert op.doc.splitlines()[0].endswith(".")
        for dispatch in ("Meta", *define.KINDS.values()):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu_fusion_triton::{name}", dispatch), (name, dispatch)


def test_what_is_asked_for_twice_is_a_copy() -> None:
    define.triton_ops().clear()
    assert "rms_norm" in define.triton_ops()


def test_an_op_is_one_node_of_a_compiled_graph() -> None:
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    rms_norm = define.triton_ops()["rms_norm"]
    x = torch.randn(2, 8)
    compiled = torch.compile(lambda x: torch.ops.npu_fusion_triton.rms_norm(x, None, 1e-6, cores=4) + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), rms_norm(x, None, 1e-6, cores=4) + 1)
    [graph] = graphs
    assert [node.target for node in graph.graph.nodes].count(torch.ops.npu_fusion_triton.rms_norm) == 1


# -------------------------------------------------------------------- checks


def test_names_of_dtypes() -> None:
    assert checks.name_of(torch.bfloat16) == "bf16"
    assert checks.name_of(torch.float32) is checks.name_of(None) is None


def test_dtypes_are_checked_by_name() -> None:
    checks.check_dtypes("op", checks.FLOATS, x=torch.ones(1), y=None)
    with pytest.raises(TypeError, match=r"op: y must be one of float16, bfloat16, not torch\.float32"):
        checks.check_dtypes("op", checks.HALVES, x=None, y=torch.ones(1))


def test_tensors_lie_on_one_device_that_has_kernels() -> None:
    checks.check_together("op", x=torch.ones(1), y=None)
    checks.check_together("op", x=torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="op: x, y must lie on one device, not cpu, meta"):
        checks.check_together("op", x=torch.ones(1), y=torch.ones(1, device="meta"))


@pytest.mark.parametrize(
    ("x", "stride", "copied"),
    [
        (torch.arange(24.0).view(2, 3, 4), 4, False),
        (torch.arange(48.0).view(2, 3, 8)[..., 2:6], 8, False),
        (torch.arange(48.0).view(6, 8)[:3, :4], 8, False),
        (torch.arange(48.0).view(2, 6, 4)[:, :3], 4, True),
        (torch.arange(24.0).view(4, 6).T, 4, True),
        (torch.arange(4.0), 4, False),
        (torch.arange(4.0)[:, None].expand(4, 3), 3, True),
        (torch.arange(4.0).expand(3, 4), 0, False),
    ],
    ids=["dense", "columns", "rows of a matrix", "uneven", "transposed", "one row", "a column repeated", "a row repeated"],
)
def test_rows(x: Tensor, stride: int, copied: bool) -> None:
    rows = checks.as_rows(x)
    assert torch.equal(rows, x.reshape(-1, x.shape[-1]))
    assert rows.stride(-1) == 1
    assert rows.shape[0] == 1 or rows.stride(0) == stride
    assert (rows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) == copied


def test_rows_of_another_width() -> None:
    x = torch.arange(24.0).view(2, 12)
    assert torch.equal(checks.as_rows(x, 4), x.view(6, 4))


def test_rows_too_far_apart_for_32_bits_are_copied() -> None:
    far = torch.empty_strided((3, 4), (2**20, 1))
    assert checks.as_rows(far).stride(0) == 4
    assert checks.as_rows(far[:1]).data_ptr() == far.data_ptr()


def test_vectors_are_in_one_piece() -> None:
    x = torch.arange(8.0)
    assert checks.as_vector(None) is None
    assert checks.as_vector(x) is x
    every_other = checks.as_vector(x[::2])
    assert every_other is not None
    assert every_other.is_contiguous()
    assert every_other.tolist() == [0, 2, 4, 6]


# -------------------------------------------------------------------- provide


@pytest.fixture
def _no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton cannot be found."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    provide.has_backend.cache_clear()
    yield
    provide.has_backend.cache_clear()


@pytest.mark.usefixtures("_no_triton")
def test_without_triton_nothing_is_registered() -> None:
    assert not package.load()
    assert not provide.has_backend("cuda")


def test_with_triton_every_family_is() -> None:
    assert package.load()
    for family in package.FAMILIES:
        assert f"{package.__name__}.{family}" in sys.modules


def test_which_compilers_triton_has() -> None:
    assert provide.has_backend("cuda")
    assert not provide.has_backend("npu")


def test_on_a_cpu_only_the_interpreter_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert provide.available(CPU, dry_run=False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not provide.available(CPU, dry_run=False)
    assert provide.available(CPU, dry_run=True)
    assert provide.available(CUDA, dry_run=False)
    assert not provide.available(FusionConfig(target="ascend910b"), dry_run=False)


def test_without_the_interpreter_a_cpu_is_no_business_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = lower_call(lambda x: l2_norm(x, 1e-6), torch.ones(2, 4), target="cuda")
    assert (found.provider, found.reason) == (REFERENCE, "")


def test_cores_of_a_target_that_is_not_here() -> None:
    assert provide.cores_of(CUDA, dry_run=True) == (132, 132)
    assert provide.cores_of(FusionConfig(target="ascend910_93"), dry_run=True) == (40, 20)
    assert provide.cores_of(CPU, dry_run=False) == (132, 132)


def test_rank_behind_the_ops_of_ascend() -> None:
    for target in ("ascend910b", "ascend910_93", "ascend950"):
        names = [provider.name for provider in providers_of("rms_norm", target)]
        assert names[-1] == "triton.rms_norm"
        assert len(names) > 1
    assert next(provider.name for provider in providers_of("rms_norm", "cuda")) == "triton.rms_norm"


class Asked:
    """Stands for a builder: of an H100 that is only shown, or of an NPU that a kernel is to run on."""

    def __init__(self, config: FusionConfig, dry_run: bool) -> None:
        self.config, self.dry_run = config, dry_run

    def require(self, condition: bool, reason: str) -> None:
        if not condition:
            raise Refused(reason)

    def only_if(self, condition: bool) -> None:
        self.require(condition, "")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The providers that a test registers, which nobody else sees."""
    providers: list[Any] = []
    monkeypatch.setattr(provide, "register_provider", providers.append)
    return providers


def test_a_provider_gets_the_cores_that_its_kernels_use(registered: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provide, "cores_of", lambda config, dry_run: (40, 20))
    seen: list[int] = []
    for matrix in (False, True):
        provide.provides("l2_norm", "test", rank=3, matrix=matrix, launches=2)(lambda b, a, cores: seen.append(cores))
    for provider in registered:
        provider.lower(Asked(CUDA, dry_run=True), None)
    assert seen == [40, 40, 20, 20]
    assert [(p.targets[0], p.rank, p.launches) for p in registered[:2]] == [("cuda", 3, 2), ("ascend910b", 13, 2)]


def test_a_provider_without_a_compiler_says_so(registered: list[Any]) -> None:
    provide.provides("l2_norm", "test")(lambda b, a, cores: None)
    with pytest.raises(Refused, match="the installed Triton has no compiler for npu"):
        registered[1].lower(Asked(FusionConfig(target="ascend910b"), dry_run=False), None)
