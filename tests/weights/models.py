"""Models with linears to merge, compiled and compared with themselves run eagerly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from npu_fusion.backend import records_of
from npu_fusion.numerics import error_bound, relative_error
from npu_fusion.record import GraphRecord

HIDDEN, INNER = 16, 24
MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


class Mlp(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, 32, bias=bias)
        self.k_proj = nn.Linear(HIDDEN, 16, bias=bias)
        self.v_proj = nn.Linear(HIDDEN, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)

    @staticmethod
    def _heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.attention, self.out, self.mlp = Attention(bias), nn.Linear(32, HIDDEN), Mlp(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attention(x))
        return x + self.mlp(x)


def frozen(module: nn.Module) -> Any:
    return module.eval().requires_grad_(False)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 5)), HIDDEN, dtype=dtype)


class Compiled:
    """A model, compiled; each call is compared with the model run eagerly on copies of its parameters as they are then."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model = model
        dynamic = options.pop("dynamic", False)
        self.run = torch.compile(model, backend="npu_fusion", dynamic=dynamic, options=options)

    def check(self, x: Tensor | None = None) -> None:
        x = inputs(dtype=next(self.model.parameters()).dtype) if x is None else x
        with torch.no_grad():
            results, expected = self.run(x), copy.deepcopy(self.model)(x)
        for actual, wanted in zip(tree_leaves(results), tree_leaves(expected), strict=True):
            assert actual.dtype is wanted.dtype
            assert relative_error(actual, wanted) < error_bound(x.dtype)

    @property
    def records(self) -> list[GraphRecord]:
        return records_of(self.run)

    def launches(self, *targets: Any) -> int:
        return sum(node.target in targets for node in self.records[-1].stages["fused"].graph.nodes)


def is_merged(*parameters: Tensor) -> bool:
    """Whether the parameters lie one behind the other in one storage."""
    first = parameters[0]
    ends = [p.storage_offset() + p.numel() for p in parameters]
    same = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parameters)
    return same and [p.storage_offset() for p in parameters[1:]] == ends[:-1]


def gate_and_up(model: Any) -> tuple[Tensor, Tensor]:
    return model.mlp.gate_proj.weight, model.mlp.up_proj.weight


class Wide(nn.Module):
    """Two linears of one input, up to what is passed."""

    def __init__(self, first: nn.Module, second: nn.Module, combine: Callable[[Tensor, Tensor], Any] = torch.add) -> None:
        super().__init__()
        self.first, self.second, self.combine = first, second, combine

    def forward(self, x: Tensor) -> Any:
        return self.combine(self.first(x), self.second(x))


def linear(out: int = 24, **options: Any) -> nn.Linear:
    return nn.Linear(HIDDEN, out, **options)
