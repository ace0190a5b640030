"""Causal depthwise convolution against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.triton import load
from tests.ops.checks import check_op

pytest.importorskip("triton")
load()
from npu_fusion.kernels import conv1d as kernels  # noqa: E402
from npu_fusion.kernels.launch import Device  # noqa: E402
from npu_fusion.lowerings.triton.conv1d import causal_conv1d, causal_conv1d_update  # noqa: E402

CORES = 4
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _one(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """y and the new state of one sequence [S, C] from a state [L, C], in float64."""
    if len(x) == 0:
        return x.double(), state.double()
    full = torch.cat([state.double(), x.double()])
    taps, length = weight.shape[1], state.shape[0]
    seen = full[length - (taps - 1) :].t()[None]
    y = torch.nn.functional.conv1d(seen, weight.double()[:, None], None if bias is None else bias.double(), groups=x.shape[1])
    y = y[0].t()
    return (torch.nn.functional.silu(y) if activation == "silu" else y), full[len(full) - length :]


def _sequences(x: Tensor, bounds: Sequence[int] | None) -> list[Tensor]:
    return list(x) if bounds is None else [x[a:b] for a, b in pairwise(bounds)]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bounds: Sequence[int] | None = None,
    state: Tensor | None = None,
    slots: Sequence[int] | None = None,
    has_state: Sequence[bool] | None = None,
    from_state: bool = True,
    activation: str = "identity",
    update: bool = False,
) -> Tensor:
    """y and all states are right, and what is not written stays as it was. Returns y."""
    parts = _sequences(x, bounds)
    width = weight.shape[1] - 1
    expected, states = [], None if state is None else state.double()
    for i, part in enumerate(parts):
        slot = i if slots is None else slots[i]
        begins = from_state if has_state is None else has_state[i]
        before = x.new_zeros((width, x.shape[-1]) if states is None else states.shape[1:], dtype=torch.float64)
        if states is not None and slot >= 0 and begins:
            before = states[slot].clone()
        y, after = _one(part, weight, bias, before, activation)
        expected.append(torch.zeros_like(y) if slot < 0 else y)
        if states is not None and slot >= 0 and len(part):  # without tokens it stays, has_state or not
            states[slot] = after
    options: dict[str, Any] = {"slots": None if slots is None else torch.tensor(slots, device=x.device), "activation": activation}
    if update:
        assert state is not None
        actual = causal_conv1d_update(x, state, weight, bias, **options, cores=CORES)
    else:
        starts = None if bounds is None else torch.tensor(bounds, device=x.device, dtype=torch.int32)
        has = None if has_state is None else torch.tensor(has_state, device=x.device)
        actual = causal_conv1d(
            x, weight, bias, cu_seqlens=starts, state=state, has_state=has, from_state=from_state, **options, cores=CORES
        )
    exact = torch.stack(expected) if bounds is None else torch.cat(expected)
    assert (actual.shape, actual.dtype, actual.is_contiguous()) == (x.shape, x.dtype, True)
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(actual[: len(exact)].double(), exact, rtol=tolerance, atol=tolerance)
    if state is not None and states is not None:
        assert torch.equal(state, states.to(state.dtype))
    return actual


def _random(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float16), (5, torch.bfloat16), (40, torch.float32), (40, torch.bfloat16)])
def test_sequences_of_one_length(tokens: int, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = (_random(*shape, device=device, dtype=dtype) for shape in ((2, tokens, 20), (20, 4), (20,)))
    _check(x, weight, bias, activation="silu")


@pytest.mark.parametrize("taps", [2, 3, 8])
@pytest.mark.parametrize("tokens", [3, 70])
def test_filters_of_any_length(taps: int, tokens: int, device: str) -> None:
    x, weight = _random(1, tokens, 6, device=device), _random(6, taps, device=device)
    _check(x, weight, state=_random(1, taps - 1, 6, device=device))


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("from_state", [True, False])
def test_states_longer_than_the_filter(tokens: int, from_state: bool, device: str) -> None:
    """The state of transformers has as many tokens as the filter has taps."""
    x, weight = _random(2, tokens, 10, device=device), _random(10, 4, device=device)
    _check(x, weight, state=_random(2, 6, 10, device=device), from_state=from_state)


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 65],
        [0, 1, 2, 4, 7],
        [0, 29, 31, 33, 60, 62, 65],  # starts just before, at and after the multiples of the step of 30
        [0, 0, 5, 5, 70, 70],
    ],
)
def test_sequences_of_different_lengths(bounds: list[int], device: str) -> None:
    count = len(bounds) - 1
    x, weight, bias = _random(bounds[-1], 9, device=device), _random(9, 4, device=device), _random(9, device=device)
    if count == 1:
        _check(x, weight, bias, bounds=bounds, activation="silu")
    state = _random(count + 2, 3, 9, device=device)
    slots = torch.randperm(count + 2)[:count].tolist()
    _check(x, weight, bias, bounds=bounds, state=state, slots=slots, has_state=[i % 2 == 0 for i in range(count)])


def test_tokens_after_the_last_sequence_touch_nothing(device: str) -> None:
    x, weight = _random(70, 5, device=device), _random(5, 4, device=device)
    x[40:] = float("nan")
    state = _random(2, 3, 5, device=device)
    y = _check(x, weight, bounds=[0, 33, 40], state=state)
    assert y.shape == (70, 5)


@pytest.mark.parametrize("bounds", [None, [0, 4, 8, 12]])
def test_a_slot_below_zero_is_skipped(bounds: list[int] | None, device: str) -> None:
    x = _random(12, 6, device=device)
    weight, bias = _random(6, 4, device=device), _random(6, device=device)
    _check(x if bounds else x.unflatten(0, (3, 4)), weight, bias, bounds=bounds, state=_random(4, 3, 6, device=device), slots=[2, -1, 0])


@pytest.mark.parametrize("shape", [(3, 20), (3, 1, 20), (3, 4, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_updates(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight, bias = _random(*shape, device=device, dtype=dtype), _random(20, 4, device=device), _random(20, device=device)
    state = _random(5, 3, 20, device=device, dtype=torch.float32)
    if len(shape) == 2:
        y = _check(x[:, None], weight, bias, state=state.clone(), slots=[4, -1, 1], activation="silu", update=True)
        options: dict[str, Any] = {"slots": torch.tensor([4, -1, 1], device=device), "activation": "silu", "cores": CORES}
        assert torch.equal(causal_conv1d_update(x, state, weight, bias, **options), y[:, 0])
    else:
        _check(x, weight, bias, state=state, slots=[4, -1, 1], activation="silu", update=True)


def test_tokens_one_by_one_are_as_all_at_once(device: str) -> None:
    x, weight = _random(2, 9, 7, device=device), _random(7, 4, device=device)
    states = [torch.zeros(2, 3, 7, device=device) for _ in range(2)]
    whole = causal_conv1d(x, weight, state=states[0], activation="silu", cores=CORES)
    single = [causal_conv1d_update(x[:, t], states[1], weight, activation="silu", cores=CORES) for t in range(9)]
    torch.testing.assert_close(torch.stack(single, 1), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(*states)


def test_layouts(device: str) -> None:
    """Channels side by side, tokens side by side, neither; a state and weights in the layout of transformers and in the kernel's."""
    wide = _random(2, 50, 24, device=device)
    by_tokens = _random(2, 12, 40, device=device).transpose(1, 2)
    for x in (wide[:, :40, 3:15], by_tokens, wide[:, ::2, ::2]):
        state = _random(3, 12, 3, device=device).transpose(1, 2)
        _check(x, _random(4, 12, device=device).t(), _random(24, device=device)[::2], state=state, slots=[2, 0])
    _check(wide[0, :, 3:15], _random(12, 4, device=device), bounds=[0, 3, 50], state=_random(4, 5, 12, device=device)[::2, 1:4])


