"""What only looks like a rotation is left alone, and reported with the reason where it has the marks of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.patterns.rope_checks import Rotate, arguments, inputs, llama, rotate_half
from tests.patterns.support import fused_within_contract


def halves_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x1, x2), -1) * sin


def nothing_negated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((x2, x1), -1) * sin


def both_negated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, -x1), -1) * sin


def parts_overlap(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 7:15], x[..., :8]), -1) * sin


def parts_unequal(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 6:], x[..., :6]), -1) * sin


def neighbours_as_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * sin


def halves_as_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.stack((-x2, x1), -1).flatten(-2) * sin


def even_and_odd_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2) * sin


def parts_of_another_tensor(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x + 1) * sin


def parts_rounded_otherwise(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x.bfloat16()).float() * sin


def across_the_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -2)
    return x * cos + torch.cat((-x2, x1), -2) * sin


def one_entry_for_all_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[..., :1] + rotate_half(x) * sin[..., :1]


def pairs_of_one_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), cos, sin = x.chunk(2, -1), cos[..., :8], sin[..., :8]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos - x1 * sin), -1)


def pairs_with_cos_and_sin_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), cos, sin = x.chunk(2, -1), cos[..., :8], sin[..., :8]
    return torch.cat((x1 * cos - x2 * sin, x2 * sin + x1 * cos), -1)


def pairs_with_two_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), cos, sin = x.chunk(2, -1), cos[..., :8], sin[..., :8]
    return torch.cat((x1 * cos - x2 * sin, x2 * (cos + 1) + x1 * (sin + 1)), -1)


def pairs_of_shifted_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos[..., :8] - x2 * sin[..., :8], x2 * cos[..., 4:12] + x1 * sin[..., 4:12]), -1)


def halves_written_as_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), cos, sin = x.chunk(2, -1), cos[..., :8], sin[..., :8]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)


def pairs_of_two_tensors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2, cos, sin = x[..., :8], (x + 1)[..., 8:], cos[..., :8], sin[..., :8]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def tables_with_more_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(x[:1], cos, sin)


LOOK_ALIKES: list[tuple[Rotate, str | None]] = [
    (halves_swapped, "not made of the halves"),
    (nothing_negated, None),
    (both_negated, "not made of the halves"),
    (parts_overlap, "not made of the halves"),
    (parts_unequal, "not made of the halves"),
    (neighbours_as_halves, "not made of the halves"),
    (halves_as_neighbours, "not made of the halves"),
    (even_and_odd_swapped, "not made of the halves"),
    (parts_of_another_tensor, "not made of the halves"),
    (parts_rounded_otherwise, "not made of the halves"),
    (across_the_tokens, None),
    (one_entry_for_all_channels, "one entry for every rotated channel"),
    (pairs_of_one_sign, "signs"),
    (pairs_with_cos_and_sin_swapped, "different cos or sin"),
    (pairs_with_two_tables, "different cos or sin"),
    (pairs_of_shifted_tables, "different cos or sin"),
    (halves_written_as_neighbours, "interleaved"),
    (pairs_of_two_tensors, "of one tensor"),
    (tables_with_more_rows, "more rows"),
]


@pytest.mark.parametrize(("rotate", "reason"), LOOK_ALIKES, ids=lambda item: getattr(item, "__name__", ""))
def test_look_alike_is_left_alone(rotate: Rotate, reason: str | None) -> None:
    """What has the marks of a rotation is reported as a miss, with the reason; what has not is nobody's business."""
    report = fused_within_contract(rotate, *inputs()[1:])
    assert not report.idioms["rope"]
    assert "rotary" not in report.ops
    reasons = [site.reason or "" for site in report.missed if site.idiom == "rope"]
    assert [reason in found for found in reasons] == [True] if reason else not reasons, reasons


@pytest.mark.parametrize(
    "rest",
    [lambda x: x[..., 7:15], lambda x: (x + 1)[..., 8:], lambda x: x[..., 8:12]],
    ids=["overlapping", "of another tensor", "shorter"],
)
def test_what_is_not_the_rest_does_not_pass_through(rest: Callable[[Tensor], Tensor]) -> None:
    """The rotation itself is fused, the cat stays."""
    report = fused_within_contract(
        lambda x, cos, sin: torch.cat((llama(x[..., :8], cos[..., :8], sin[..., :8]), rest(x)), -1), *inputs()[1:]
    )
    assert report.idioms["rope"] == 1
    assert arguments(report)["rotary_dim"] == -1
    assert any(str(node.target) == "aten.cat.default" for node in report.graph("fused").graph.nodes)


def test_product_of_complex_tensors_is_no_rotation() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft(a) * torch.fft.fft(b)).flatten(-2)

    report = fused_within_contract(fn, torch.randn(2, 8), torch.randn(2, 8))
    assert not report.idioms["rope"]
    assert not report.missed


def test_symbolic_width_is_not_fused() -> None:
    """Whether a width that is known at run time only is even, nobody knows now."""
    x, cos, sin = (torch.randn(2, 4, 6, 10) for _ in range(3))
    report = fused_within_contract(llama, x, cos, sin, dynamic=True)
    assert not report.idioms["rope"]
    assert "run time" in (report.missed[0].reason or "")
