"""Normalisations on Ascend: which provider takes a call, why another does not, and the numbers of what it becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion import FusionConfig
from npu_fusion.lower import REFERENCE
from npu_fusion.ops.norm import add_rms_norm, l2_norm, layer_norm, rms_norm
from npu_fusion.semantic import SemanticOp
from tests.lowerings.ascend.checks import DTYPES, Lowered, lower_and_check, lower_call
from tests.parameters import dtypes_and_shapes
from tests.patterns.support import fused_within_contract

SIZE, EPS = 32, 1e-3
BF16, FP16, FP32 = DTYPES
TYPES = ("round_dtype", "out_dtype", "sum_dtype")
EXACT = {"rounding": "exact"}


def lowered(
    op: SemanticOp, *positional: Any, tensors: dict[str, Tensor], config: Any = None, dynamic: bool = False, **arguments: Any
) -> Lowered:
    """A call of `op` with tensors and other arguments by name, lowered and held to the numeric contract."""
    names = list(tensors)

    def call(options: dict[str, Any]) -> Callable[..., Any]:
        return lambda *values: op(*positional, **dict(zip(names, values)), **options)

    exact = {name: value for name, value in arguments.items() if name not in TYPES}
    return lower_and_check(call(arguments), call(exact), *tensors.values(), dynamic=dynamic, **(config or {}))


def rms(dtype: torch.dtype = BF16, *, weight: torch.dtype | None = BF16, gate: torch.dtype | None = None, **arguments: Any) -> Lowered:
    """rms_norm of [2, 3, SIZE]; `weight` and `gate` are dtypes, or None for none."""
    tensors = {"x": torch.randn(2, 3, SIZE, dtype=dtype)}
    if weight is not None:
        tensors["weight"] = 1 + 0.2 * torch.randn(SIZE, dtype=weight)
    else:
        arguments["weight"] = None
    if gate is not None:
        tensors["gate"] = torch.randn(2, 3, SIZE, dtype=gate)
    return lowered(rms_norm, tensors=tensors, eps=EPS, **arguments)


def add(
    dtype: torch.dtype = BF16,
    *,
    residual: torch.dtype | None = None,
    weight: torch.dtype | None = BF16,
    bias: bool = False,
    **arguments: Any,
) -> Lowered:
    """add_rms_norm of [2, 3, SIZE]; `residual` and `weight` are dtypes."""
    tensors = {"x": torch.randn(2, 3, SIZE, dtype=dtype), "residual": torch.randn(2, 3, SIZE, dtype=residual or dtype)}
    if weight is not None:
        tensors["weight"] = 1 + 0.2 * torch.randn(SIZE, dtype=weight)
    else:
        arguments["weight"] = None
    if bias:
        tensors["bias"] = torch.randn(SIZE, dtype=dtype)
    return lowered(add_rms_norm, tensors=tensors, eps=EPS, **arguments)


# -------------------------------------------------------------------- rms_norm


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_is_one_launch(dtype: torch.dtype, offset: int, dynamic: bool) -> None:
    found = rms(dtype, weight=dtype, weight_offset=offset, dynamic=dynamic)
    assert (found.provider, found.reason) == (("npu.npu_rms_norm", "npu.npu_gemma_rms_norm")[offset], "")
    assert found.targets() == [found.provider]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_float32_weight_beside_16_bits(dtype: torch.dtype) -> None:
    assert rms(dtype, weight=FP32).targets() == ["npu.npu_rms_norm"]
    gemma = rms(dtype, weight=FP32, weight_offset=1)
    assert gemma.provider == "npu.npu_rms_norm"
    assert "npu.npu_gemma_rms_norm: " in gemma.reason
    assert "they must have one dtype" in gemma.reason


def test_a_weight_of_another_16_bit_dtype() -> None:
    found = rms(FP16, weight=BF16)
    assert found.targets() == ["aten._to_copy", "aten._to_copy", "npu.npu_rms_norm", "aten._to_copy"]
    assert "gamma is bfloat16, not float16 or float32" in found.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_weight_is_a_constant_of_ones(dtype: torch.dtype) -> None:
    found = rms(dtype, weight=None)
    assert found.targets() == ["npu.npu_rms_norm"]
    [constant] = found.gm.buffers()
    assert torch.equal(constant, torch.ones(SIZE, dtype=dtype))


def test_no_weight_and_a_symbolic_width() -> None:
    found = rms(weight=None, dynamic=True)
    assert found.provider == REFERENCE
    assert "the last dimension is symbolic, and the norm has no weight" in found.reason


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "ops"),
    [
        (BF16, FP32, ["aten._to_copy", "aten._to_copy", "npu.npu_rms_norm"]),
        (FP32, BF16, ["aten._to_copy", "npu.npu_rms_norm", "aten._to_copy"]),
    ],
    ids=["wider", "narrower"],
)
def test_a_result_of_another_dtype(dtype: torch.dtype, out_dtype: torch.dtype, ops: list[str]) -> None:
    assert rms(dtype, out_dtype=out_dtype).targets() == ops


@pytest.mark.parametrize("offset", [0, 1])
def test_rounding_before_the_weight(offset: int) -> None:
    """The ops keep fp32 there: what the model rounds they may keep, unless rounding is exact."""
    assert rms(round_dtype=BF16, weight_offset=offset).reason == ""
    exact = rms(round_dtype=BF16, weight_offset=offset, config=EXACT)
    assert exact.provider == REFERENCE
    assert "it keeps the normalised x before the weight in fp32, the model rounds it to torch.bfloat16: rounding is 'exact'" in exact.reason
    assert rms(weight_offset=offset, config=EXACT).reason == ""


def test_rounding_before_no_weight_is_the_end() -> None:
    assert rms(weight=None, round_dtype=BF16, config=EXACT).reason == ""
    assert add(FP32, weight=None, round_dtype=FP32, config=EXACT).reason == ""
    assert rms(weight=None, gate=BF16, round_dtype=BF16, config=EXACT).provider == REFERENCE
    assert rms(weight=None, round_dtype=BF16, out_dtype=FP32, config=EXACT).provider == REFERENCE


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("first", [False, True], ids=["gate last", "gate first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_norm(dtype: torch.dtype, first: bool, activation: str) -> None:
    found = rms(dtype, weight=dtype, gate=dtype, gate_first=first, gate_activation=activation)
    assert found.provider == "npu.npu_rms_norm"
    assert "npu.npu_rms_norm: it does not take gate=a tensor" in found.reason
    products = [op for op in found.targets() if op != "aten._to_copy"]
    norm, gate = ["npu.npu_rms_norm"], [f"aten.{activation}"]
    assert products == [*gate, "aten.mul", *norm] if first else [*gate, *norm, "aten.mul"]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_channels(dtype: torch.dtype, offset: int) -> None:
    found = rms(dtype, weight=dtype, group_size=8, weight_offset=offset)
    assert found.provider == "npu.npu_rms_norm"
    assert "npu.npu_rms_norm" in found.targets()
    assert rms(dtype, weight=None, group_size=8).provider == "npu.npu_rms_norm"


def test_groups_of_a_symbolic_width() -> None:
    found = rms(group_size=8, dynamic=True)
    assert found.provider == REFERENCE
    assert "the last dimension is symbolic, and the norm goes over groups of it" in found.reason


def test_float64_stays_the_reference() -> None:
    x, weight = torch.randn(3, SIZE, dtype=torch.float64), torch.randn(SIZE, dtype=torch.float64)
    for call in (
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: add_rms_norm(x, x, w, EPS)[0],
        lambda x, w: layer_norm(x, w, None, EPS),
        lambda x, w: l2_norm(x, EPS),
    ):
        found = lower_call(call, x, weight)
        assert found.provider == REFERENCE, found.targets()
        assert "float64" in found.reason


def test_the_result_is_stored_as_x_is() -> None:
    x, weight = torch.randn(SIZE, 3).T, torch.randn(SIZE)
    found = lower_and_check(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm(x, w, EPS), x, weight)
    assert found.provider == "npu.npu_rms_norm"


# -------------------------------------------------------------------- add_rms_norm


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_add_rms_norm_of_float32(dynamic: bool) -> None:
    found = add(FP32, weight=FP32, dynamic=dynamic)
    assert found.targets() == ["npu.npu_add_rms_norm"]


@dtypes_and_shapes([BF16, FP16])
def test_what_the_model_rounds_before_the_weight_decides(dtype: torch.dtype, dynamic: bool) -> None:
    rounded = add(dtype, weight=dtype, round_dtype=dtype, dynamic=dynamic)
    assert rounded.targets() == ["npu.npu_add_rms_norm"]
    kept = add(dtype, weight=dtype, dynamic=dynamic)
    assert kept.targets() == ["npu.npu_add_rms_norm_cast"]
    assert f"npu.npu_add_rms_norm: it rounds the normalised sum before the weight to {dtype}, the model keeps it in fp32" in kept.reason


@pytest.mark.parametrize(
    ("dtype", "arguments", "provider"),
    [
        (BF16, {"norm_unrounded": True, "round_dtype": BF16}, "npu.npu_add_rms_norm"),
        (BF16, {"norm_unrounded": True}, "npu.npu_add_rms_norm_cast"),
        (BF16, {"round_dtype": BF16}, "aten.add + npu.npu_rms_norm"),
        (FP16, {"round_dtype": FP16}, "npu.npu_add_rms_norm"),
        (FP16, {}, "npu.npu_add_rms_norm_cast"),
    ],
    ids=["bf16", "bf16, weight in fp32", "bf16, sum rounded", "fp16", "fp16, weight in fp32"],
)
def test_exact_rounding(dtype: torch.dtype, arguments: dict[str, Any], provider: str) -> None:
    """In bf16 the op normalises the sum before it is rounded, in fp16 after."""
    found = add(dtype, weight=dtype, config=EXACT, **arguments)
    if provider.startswith("aten"):  # npu_rms_norm does not round before the weight: nothing does as the model
        assert found.provider == REFERENCE
        assert "it keeps the sum that is normalised in fp32" in found.reason
    else:
        assert found.provider == provider


def test_float16_normalises_the_rounded_sum() -> None:
    found = add(FP16, weight=FP16, norm_unrounded=True, round_dtype=FP16)
    assert found.provider == REFERENCE
    assert "it rounds the sum that is normalised to torch.float16, the model keeps it in fp32" in found.reason
    assert "the model normalises the sum before it is rounded" in found.reason


def test_sum_and_norm_apart() -> None:
    gemma = add(weight_offset=1)
    assert gemma.provider == "aten.add + npu.npu_gemma_rms_norm"
    assert gemma.targets() == ["aten.add", "npu.npu_gemma_rms_norm"]
    mixed = add(BF16, residual=FP32)
    assert mixed.provider == "aten.add + npu.npu_rms_norm"
    assert "npu.npu_add_rms_norm: x is torch.bfloat16, the residual torch.float32" in mixed.reason
    wide = add(weight=FP32)
    assert wide.targets() == ["aten.add", "npu.npu_rms_norm"]
    biased = add(bias=True)
    assert biased.provider == "aten.add + npu.npu_rms_norm"
    assert "it does not take bias=a tensor" in biased.reason


def test_a_sum_or_result_of_another_dtype() -> None:
    assert add(BF16, sum_dtype=FP32).provider == "aten.add + npu.npu_rms_norm"
    assert add(BF16, out_dtype=FP32).provider == "aten.add + npu.npu_rms_norm"
    assert add(FP32, weight=FP32, sum_dtype=BF16).provider == "aten.add + npu.npu_rms_norm"
    assert "it gives the sum in torch.bfloat16, the model in torch.float32" in add(BF16, sum_dtype=FP32).reason


def test_a_wider_sum_is_not_rounded_on_the_way() -> None:
    x, residual, weight = torch.randn(4, SIZE, dtype=BF16), torch.randn(4, SIZE, dtype=BF16), torch.randn(SIZE, dtype=BF16)
    found = lower_call(lambda x, r, w: add_rms_norm(x, r, w, EPS, sum_dtype=FP32), x, residual, weight)
    assert torch.equal(found.gm(x, residual, weight)[1], x.float() + residual.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_weight(dtype: torch.dtype) -> None:
    assert add(dtype, weight=None, round_dtype=None if dtype == FP32 else dtype).provider == "npu.npu_add_rms_norm"


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_result_is_used(used: int) -> None:
    def call(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        result: Tensor = add_rms_norm(x, y, w, EPS, round_dtype=x.dtype if x.dtype != torch.float64 else None)[used]
        return result

    inputs = (torch.randn(3, SIZE, dtype=BF16), torch.randn(3, SIZE, dtype=BF16), torch.randn(SIZE, dtype=BF16))
    assert lower_and_check(call, call, *inputs).targets() == ["npu.npu_add_rms_norm"]


# -------------------------------------------------------------------- layer_norm


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("affine", ["", "weight", "bias", "weight bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_is_one_launch(dtype: torch.dtype, affine: str, dynamic: bool) -> None:
    tensors = {"x": 1 + torch.randn(2, 3, SIZE, dtype=dtype), **{name: torch.randn(SIZE, dtype=dtype) for name in affine.split()}}
    missing = {name: None for name in ("weight", "bias") if name not in tensors}
    found = lowered(layer_norm, tensors=tensors, eps=EPS, dynamic=dynamic, **missing)
    assert (found.provider, found.reason) == ("aten.native_layer_norm", "")
    assert [op for op in found.targets() if op != "aten.sym_size"] == ["aten.native_layer_norm"]


def of_layer(dtype: torch.dtype, weight: torch.dtype, bias: torch.dtype, **arguments: Any) -> Lowered:
    tensors = {"x": torch.randn(4, SIZE, dtype=dtype), "weight": torch.randn(SIZE, dtype=weight), "bias": torch.randn(SIZE, dtype=bias)}
    return lowered(layer_norm, tensors=tensors, eps=EPS, **arguments)


def test_weight_and_bias_of_layer_norm_have_the_dtype_of_x_or_float32() -> None:
    assert of_layer(BF16, FP32, FP32).targets() == ["aten.native_layer_norm"]
    assert of_layer(BF16, BF16, FP32).targets() == ["aten._to_copy", "aten.native_layer_norm"]
    assert of_layer(FP32, BF16, BF16).targets() == ["aten._to_copy", "aten._to_copy", "aten.native_layer_norm"]


def test_layer_norm_of_another_dtype() -> None:
    assert of_layer(BF16, BF16, BF16, out_dtype=FP32).targets()[-1] == "aten.native_layer_norm"
    assert of_layer(FP32, FP32, FP32, out_dtype=BF16).targets() == ["aten.native_layer_norm", "aten._to_copy"]


def test_rounding_of_layer_norm() -> None:
    assert of_layer(BF16, BF16, BF16, round_dtype=BF16).provider == "aten.native_layer_norm"
    assert of_layer(BF16, BF16, BF16, round_dtype=BF16, config=EXACT).provider == REFERENCE
    assert of_layer(BF16, BF16, BF16, config=EXACT).provider == "aten.native_layer_norm"


# -------------------------------------------------------------------- l2_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_l2_norm_is_an_rms_norm(dtype: torch.dtype, scale: float) -> None:
    found = lowered(l2_norm, tensors={"x": torch.randn(2, 3, SIZE, dtype=dtype)}, eps=EPS, scale=scale)
    assert (found.provider, found.reason) == ("npu.npu_rms_norm", "")
    assert found.targets() == ["npu.npu_rms_norm"]


def test_l2_norm_of_short_vectors_depends_on_eps() -> None:
    lowered(l2_norm, tensors={"x": 1e-2 * torch.randn(2, SIZE)}, eps=0.5)


def test_l2_norm_whose_eps_is_a_limit() -> None:
    found = lowered(l2_norm, tensors={"x": torch.randn(2, SIZE)}, eps=EPS, eps_mode="max")
    assert found.provider == REFERENCE
    assert "eps is a lower limit of the divisor there" in found.reason


def test_l2_norm_of_a_symbolic_width() -> None:
    found = lowered(l2_norm, tensors={"x": torch.randn(2, SIZE)}, eps=EPS, dynamic=True)
    assert found.provider == REFERENCE
    assert "the last dimension is symbolic, and the weight depends on it" in found.reason


# -------------------------------------------------------------------- whole modules, as models write them


class Norms(nn.Module):
    """Pre-norm residual blocks: two norms, the second of a sum."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.linear = norm(), norm(), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(self.first(x))
        return x + self.second(x)