def test_the_sum_is_rounded_before_the_activation_where_the_model_rounds(device: str) -> None:
    x, weight = torch.full((1, 1, 1), 1 + 2**-9, device=device), torch.tensor([[0.0, 1.0]], device=device)
    options: dict[str, Any] = {"activation": "silu", "cores": CORES}
    assert causal_conv1d(x, weight, round_dtype=torch.bfloat16, **options).item() == pytest.approx(1 / (1 + torch.e**-1), abs=1e-6)
    assert causal_conv1d(x, weight, **options).item() > 1 / (1 + torch.e**-1) + 1e-3
    assert causal_conv1d(x, weight, out_dtype=torch.float16, **options).dtype == torch.float16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_reaches_no_other_sequence_and_no_earlier_token(bad: float, device: str) -> None:
    x, weight = _random(12, 5, device=device), _random(5, 4, device=device)
    starts, state = torch.tensor([0, 4, 8, 12], device=device), _random(3, 3, 5, device=device)
    clean = causal_conv1d(x, weight, cu_seqlens=starts, state=state.clone(), cores=CORES)
    x[6, 2], state[2, 2, 1] = bad, bad
    y = causal_conv1d(x, weight, cu_seqlens=starts, state=state, cores=CORES)
    wrong = torch.zeros_like(x, dtype=torch.bool)
    wrong[6:8, 2] = wrong[8:11, 1] = True
    assert torch.equal(y.isfinite(), ~wrong)
    assert torch.equal(y[~wrong], clean[~wrong])


