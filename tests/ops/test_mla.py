"""Numerics, layouts, metadata and errors of `mla_preprocess`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.mla import mla_preprocess
from tests.ops.checks import DTYPES, assert_same_metadata

HIDDEN, LORA, HEADS, NOPE, ROPE, LATENT = 16, 12, 4, 6, 4, 8


def tensors(dtype: torch.dtype, lead: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    torch.manual_seed(0)
    angles = torch.rand(*lead, 1, ROPE // 2).repeat(*[1] * (len(lead) + 1), 2) * 6

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape) * shape[-2] ** -0.5).to(dtype)

    return {
        "x": torch.randn(*lead, HIDDEN).to(dtype),
        "q_a_weight": weight(HIDDEN, LORA),
        "kv_a_weight": weight(HIDDEN, LATENT + ROPE),
        "q_b_weight": weight(LORA, HEADS * (NOPE + ROPE)),
        "k_b_weight": weight(HEADS, NOPE, LATENT),
        "q_norm_weight": torch.rand(LORA).to(dtype) + 0.5,
        "kv_norm_weight": torch.rand(LATENT).to(dtype) + 0.5,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "q_eps": 1e-6,
        "kv_eps": 1e-5,
    }


def plain(a: dict[str, Any], *, interleaved: bool) -> list[Tensor]:
    """The formulas of the docstring."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def rotated(x: Tensor) -> Tensor:
        if not interleaved:
            first, second = x.chunk(2, -1)
            return x * a["cos"] + torch.cat([-second, first], -1) * a["sin"]
        pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * a["cos"] + pairs * a["sin"]

    q = (norm(a["x"] @ a["q_a_weight"], a["q_norm_weight"], a["q_eps"]) @ a["q_b_weight"]).unflatten(-1, (HEADS, -1))
    kv = a["x"] @ a["kv_a_weight"]
    latent = norm(kv[..., :LATENT], a["kv_norm_weight"], a["kv_eps"])
    absorbed = torch.einsum("...hd,hdc->...hc", q[..., :NOPE], a["k_b_weight"])
    return [absorbed, rotated(q[..., NOPE:]), latent, rotated(kv[..., None, LATENT:])]


def checked(**given: Any) -> Any:
    """Check schema, aliasing and fake kernel, which takes the number of tokens as a symbol and adds no guard; return the results."""
    torch.library.opcheck(mla_preprocess.overload, (), given, test_utils=("test_schema", "test_faketensor"))
    real, env = mla_preprocess(**given), ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fakeify(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dims = [DimDynamic.STATIC] * value.dim()
        dims[:2] = [DimDynamic.DYNAMIC] * 2 if name in ("x", "x_scale") else dims[:2]
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dims))

    faked = {name: fakeify(name, value) for name, value in given.items()}
    before = len(env.guards)
    with mode:
        fake = mla_preprocess(**faked)
    assert len(env.guards) == before, env.guards
    assert_same_metadata(fake, real)
    return real


def in_pairs(table: Tensor) -> Tensor:
    return table[..., : ROPE // 2].repeat_interleave(2, -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_meets_the_numeric_contract(dtype: torch.dtype, interleaved: bool) -> None:
    given = tensors(dtype)
    if interleaved:
        given |= {"cos": in_pairs(given["cos"]), "sin": in_pairs(given["sin"])}
    actual = checked(**given, layout="interleaved" if interleaved else "half")
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    for a, e, x in zip(actual, plain(given, interleaved=interleaved), plain(wide, interleaved=interleaved), strict=True):
        assert_within_contract(a, e, x, dtype)


def test_heads_may_come_first() -> None:
    given = tensors(torch.float32)
    nope, rope, latent, key = checked(**given)
    turned = given | {name: given[name].transpose(1, 2) for name in ("cos", "sin")}
    first = checked(**turned, heads_first=True, rope_heads_first=True)
    for actual, expected in zip(first, (nope.transpose(1, 2), rope.transpose(1, 2), latent, key.transpose(1, 2)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_shard_of_the_heads_is_a_shard_of_the_results(shards: int) -> None:
    """Tensor parallelism splits the heads of W_qb and W_UK, and nothing else."""
    given = tensors(torch.float32)
    whole = mla_preprocess(**given)
    own, columns = HEADS // shards, (NOPE + ROPE) * HEADS // shards
    for rank in range(shards):
        part = {"q_b_weight": given["q_b_weight"][:, rank * columns :][:, :columns], "k_b_weight": given["k_b_weight"][rank * own :][:own]}
        nope, rope, latent, key = mla_preprocess(**{**given, **part})
        heads = slice(rank * own, (rank + 1) * own)
        for actual, expected in ((nope, whole[0][..., heads, :]), (rope, whole[1][..., heads, :]), (latent, whole[2]), (key, whole[3])):
            torch.testing.assert_close(actual, expected)


def test_int8_projections() -> None:
    """Near what the matrices stand for, each row of activations being rounded to 255 steps."""
    given = tensors(torch.float32)
    scales = {}
    for name in ("q_a", "kv_a", "q_b"):
        weight = given[f"{name}_weight"]
        scale = weight.abs().amax(0) / 127
        given[f"{name}_weight"], scales[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
    exact = {**given, **{f"{name}_weight": given[f"{name}_weight"] * scales[f"{name}_scale"] for name in ("q_a", "kv_a", "q_b")}}
    x_scale = given["x"].abs().amax(-1, keepdim=True) / 127
    given["x"] = (given["x"] / x_scale).round().to(torch.int8)
    for actual, near in zip(checked(**given, x_scale=x_scale, **scales), mla_preprocess(**exact), strict=True):
        torch.testing.assert_close(actual, near, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(2, 3, HIDDEN + 1)}, ValueError, "q_a_weight must have shape"),
        ({"x": torch.ones(2, 3, HIDDEN).half()}, TypeError, "x must be torch.float32"),
        ({"q_b_weight": torch.ones(LORA, HEADS * (NOPE + ROPE)).half()}, TypeError, "one dtype"),
        ({"q_b_weight": torch.ones(LORA, HEADS * (NOPE + ROPE), dtype=torch.int8)}, ValueError, "an int8 q_b_weight has a scale"),
        ({"k_b_weight": torch.ones(NOPE, LATENT)}, ValueError, "k_b_weight must have 3 dimensions"),
        ({"layout": "pairs"}, ValueError, "layout must be one of"),
        ({"sign": 0}, ValueError, "sign must be one of"),
        ({"cos": torch.ones(5, 1, ROPE)}, ValueError, "cos of shape"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {**tensors(torch.float32), **changed}
    with pytest.raises(error, match=message):
        mla_preprocess(**given)
