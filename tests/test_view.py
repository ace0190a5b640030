"""The canonical view: what is one value, what is not, and that the graph is only read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion.view import Value, build_view
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import broadcast, known_equal, known_ge
from npu_fusion.view.value import ValueTable
from tests.graphs import aten_graph, view_of

Unary = Callable[[Tensor], Any]


def x_(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (4, 8)).to(dtype)


def values_of(functions: list[Callable[..., Any]], *args: Tensor, dynamic: bool = False) -> list[Value]:
    """The values of several functions of the same arguments, in one view."""
    _, values = view_of(lambda *inner: tuple(function(*inner) for function in functions), *args, dynamic=dynamic)
    return values


def assert_same(*functions: Callable[..., Any], args: tuple[Tensor, ...], dynamic: bool = False) -> Value:
    first, *others = values_of(list(functions), *args, dynamic=dynamic)
    for other in others:
        assert other is first, f"{other} is not {first}"
    return first


SPELLINGS: dict[str, list[Unary]] = {
    "square": [lambda x: x * x, lambda x: x**2, lambda x: x.square(), lambda x: torch.pow(x, 2.0), lambda x: (-x) * (-x)],
    "rsqrt": [lambda x: x.rsqrt(), lambda x: 1 / x.sqrt(), lambda x: x**-0.5, lambda x: x.sqrt().reciprocal(), lambda x: 1.0 / x**0.5],
    "x/sqrt": [lambda x: 3 * x.rsqrt(), lambda x: 3 / x.sqrt(), lambda x: (1 / x.sqrt()) * 3],
    "quotient": [lambda x: x / x.exp().sqrt(), lambda x: x * x.exp().rsqrt(), lambda x: x * (1 / x.exp().sqrt())],
    "mean": [lambda x: x.mean(-1, keepdim=True), lambda x: x.mean(1).unsqueeze(-1), lambda x: torch.mean(x, (-1,), True)],
    "mean, arithmetic, keepdim last": [
        lambda x: torch.rsqrt(x.mean(-1, keepdim=True) + 1e-6),
        lambda x: torch.rsqrt(x.mean(-1) + 1e-6)[:, None],
    ],
    "neg": [lambda x: -x, lambda x: x * -1, lambda x: 0 - x, lambda x: -1.0 * x],
    "neg out of products": [lambda x: -(x * x.exp()), lambda x: (-x) * x.exp(), lambda x: x.exp() * (-x)],
    "sub": [
        lambda x: x - x.exp(),
        lambda x: x + (-x.exp()),
        lambda x: torch.add(x, x.exp(), alpha=-1),
        lambda x: torch.sub(x, x.exp()),
        lambda x: torch.rsub(x.exp(), x),
    ],
    "add of a number": [lambda x: x + 0.5, lambda x: 0.5 + x, lambda x: x - (-0.5)],
    "division by a number": [lambda x: x / 4, lambda x: x * 0.25, lambda x: torch.div(x, 4.0)],
    "nothing": [lambda x: x, lambda x: x + 0, lambda x: x * 1, lambda x: x / 1, lambda x: x**1, lambda x: (-x).neg()],
    "sigmoid": [lambda x: x.sigmoid(), lambda x: 1 / (1 + torch.exp(-x)), lambda x: (torch.exp(-x) + 1).reciprocal()],
    "silu": [
        lambda x: F.silu(x),
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.sigmoid(x) * x,
        lambda x: x / (1 + torch.exp(-x)),
    ],
    "softmax": [
        lambda x: x.softmax(-1),
        lambda x: F.softmax(x, dim=1),
        lambda x: torch.exp(x - x.amax(-1, True)) / torch.exp(x - x.amax(-1, True)).sum(-1, True),
    ],
    "copies": [lambda x: x, lambda x: x.clone(), lambda x: x.contiguous(), lambda x: x.detach(), lambda x: F.dropout(x, 0.5, False)],
    "casts that come back": [lambda x: x, lambda x: x.double().float(), lambda x: x.to(torch.float64).to(torch.float32)],
    "promotion": [lambda x: x.bfloat16() + x, lambda x: x.bfloat16().float() + x],
    "reshape": [
        lambda x: x.reshape(4, 2, 4),
        lambda x: x.view(4, 2, 4),
        lambda x: x.unflatten(1, (2, -1)),
        lambda x: x.flatten().view(2, 16).reshape(4, 2, 4),
    ],
    "unsqueeze": [lambda x: x[:, None], lambda x: x.unsqueeze(1), lambda x: x.view(4, 1, 8), lambda x: x[None, :, None][0]],
    "transpose": [lambda x: x.t(), lambda x: x.mT, lambda x: x.transpose(0, 1), lambda x: x.permute(1, 0).t().t()],
    "first half": [
        lambda x: x[:, :4],
        lambda x: x[..., :-4],
        lambda x: x.chunk(2, -1)[0],
        lambda x: x.split(4, 1)[0],
        lambda x: x.split([4, 4], -1)[0],
        lambda x: x.narrow(1, 0, 4),
        lambda x: x[:, :6][:, :4],
        lambda x: x.unflatten(-1, (2, 4))[:, 0],
        lambda x: x.view(4, 2, 4).unbind(1)[0],
    ],
    "one row": [lambda x: x[1], lambda x: x.select(0, 1), lambda x: x.unbind(0)[1], lambda x: x[1:2].squeeze(0), lambda x: x[-3]],
    "even places": [lambda x: x[:, ::2], lambda x: x.view(4, 4, 2)[..., 0], lambda x: x.unflatten(-1, (-1, 2)).unbind(-1)[0]],
    "cat of cat": [
        lambda x: torch.cat([x, -x, x.exp()], -1),
        lambda x: torch.cat([torch.cat([x, -x], -1), x.exp()], 1),
        lambda x: torch.cat([x, torch.cat([-x, x.exp()], -1), x[:, :0]], -1),
    ],
    "slice of cat": [lambda x: x, lambda x: torch.cat([-x, x], -1)[:, 8:], lambda x: torch.cat([x, -x], 0)[:4]],
    "stack": [lambda x: torch.stack([x, -x]), lambda x: torch.cat([x[None], (-x)[None]])],
    "interleave": [
        lambda x: torch.stack([x, -x], -1).flatten(-2),
        lambda x: torch.cat([x[..., None], (-x)[..., None]], -1).reshape(4, 16),
    ],
    "casts move outwards": [
        lambda x: x.bfloat16()[:, :4],
        lambda x: x[:, :4].bfloat16(),
    ],
    "casts move out of cat and neg": [
        lambda x: torch.cat([-x.bfloat16(), x.bfloat16()], -1).view(8, 8).t(),
        lambda x: torch.cat([-x, x], -1).view(8, 8).t().bfloat16(),
    ],
    "comparison": [lambda x: x > x.exp(), lambda x: x.exp() < x],
    "masks": [lambda x: x.masked_fill(x > 0, 2.0), lambda x: torch.where(x > 0, 2.0, x)],
    "and": [lambda x: (x > 0) & (x < 1), lambda x: torch.logical_and(x < 1, x > 0), lambda x: ~(~((x < 1) & (x > 0)))],
    "clamp": [lambda x: x.clamp(min=0.0), lambda x: x.clamp_min(0.0), lambda x: torch.clip(x, min=0.0)],
    "broadcasting": [
        lambda x: x + torch.arange(8.0),
        lambda x: x + torch.arange(8.0)[None],
        lambda x: x + torch.arange(8.0).expand(4, 8),
        lambda x: torch.arange(8.0).expand_as(x) + x,
    ],
    "constants": [lambda x: torch.full((3,), 1.0), lambda x: torch.ones(3), lambda x: x.new_ones(3), lambda x: x.new_full((3,), 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_value(name: str) -> None:
    assert_same(*SPELLINGS[name], args=(x_().abs() + 1,))


@pytest.mark.parametrize("name", ["square", "rsqrt", "mean", "silu", "unsqueeze", "transpose", "one row", "comparison"])
def test_spellings_with_symbolic_sizes(name: str) -> None:
    spellings = [spelling for spelling in SPELLINGS[name] if "view" not in spelling.__code__.co_names]  # those name sizes
    assert len(spellings) > 1
    assert_same(*spellings, args=(x_(),), dynamic=True)


def test_halves_with_a_symbolic_size() -> None:
    halves = [lambda x: x[..., : x.shape[-1] // 2], lambda x: x.narrow(-1, 0, x.shape[-1] // 2)]
    assert_same(*halves, args=(x_(),), dynamic=True)


def test_mean_written_as_a_sum() -> None:
    assert_same(
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.sum(-1, keepdim=True) / 8,
        lambda x: x.sum(-1, keepdim=True) * 0.125,
        lambda x: (x.sum(1) / x.shape[1])[:, None],
        args=(x_(),),
    )


def test_mean_over_a_symbolic_size_written_as_a_sum() -> None:
    assert_same(lambda x: x.mean(-1, keepdim=True), lambda x: x.sum(-1, keepdim=True) / x.shape[-1], args=(x_(),), dynamic=True)


def test_root_mean_square_written_with_a_norm() -> None:
    value = assert_same(
        lambda x: x.square().mean(-1, keepdim=True).sqrt(),
        lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(8),
        lambda x: x.norm(2, dim=-1, keepdim=True) * 8**-0.5,
        args=(x_(),),
    )
    assert value.op == "sqrt"


@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_linear(leading: tuple[int, ...]) -> None:
    args = (torch.randn(*leading, 8), torch.randn(5, 8), torch.randn(5))
    assert_same(
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: x @ w.t() + b,
        lambda x, w, b: torch.addmm(b, x.reshape(-1, 8), w.t()).view(*x.shape[:-1], 5),
        lambda x, w, b: torch.mm(x.reshape(-1, 8), w.transpose(0, 1)).reshape(*x.shape[:-1], 5) + b,
        args=args,
    )


def test_batched_products() -> None:
    args = (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6))
    assert_same(
        lambda a, b: a @ b,
        lambda a, b: torch.bmm(a.reshape(6, 4, 5), b.reshape(6, 5, 6)).view(2, 3, 4, 6),
        args=args,
    )


# -------------------------------------------------------------------- what is not the same


DIFFERENT: dict[str, list[Unary]] = {
    "rounding": [lambda x: x, lambda x: x.bfloat16().float()],
    "rounding before or after a product": [lambda x: x.bfloat16() * x.exp().bfloat16(), lambda x: (x * x.exp()).bfloat16()],
    "true and floor division": [lambda x: x / x.exp(), lambda x: torch.div(x, x.exp(), rounding_mode="floor")],
    "operand order of sub": [lambda x: x - x.exp(), lambda x: x.exp() - x],
    "operand order of div": [lambda x: x / x.exp(), lambda x: x.exp() / x],
    "softmax that turns masked rows to zeros": [lambda x: x.softmax(-1), lambda x: torch.ops.aten._safe_softmax(x, -1)],
    "other dimension": [lambda x: x.view(8, 8).mean(-1, True), lambda x: x.view(8, 8).mean(0, True)],
    "sum over another number": [lambda x: x.mean(-1, True), lambda x: x.sum(-1, True) / 7],
    "sign of a scaled root": [lambda x: x.square().sum(-1).sqrt() * 0.25, lambda x: x.square().sum(-1).sqrt() * -0.25],
    "gelu": [lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh")],
    "halves and pairs": [lambda x: x[:, :8], lambda x: x[:, ::2]],
    "comparison that is strict": [lambda x: x > 0, lambda x: x >= 0],
    "masks inverted": [lambda x: x.masked_fill(x > 0, 2.0), lambda x: torch.where(x > 0, x, 2.0)],
    "clamp from below and above": [lambda x: x.clamp(min=0.5), lambda x: x.clamp(max=0.5)],
    "zero and minus zero": [lambda x: torch.where(x > 0, 0.0, x), lambda x: torch.where(x > 0, -0.0, x)],
    "one as int, float and bool": [
        lambda x: torch.where(x > 0, 1, 0),
        lambda x: torch.where(x > 0, 1.0, 0.0),
        lambda x: torch.where(x > 0, True, False),
    ],
    "transposed by reshape": [lambda x: x.t(), lambda x: x.reshape(16, 4)],
    "interleaved the other way": [lambda x: torch.stack([x, -x], -1).flatten(-2), lambda x: torch.stack([-x, x], -1).flatten(-2)],
    "trained dropout": [lambda x: x, lambda x: F.dropout(x, 0.5, True)],
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_values(name: str) -> None:
    values = values_of(DIFFERENT[name], x_(4, 16))
    assert len({id(value) for value in values}) == len(values)


def test_numbers_of_different_type_or_sign_are_different_constants() -> None:
    canon = Canon(ValueTable())
    constants = [canon.const(number) for number in (1, True, 1.0, 0.0, -0.0, 0, False, math.inf, -math.inf)]
    assert len(set(constants)) == len(constants)
    assert canon.const(1.0) is constants[2]
    nan = canon.const(math.nan)
    assert canon.const(math.nan) is nan


def test_two_broadcast_operands_keep_their_shape() -> None:
    """Either operand of the sum could be left unexpanded, but not both: the sum of the small ones is another value."""
    small, big = values_of([lambda a, b: a + b, lambda a, b: a.expand(3, 8) + b.expand(3, 8)], x_(1, 8), x_(1, 8))
    assert small is not big
    assert (small.shape, big.shape) == ((1, 8), (3, 8))


def test_negating_unsigned_integers_does_not_commute_with_widening() -> None:
    x = torch.arange(4, dtype=torch.uint8)
    before, after = values_of([lambda x: (-x).to(torch.int32), lambda x: -(x.to(torch.int32))], x)
    assert before is not after


def test_0d_operands_do_not_decide_the_type() -> None:
    scale, x = torch.tensor(2.0, dtype=torch.float64), x_(4, 8)
    functions = [lambda s, x: s * x, lambda s, x: x * s, lambda s, x: x - s, lambda s, x: torch.where(x > s, s.float(), x)]
    for value in values_of(functions, scale, x):
        assert value.dtype == torch.float32


def test_0d_arithmetic_is_typed_as_pytorch_types_it() -> None:
    """A position times a float is a float: a cast back to integers rounds."""
    step = torch.tensor(3)
    _, (scaled, rounded) = view_of(lambda s: (s * 0.5, (s * 0.5).to(torch.int64)), step)
    assert (scaled.dtype, rounded.dtype) == (torch.float32, torch.int64)
    assert rounded is not scaled


def test_constants_on_different_devices() -> None:
    cpu, meta = values_of([lambda: torch.ones(3), lambda: torch.ones(3, device="meta")])
    assert cpu is not meta


@torch.library.custom_op("npu_fusion_tests::silu", mutates_args=())
def _their_silu(x: Tensor) -> Tensor:
    return x + 1


_their_silu.register_fake(torch.empty_like)


def test_an_op_of_another_library_is_not_pytorchs_of_that_name() -> None:
    theirs, ours = values_of([lambda x: torch.ops.npu_fusion_tests.silu(x), lambda x: F.silu(x)], x_())
    assert theirs is not ours
    assert theirs.op == "npu_fusion_tests::silu"


# -------------------------------------------------------------------- effects


@pytest.mark.parametrize("draw", [torch.rand_like, torch.bernoulli, lambda x: F.dropout(x, 0.5, True), lambda x: torch.randn(4, 8)])
def test_random_numbers_are_drawn_anew(draw: Unary) -> None:
    first, second = values_of([draw, draw], torch.rand(4, 8))
    assert first is not second


def test_collectives_are_not_shared() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, device="meta")
    calls = [graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0")) for _ in range(2)]
    for call in calls:
        call.meta["val"] = torch.empty(4, device="meta")
    graph.output(tuple(calls))
    view = build_view(graph)
    assert view.of[calls[0]] is not view.of[calls[1]]


def test_a_mutated_tensor_has_another_value_afterwards() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        row, before = x[0], x * x
        kept = row + 1
        x.add_(1)
        return before, x * x, kept, row + 1, before * 1

    _, (before, after, kept, changed, again) = view_of(fn, x_())
    assert before is not after
    assert kept is not changed, "a view of what is mutated changes too"
    assert again is before, "what was computed from it does not"


def test_mutations_are_noted_with_the_views_of_what_they_write() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        row = x[0]
        x.copy_(y)
        return row + y[0]

    gm = aten_graph(fn, x_(), x_())
    view = build_view(gm.graph)
    copy = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.copy_.default)
    x, y = gm.graph.find_nodes(op="placeholder")
    assert view.overwritten[x] is copy
    assert y not in view.overwritten
    assert sum(mutation is copy for mutation in view.overwritten.values()) >= 2


# -------------------------------------------------------------------- the graph


def test_the_graph_is_only_read() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = x.float()
        y = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w
        return y, y.chunk(2, -1)[1].clone()

    gm = aten_graph(fn, x_(dtype=torch.bfloat16), x_(8, dtype=torch.bfloat16))
    before = [(node, node.target, node.args, dict(node.kwargs), dict(node.meta), list(node.users)) for node in gm.graph.nodes]
    build_view(gm.graph)
    assert before == [(node, node.target, node.args, dict(node.kwargs), dict(node.meta), list(node.users)) for node in gm.graph.nodes]


def test_every_node_has_a_value_with_its_shape_and_dtype() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        parts = x.view(2, 2, 8).transpose(0, 1).split(1)
        return torch.cat(parts, 1).float() + 1, parts[0].sum(), x.topk(2)[0], (x > 0).any(-1)

    view = build_view(aten_graph(fn, x_(dtype=torch.bfloat16), dynamic=False).graph)
    for node, value in view.of.items():
        tensor = node.meta.get("val")
        if isinstance(tensor, Tensor):
            assert (value.shape, value.dtype) == (tuple(tensor.shape), tensor.dtype), node
            assert node in view.nodes[value]


def test_operands_come_before_users() -> None:
    view, _ = view_of(lambda x: F.softmax(F.silu(x[:, :4]) / x[:, 4:].norm(dim=-1, keepdim=True), -1), x_())
    for value in view.table:
        assert all(arg.index < value.index for arg in value.args)
        assert all(value in arg.users for arg in value.args)


# -------------------------------------------------------------------- shapes


def test_shape_arithmetic_asks_for_proof() -> None:
    import sympy

    s, t = sympy.symbols("s t", integer=True, nonnegative=True)
    assert known_equal(2 * s + s, 3 * s)
    assert not known_equal(s, t)
    assert not known_equal(s, 4)
    assert known_ge(s + 4, s)
    assert known_ge(s, 0)
    assert not known_ge(s, 1)
    assert not known_ge(s, t)
    assert broadcast((s, 1), (1, t)) == (s, t)
    assert broadcast((4,), (2, 1, 1)) == (2, 1, 4)


def test_building_a_view_adds_no_guard() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        return (x[..., : x.shape[-1] // 2] * 2 + y).reshape(-1, y.shape[-1]).mean(-1)

    gm = aten_graph(fn, x_(4, 16), x_(4, 8), dynamic=True)
    env = next(node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")).fake_mode.shape_env
    before = len(env.guards)
    build_view(gm.graph)
    assert len(env.guards) == before