def test_nothing_to_do(device: str) -> None:
    weight, state = _random(5, 4, device=device), _random(2, 3, 5, device=device)
    before = state.clone()
    assert causal_conv1d(_random(2, 0, 5, device=device), weight, state=state, cores=CORES).shape == (2, 0, 5)
    assert causal_conv1d_update(_random(0, 5, device=device), state[:0], weight, cores=CORES).shape == (0, 5)
    no_sequence = torch.zeros(1, dtype=torch.int32, device=device)
    assert causal_conv1d(_random(0, 5, device=device), weight, cu_seqlens=no_sequence, cores=CORES).shape == (0, 5)
    assert torch.equal(state, before)


def test_calls_are_bit_identical(device: str) -> None:
    x, weight, state = _random(2, 40, 6, device=device), _random(6, 4, device=device), _random(2, 3, 6, device=device)
    first, second = (causal_conv1d(x, weight, state=state.clone(), activation="silu", cores=CORES) for _ in range(2))
    assert torch.equal(first, second)


def test_the_fake_kernels_predict_the_results(device: str) -> None:
    x, weight, state = _random(2, 5, 6, device=device), _random(6, 4, device=device), _random(2, 3, 6, device=device)
    check_op(causal_conv1d, x, weight, state=state, activation="silu", out_dtype=torch.float16, cores=CORES)
    check_op(causal_conv1d, x[0], weight, cu_seqlens=torch.tensor([0, 2, 5], device=device), cores=CORES)
    check_op(causal_conv1d_update, x[:, 0], state, weight, slots=torch.tensor([1, 0], device=device), cores=CORES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(5, 6)}, ValueError, "x must have 3 dimensions, not 2"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "x must have 2 dimensions, not 3"),
        ({"x": torch.zeros(5, 6), "cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"x": torch.zeros(5, 6), "cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, "an element more"),
        ({"x": torch.zeros(2, 5, 6, dtype=torch.int8)}, TypeError, "x must be one of float16"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must have shape \[6, 4\], not \[5, 4\]"),
        ({"weight": torch.zeros(6, 1)}, ValueError, "weight must have 2 to 8 taps, not 1"),
        ({"weight": torch.zeros(6, 9)}, ValueError, "weight must have 2 to 8 taps, not 9"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \[6\], not \[5\]"),
        ({"state": torch.zeros(3, 3, 6)}, ValueError, r"state must have shape \[2, 3, 6\], not \[3, 3, 6\]"),
        ({"state": torch.zeros(2, 2, 6)}, ValueError, "state must hold 4 - 1 to 16 tokens, not 2"),
        ({"state": torch.zeros(2, 3, 6, dtype=torch.int32)}, TypeError, "state must be one of float16"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, ValueError, "slots needs state"),
        ({"slots": torch.zeros(3, dtype=torch.int32), "state": torch.zeros(4, 3, 6)}, ValueError, r"slots must have shape \[2\]"),
        ({"slots": torch.zeros(2), "state": torch.zeros(4, 3, 6)}, TypeError, "slots must be int32 or int64"),
        ({"has_state": torch.zeros(2, dtype=torch.bool)}, ValueError, "has_state needs state"),
        ({"has_state": torch.zeros(2), "state": torch.zeros(2, 3, 6)}, TypeError, "has_state must be bool"),
        ({"activation": "gelu"}, ValueError, "activation must be one of 'identity', 'silu', not 'gelu'"),
        ({"out_dtype": torch.int8}, ValueError, "out_dtype must be one of float16"),
        ({"cores": 0}, ValueError, "cores must be positive: 0"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4), "cores": CORES, **changes}
    positional = [arguments.pop(name) for name in ("x", "weight")]
    with pytest.raises(error, match=message):
        causal_conv1d(*positional, **arguments)


def test_arguments_of_an_update_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="x must have 2 or 3 dimensions, not 1"):
        causal_conv1d_update(torch.zeros(6), torch.zeros(2, 3, 6), torch.zeros(6, 4), cores=CORES)
    with pytest.raises(ValueError, match=r"state must have shape \[2, 3, 6\], not \[2, 3, 5\]"):
        causal_conv1d_update(torch.zeros(2, 6), torch.zeros(2, 3, 5), torch.zeros(6, 4), cores=CORES)


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_a_tile_holds_what_it_may_be_given(kind: str) -> None:
    """With different lengths a first tile reaches up to a step beyond where the filter leaves the state."""
    for taps in range(2, 9):
        plan = kernels.conv1d_launch(100, 3, 512, taps, Device(kind, 40, 20), varlen=True, weight_strides=(1, taps))
        step, rows = plan.constants["STEP"], plan.constants["ROWS"]
        assert 0 < step <= rows
        assert taps - 1 + step - 1 <= rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [1024, 5376, 8192, 10240, 18432])
