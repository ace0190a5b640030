"""The choice of experts against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.triton import load
from tests.ops.checks import check_op

pytest.importorskip("triton")
load()
from npu_fusion.kernels.gating import moe_gating_launch  # noqa: E402
from npu_fusion.kernels.launch import Device  # noqa: E402
from npu_fusion.lowerings.triton.gating import moe_gating  # noqa: E402

CORES = 4
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "mixtral": (8, 2, {"renormalize": True}),
    "qwen2_moe": (60, 4, {}),
    "qwen3_moe": (128, 8, {"renormalize": True}),
    "gpt_oss": (32, 4, {"score_first": False}),
    "llama4": (16, 1, {"score": "sigmoid", "score_first": False}),
    "glm4_moe": (160, 8, {"score": "sigmoid", "bias": True, "renormalize": True, "eps": 1e-20, "scale": 2.5}),
    "deepseek_v2": (40, 6, {"groups": 8, "top_groups": 3, "excluded": 0.0, "scale": 16.0}),
    "deepseek_v3": (
        64,
        8,
        {"score": "sigmoid", "bias": True, "groups": 8, "top_groups": 4, "group_score": "top2", "renormalize": True, "eps": 1e-20},
    ),
    "deepseek_v4": (96, 6, {"score": "sqrt_softplus", "bias": True, "renormalize": True, "scale": 1.5}),
    "odd": (7, 7, {"score": "sigmoid", "renormalize": True, "eps": 0.125}),
    "one": (1, 1, {}),
}


def _score(x: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return x.softmax(-1)
    return x.sigmoid() if score == "sigmoid" else torch.nn.functional.softplus(x).sqrt()


def _choice(
    logits: Tensor,
    *,
    bias: Tensor | None = None,
    score: str = "softmax",
    score_first: bool = True,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    excluded: float | None = None,
    **_: Any,
) -> Tensor:
    """What is chosen by, in float64."""
    x = logits.double()
    choice = (_score(x, score) if score_first else x) + (0 if bias is None else bias.double())
    if top_groups < groups:
        parts = choice.unflatten(-1, (groups, -1))
        value = parts.amax(-1) if group_score == "max" else parts.topk(2).values.sum(-1)
        best = value.sort(stable=True, descending=True).indices[:, :top_groups]
        among = torch.zeros_like(value, dtype=torch.bool).scatter(-1, best, True)
        choice = parts.where(among[..., None], float("-inf") if excluded is None else excluded).flatten(-2)
    return choice


def _weights(
    logits: Tensor,
    indices: Tensor,
    *,
    score: str = "softmax",
    score_first: bool = True,
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    **_: Any,
) -> Tensor:
    """Weights of the experts that were chosen, in float64."""
    x, at = logits.double(), indices.long()
    weights = _score(x, score).gather(-1, at) if score_first else _score(x.gather(-1, at), score)
    return (weights / (weights.sum(-1, keepdim=True) + eps) if renormalize else weights) * scale


def _distinct(rows: int, experts: int, dtype: torch.dtype, device: str) -> Tensor:
    """Logits that differ by a sixteenth or more within a row."""
    order = torch.rand(rows, experts, device=device).argsort(-1)
    return ((order - experts // 2) / 16).to(dtype)


def _arguments(name: str, device: str) -> tuple[int, int, dict[str, Any]]:
    experts, k, options = ROUTERS[name]
    bias = torch.randn(experts, device=device) if options.get("bias") else None
    return experts, k, {**options, "bias": bias}


def _check(logits: Tensor, k: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The chosen are the best, in falling order, and weighted right."""
    weights, indices, _scores = moe_gating(logits, k, **options, cores=CORES)
    assert (weights.dtype, indices.dtype) == (torch.float32, torch.int32)
    assert weights.shape == indices.shape == (logits.shape[0], k)
    choice = _choice(logits, **options)
    torch.testing.assert_close(choice.gather(-1, indices.long()), choice.topk(k).values, rtol=2e-6, atol=2e-6)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(weights.double(), _weights(logits, indices, **options), rtol=5e-6, atol=1e-7)
    return weights, indices


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_of_models(name: str, device: str) -> None:
    torch.manual_seed(0)
    experts, k, options = _arguments(name, device)
    _, indices = _check(_distinct(5, experts, torch.float32, device), k, options)
    assert indices.shape == (5, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_and_weights(dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(3, 20, device=device).to(dtype)
    weights, indices, _ = moe_gating(logits, 3, renormalize=True, weights_dtype=dtype, cores=CORES)
    assert weights.dtype == dtype
    exact = _weights(logits, indices, renormalize=True)
    assert (weights.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.max()


def test_scores_are_those_of_all_experts(device: str) -> None:
    logits = torch.randn(3, 20, device=device)
    for score in ("softmax", "sigmoid", "sqrt_softplus"):
        *_, scores = moe_gating(logits, 2, score=score, return_scores=True, cores=CORES)
        torch.testing.assert_close(scores.double(), _score(logits.double(), score), rtol=2e-6, atol=1e-7)
    assert moe_gating(logits, 2, cores=CORES)[2].shape == (0, 20)


def test_sqrt_softplus_of_very_negative_logits_is_not_zero(device: str) -> None:
    logits = torch.tensor([[-30.0, -20.0, -9.0, -2.0, 30.0]], device=device)
    *_, scores = moe_gating(logits, 1, score="sqrt_softplus", return_scores=True, cores=CORES)
    torch.testing.assert_close(scores.double(), _score(logits.double(), "sqrt_softplus"), rtol=2e-6, atol=0)


def test_rounded_scores_tie_as_they_do_in_the_model(device: str) -> None:
    """Two sigmoids that are one number in bf16: the lower index is chosen, though its logit is the smaller."""
    logits = torch.tensor([[0.0, 6.0, 6.1, -1.0]], device=device)
    assert moe_gating(logits, 1, score="sigmoid", cores=CORES)[1].item() == 2
    weights, indices, _ = moe_gating(logits, 1, score="sigmoid", round_dtype=torch.bfloat16, cores=CORES)
    assert indices.item() == 1
    assert weights.item() == torch.tensor(6.0).sigmoid().bfloat16().item()


def test_ties_go_to_the_lower_index(device: str) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]], device=device).expand(2, 6)
    assert moe_gating(logits, 5, cores=CORES)[1].tolist() == [[1, 3, 4, 0, 2]] * 2
    grouped = moe_gating(logits, 2, score="sigmoid", groups=3, top_groups=1, cores=CORES)[1]
    assert grouped.tolist() == [[1, 0]] * 2