class LlamaNorm(nn.Module):
    def __init__(self, offset: int = 0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(SIZE)), offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        if self.offset:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


@dtypes_and_shapes([BF16, FP16])
@pytest.mark.parametrize(
    ("norm", "providers"),
    [
        (LlamaNorm, {"npu.npu_rms_norm", "npu.npu_add_rms_norm"}),
        (lambda: LlamaNorm(1), {"npu.npu_gemma_rms_norm", "aten.add + npu.npu_gemma_rms_norm"}),
        (lambda: nn.RMSNorm(SIZE, eps=EPS), {"npu.npu_rms_norm", "npu.npu_add_rms_norm_cast"}),
        (lambda: nn.LayerNorm(SIZE, eps=EPS), {"aten.native_layer_norm"}),
    ],
    ids=["llama", "gemma", "nn.RMSNorm", "nn.LayerNorm"],
)
def test_norms_of_models(norm: Callable[[], nn.Module], providers: set[str], dtype: torch.dtype, dynamic: bool) -> None:
    config = FusionConfig(target="ascend910b", emulate=True)
    report = fused_within_contract(Norms(norm).to(dtype), torch.randn(2, 5, SIZE, dtype=dtype), dynamic=dynamic, config=config)
    assert {site.lowered_to for site in report.sites if site.fused} == providers