def test_all_widths(channels: int, dtype: torch.dtype, device: str) -> None:
    weight, bias = _random(channels, 4, device=device, dtype=dtype), _random(channels, device=device, dtype=dtype)
    options: dict[str, Any] = {"activation": "silu"}
    for shape in ((1, 1), (16, 1), (3, 4), (2, 129)):
        state = _random(shape[0], 3, channels, device=device, dtype=dtype)
        x = _random(*shape, channels, device=device, dtype=dtype)
        _check(x, weight, bias, state=state, **options)
        _check(
            x.transpose(1, 2).contiguous().transpose(1, 2),
            weight,
            bias,
            state=state.transpose(1, 2).contiguous().transpose(1, 2),
            **options,
        )
    bounds = [0, 1, 3, 100, 129, 1001]
    _check(
        _random(1001, channels, device=device, dtype=dtype), weight, bounds=bounds, state=_random(5, 3, channels, device=device), **options
    )


@pytest.mark.gpu
@pytest.mark.parametrize("taps", [2, 3, 4, 8])
def test_many_tokens(taps: int, device: str) -> None:
    bounds = [0, *sorted(torch.randperm(65537)[:300].tolist()), 65537]
    weight, state = _random(64, taps, device=device), _random(301, taps - 1, 64, device=device)
    _check(_random(65537, 64, device=device), weight, bounds=bounds, state=state)


@pytest.mark.gpu
def test_states_are_replaced_in_place_by_many_threads(device: str) -> None:
    """No thread writes what another has not yet read."""
    weight = _random(8192, 4, device=device, dtype=torch.bfloat16)
    for _ in range(50):
        state = _random(64, 8, 8192, device=device, dtype=torch.bfloat16)
        _check(_random(64, 1, 8192, device=device, dtype=torch.bfloat16), weight, state=state, update=True)