def test_excluded_experts_count_as_asked(device: str) -> None:
    """With a negative bias inside the best group, an excluded expert that counts as 0 is better, one that counts as nothing is not."""
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]], device=device)
    bias = torch.tensor([0.0, -3.0, 0.0, 0.0], device=device)
    options: dict[str, Any] = {"score": "sigmoid", "bias": bias, "groups": 2, "top_groups": 1, "cores": CORES}
    assert moe_gating(logits, 2, **options)[1].tolist() == [[0, 1]]
    assert moe_gating(logits, 2, excluded=0.0, **options)[1].tolist() == [[0, 2]]


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_numbers_stay_in_range_and_by_themselves(name: str, bad: float, device: str) -> None:
    torch.manual_seed(1)
    experts, k, options = _arguments(name, device)
    logits = _distinct(4, experts, torch.float32, device)
    clean_weights, clean_indices, _ = moe_gating(logits, k, **options, cores=CORES)
    logits[1, 3] = bad
    logits[2] = bad
    weights, indices, _ = moe_gating(logits, k, **options, cores=CORES)
    assert (indices >= 0).all()
    assert (indices < experts).all()
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    for row in (0, 3):
        assert torch.equal(weights[row], clean_weights[row])
        assert torch.equal(indices[row], clean_indices[row])


def test_a_nan_is_the_largest_and_shows(device: str) -> None:
    logits = torch.tensor([[0.0, 2.0, float("nan"), 1.0]], device=device)
    weights, indices, _ = moe_gating(logits, 2, score="sigmoid", cores=CORES)
    assert indices.tolist() == [[2, 1]]
    assert weights[0, 0].isnan()
    assert not weights[0, 1].isnan()


