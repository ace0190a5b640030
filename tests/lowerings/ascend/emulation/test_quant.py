"""CPU kernels of quantisation: their formulas, where they round, rows of zeros, fake kernels, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from npu_fusion.lowerings.ascend.emulation import EmulationError
from npu_fusion.lowerings.ascend.selftest import cases
from npu_fusion.lowerings.ascend.selftest.case import Case
from npu_fusion.lowerings.ascend.selftest.quant import cases as quant_cases
from tests.lowerings.ascend.checks import check_kernel
from tests.ops.checks import assert_same_metadata

npu = torch.ops.npu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_the_cases_are_in_the_self_test() -> None:
    assert {str(case) for case in quant_cases()} <= {str(case) for case in cases()}


@pytest.mark.parametrize("case", list(quant_cases()), ids=str)
def test_metadata(case: Case) -> None:
    """Fake kernels predict the results, static and symbolic; torch_npu's of the product compares sizes, and so is asked for static ones."""
    if case.op == "npu::npu_quant_matmul":
        with FakeTensorMode() as mode:
            given = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in case.arguments().items()}
            fake = npu.npu_quant_matmul(**given)
        assert_same_metadata(fake, npu.npu_quant_matmul(**case.arguments()))
        return
    overload = getattr(torch.ops.npu, case.op.split("::")[1]).default
    arguments = case.arguments()
    positional = [arguments.pop(spec.name, spec.default_value) for spec in overload._schema.arguments if not spec.kwarg_only]
    check_kernel(case.op, *positional, **arguments)


def test_dynamic_quant() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 127 / 64], [0.0, 0.0, 0.0, 0.0]]).half()
    q, scale = npu.npu_dynamic_quant(x)
    assert q.tolist() == [[64, -127, 32, 126], [0, 0, 0, 0]]  # 63.5 and 126.0: halves to even
    assert scale.tolist() == [pytest.approx(2 / 127), 0.0]
    smooth = torch.tensor([4.0, 1.0, 1.0, 1.0]).half()
    assert npu.npu_dynamic_quant(x, smooth_scales=smooth)[0][0].tolist() == [127, -64, 16, 63]


def test_quantize() -> None:
    x, scales = torch.tensor([[1.0, 2.5, -300.0]]), torch.tensor([2.0])
    assert npu.npu_quantize(x, scales, None, 12, -1, True).tolist() == [[0, 1, -128]]
    assert npu.npu_quantize(x, scales, None, 12, -1, False).tolist() == [[2, 5, -128]]
    zero = torch.tensor([3], dtype=torch.int32)
    assert npu.npu_quantize(x, scales, zero, 13, -1, True).tolist() == [[4, 4, 0]]  # 3.5, 4.25: the zero point is added before rounding


def test_add_rms_norm_dynamic_quant() -> None:
    x, r = torch.randn(3, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    gamma, smooth = (torch.rand(16) + 0.5).bfloat16(), (torch.rand(16) + 0.5).bfloat16()
    q1, q2, total, scale1, scale2 = npu.npu_add_rms_norm_dynamic_quant(x, r, gamma, smooth_scale1=smooth, smooth_scale2=gamma)
    exact = x.double() + r.double()
    y = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gamma.double()
    assert torch.equal(total, (x.float() + r.float()).bfloat16())
    for q, scale, factor in ((q1, scale1, smooth), (q2, scale2, gamma)):
        assert (q.double() * scale.double().unsqueeze(-1) - y * factor.double()).abs().max() <= 0.51 * scale.max()
    assert npu.npu_add_rms_norm_dynamic_quant(x, r, gamma)[1].shape == (0,)


def test_swiglu_quant_returns_the_factor() -> None:
    x = torch.randn(4, 32)
    q, factor = npu.npu_swiglu_quant(x, activate_left=True, quant_mode=1)
    y = torch.nn.functional.silu(x[:, :16]) * x[:, 16:]
    torch.testing.assert_close(factor, 127 / y.abs().amax(-1))
    torch.testing.assert_close(q.float() / factor.unsqueeze(-1), y, rtol=0, atol=float(0.51 / factor.min()))


def test_quant_matmul() -> None:
    x, w = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, 64), (64, 8)))
    scale, rows, bias = torch.rand(8), torch.rand(3), torch.randn(8)
    sums = x.long() @ w.long()
    assert torch.equal(npu.npu_quant_matmul(x, w, scale, output_dtype=3), sums.int())
    whole = torch.arange(8, dtype=torch.int32)
    y = npu.npu_quant_matmul(x, w, scale, pertoken_scale=rows, bias=whole, output_dtype=5)
    torch.testing.assert_close(y, ((sums + whole) * scale * rows[:, None]).half())
    y = npu.npu_quant_matmul(x, w, scale, bias=bias, output_dtype=15)
    torch.testing.assert_close(y, (sums * scale + bias).bfloat16())


X8, W8 = torch.ones(3, 64, dtype=torch.int8), torch.ones(64, 8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: npu.npu_dynamic_quant(torch.ones(2, 4)), "input must be float16, bfloat16"),
        (lambda: npu.npu_dynamic_quant(torch.ones(4).half()), "more than one dimension"),
        (lambda: npu.npu_dynamic_quant(torch.ones(2, 4).half(), dst_type=16), "int8 only"),
        (lambda: npu.npu_quantize(torch.ones(2, 4).half(), torch.ones(4), None, 12, -1, False), "dtypes must be equal"),
        (lambda: npu.npu_quantize(torch.ones(2, 4), torch.ones(2), None, 12, -1, True), "does not match the last dimension"),
        (lambda: npu.npu_swiglu_quant(torch.ones(2, 4)), "quant_mode=1"),
        (lambda: npu.npu_dequant_swiglu_quant(torch.ones(2, 64, dtype=torch.int32), quant_mode=1), "needs weight_scale"),
        (lambda: npu.npu_quant_matmul(X8, W8, torch.ones(8), output_dtype=5), "need pertoken_scale"),
        (lambda: npu.npu_quant_matmul(X8, W8, torch.ones(8)), "not output_dtype None"),
        (lambda: npu.npu_quant_matmul(X8, W8, torch.ones(3), output_dtype=15), r"scale must be \[1\] or \[8\]"),
    ],
)
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        call()
