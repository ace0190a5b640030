"""Metadata of new nodes: what an op's fake kernel says, asked once for equal calls (the layers of a model)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from .semantic import NAMESPACE
from .torch_private import FakeTensor
from .view.shapes import to_dim, to_shape
from .view.value import attribute_key


class Metadata:
    """Runs fake kernels in the fake mode of one graph."""

    def __init__(self, fake_mode: Any) -> None:
        self.fake_mode = fake_mode
        self._known: dict[Hashable, Any] = {}

    def of(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`meta["val"]` of a call whose arguments hold nodes.

        A semantic op's result aliases nothing and depends on its arguments' metadata alone: that of an equal call is the same. So it is for
        ops of a device's library that say in their schema that they neither write nor alias.
        """
        args, kwargs = map_arg((args, kwargs), _fake_argument)
        with self.fake_mode:
            if not _is_pure(target):
                return target(*args, **kwargs)
            key = (target, _key(args), _key(tuple(sorted(kwargs.items()))))
            if key in self._known:
                return _alike(self._known[key])
            self._known[key] = val = target(*args, **kwargs)
        return val

    def of_constant(self, tensor: Tensor) -> Tensor:
        """`meta["val"]` of a tensor that the graph owns."""
        if isinstance(tensor, FakeTensor):
            return tensor
        fake: Tensor = self.fake_mode.from_tensor(tensor, static_shapes=True)
        return fake


def _is_pure(target: Any) -> bool:
    if not isinstance(target, OpOverload) or target.namespace in ("aten", "prims"):
        return False
    return target.namespace == NAMESPACE or all(value.alias_info is None for value in (*target._schema.arguments, *target._schema.returns))


def _fake_argument(node: Node) -> Any:
    """What a fake kernel gets for a node. A number known at run time only is any number: metadata never depends on one."""
    val = node.meta["val"]
    return 1.0 if isinstance(val, torch.SymFloat) else val


def _key(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return to_shape(argument.shape), to_shape(argument.stride()), argument.dtype, argument.device
    if isinstance(argument, (list, tuple)):
        return tuple(_key(item) for item in argument)
    if isinstance(argument, torch.SymInt):
        return ("size", to_dim(argument))
    key: Hashable = attribute_key(argument)
    return key


def _alike(val: Any) -> Any:
    """New tensors with the metadata of others."""
    if isinstance(val, (list, tuple)):
        return tuple(_alike(item) for item in val)
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