def test_strided_rows_and_columns(device: str) -> None:
    wide = torch.randn(6, 40, device=device)
    for logits in (wide[:, 3:23], wide[::2, 3:23], wide.t()[:20, :], wide[:, ::2]):
        assert torch.equal(moe_gating(logits, 3, cores=CORES)[1], moe_gating(logits.contiguous(), 3, cores=CORES)[1])


def test_no_rows(device: str) -> None:
    weights, indices, scores = moe_gating(torch.empty(0, 8, device=device), 2, return_scores=True, cores=CORES)
    assert (weights.shape, indices.shape, scores.shape) == ((0, 2), (0, 2), (0, 8))


def test_calls_are_bit_identical(device: str) -> None:
    logits = torch.randn(5, 20, device=device)
    first, second = (moe_gating(logits, 4, renormalize=True, cores=CORES)[:2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_the_fake_kernel_predicts_the_result(name: str, device: str) -> None:
    experts, k, options = _arguments(name, device)
    check_op(moe_gating, torch.randn(3, experts, device=device), k, **options, return_scores=True, cores=CORES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(8)}, ValueError, "logits must have 2 dimensions, not 1"),
        ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "logits must be one of float16, bfloat16, float32"),
        ({"logits": torch.zeros(2, 4096)}, ValueError, "at most 1024 experts, not 4096"),
        ({"k": 0}, ValueError, "k must be from 1 to 32: 0"),
        ({"k": 9}, ValueError, "k = 9 of 1 groups of 8 experts"),
        ({"k": 5, "groups": 2}, ValueError, "k = 5 of 1 groups of 4 experts"),
        ({"groups": 3}, ValueError, "8 experts do not fall into 3 equal groups"),
        ({"groups": 2, "top_groups": 3}, ValueError, "top_groups must be from 1 to groups: 3 of 2"),
        ({"score": "tanh"}, ValueError, "score must be one of 'softmax'"),
        ({"group_score": "sum"}, ValueError, "group_score must be one of 'max', 'top2'"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \[8\], not \[7\]"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, TypeError, "bias must be one of float16"),
        ({"weights_dtype": torch.int32}, ValueError, "weights_dtype must be one of float16"),
        ({"cores": 0}, ValueError, "cores must be positive: 0"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 8), "k": 2, "cores": CORES, **changes}
    logits, k = arguments.pop("logits"), arguments.pop("k")
    with pytest.raises(error, match=message):
        moe_gating(logits, k, **arguments)


def test_every_option_is_documented() -> None:
    parameters = set(inspect.signature(moe_gating).parameters) - {"logits", "k"}
    assert all(name in moe_gating.doc for name in parameters)


@pytest.mark.parametrize("rows", [1, 4096, 65537])
def test_on_a_gpu_a_row_has_a_warp_of_its_own(rows: int) -> None:
    plan = moe_gating_launch(rows, 64, 8, Device("cuda", 4, 4), groups=8, top_groups=4)
    assert (plan.grid, plan.constants["ROWS"], plan.options) == (rows, 1, {"num_warps": 1})


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 4096, 65537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [8, 60, 64, 128, 160, 256, 384, 512])
def test_all_sizes(experts: int, dtype: torch.dtype, rows: int, device: str) -> None:
    torch.manual_seed(2)
    logits = torch.randn(rows, experts, device=device).to(dtype)
    for k in (2, 8):
        _check(logits, k, {"renormalize": True})
        _check(logits, k, {"score": "sigmoid", "bias": torch.randn(experts, device=device)})
    if experts % 8 == 0 and experts >= 64:
        bias = torch.randn(experts, device=device)
        _, indices = _check(logits, 8, {"score": "sigmoid", "bias": bias, "groups": 8, "top_groups": 4, "group_score": "top2"})
        assert ((indices // (experts // 8)).sort(-1).values.diff(dim=-1) > 0).sum(-1).max() < 4
