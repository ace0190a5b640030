"""What every semantic op must stand: registration checks, symbolic shapes without guards, and tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from npu_fusion.semantic import SemanticOp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a result or an argument list, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions longer than 1, of a tensor with elements."""
    if tensor.numel() == 0:
        return []
    return [int(stride) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


def assert_same_metadata(fake: Any, real: Any) -> None:
    """Shapes, dtypes and strides of the fake results are those of the real ones. Concretises symbolic sizes."""
    fakes, reals = tensors_of(fake), tensors_of(real)
    assert len(fakes) == len(reals)
    for f, r in zip(fakes, reals):
        assert [int(size) for size in f.shape] == list(r.shape)
        assert f.dtype == r.dtype
        assert _strides(f) == _strides(r)


def check_op(op: SemanticOp, *args: Any, **kwargs: Any) -> Any:
    """Check schema, aliasing and fake kernel (static and symbolic) of one call; return its real result."""
    torch.library.opcheck(op.overload, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    real = op(*args, **kwargs)
    check_symbolic(op, real, *args, **kwargs)
    return real


def check_symbolic(op: SemanticOp, real: Any, *args: Any, **kwargs: Any) -> None:
    """The fake kernel takes every size as a symbol, adds no guard, and predicts the metadata of `real`.

    An input of unknown, gapped strides is guarded by any elementwise op that reads it, so the graph that is being rewritten has those
    guards before the fake kernel runs: they are not counted.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fakeify(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC] * leaf.dim()))

    fake_args, fake_kwargs = pytree.tree_map(fakeify, (args, kwargs))
    with mode:
        for tensor in tensors_of((fake_args, fake_kwargs)):
            torch.mul(tensor, tensor)
    before = len(env.guards), len(env.deferred_runtime_asserts)
    with mode:
        fake = op(*fake_args, **fake_kwargs)
    assert (len(env.guards), len(env.deferred_runtime_asserts)) == before, env.guards
    assert_same_metadata(fake, real)


def check_traceable(op: SemanticOp, call: Callable[..., Any], first: list[Tensor], second: list[Tensor]) -> None:
    """`call` traced symbolically on `first` keeps the op as one node, and the traced graph is right for the other sizes of `second`."""
    graph = make_fx(call, tracing_mode="symbolic")(*first)
    assert [node.target for node in graph.graph.nodes].count(op.overload) == 1
    for actual, expected in zip(tensors_of(graph(*second)), tensors_of(call(*second))):
        assert torch.equal(actual, expected)
