"""What the tests of the Ascend lowerings share: lowering a call of a semantic op by itself, and what every CPU kernel must stand.

This folder is no package on purpose, as tests/patterns is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from npu_fusion import FusionConfig, GraphRecord
from npu_fusion.lower import lower_graph
from npu_fusion.lowerings.ascend.emulation import emulated_ops
from npu_fusion.numerics import assert_within_contract
from npu_fusion.record import Site
from npu_fusion.semantic import find_semantic_op
from tests.graphs import aten_graph
from tests.ops.checks import assert_same_metadata, tensors_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Lowered:
    """A small graph after lowering.

    Attributes:
        gm: the lowered graph.
        provider: what its only semantic call became.
        reason: why better providers were passed over.
        record: the graph's record.
    """

    gm: GraphModule
    provider: str
    reason: str
    record: GraphRecord

    def targets(self) -> list[str]:
        """The ops that are called, in order, as `npu.npu_swiglu` or `aten.mul`; without getitem."""
        calls = [node.target for node in self.gm.graph.nodes if node.op == "call_function"]
        return [str(call).rpartition(".")[0] for call in calls if isinstance(call, torch._ops.OpOverload)]


def lower_call(fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False, dry_run: bool = False, **options: Any) -> Lowered:
    """Trace `fn`, which calls one semantic op, on the inputs and lower it, by default for ascend910b on CPU tensors."""
    config = FusionConfig(**{"target": "ascend910b", "emulate": True, **options})
    gm = aten_graph(fn, *inputs, dynamic=dynamic)
    record = GraphRecord(config, dry_run=dry_run)
    [call] = [node for node in gm.graph.nodes if find_semantic_op(node.target)]
    record.sites.append(Site("", True, call=call.name))
    lower_graph(gm, config, record)
    gm.graph.lint()
    assert not record.rule_errors, record.rule_errors
    [site] = record.sites
    return Lowered(gm, str(site.lowered_to), site.reason or "", record)


def lower_and_check(fn: Callable[..., Any], exact: Callable[..., Any], *inputs: Tensor, dynamic: bool = False, **options: Any) -> Lowered:
    """`lower_call`, whose results are within the numeric contract.

    Args:
        fn: calls one semantic op; run by itself it stands for what eager computes.
        exact: the same computation in the dtype of its inputs, which are `inputs` in float64.
    """
    lowered = lower_call(fn, *inputs, dynamic=dynamic, **options)
    actual, eager = tensors_of(lowered.gm(*inputs)), tensors_of(fn(*inputs))
    truth = tensors_of(exact(*(tensor.double() for tensor in inputs)))
    lowest = max((tensor.dtype for tensor in (*inputs, *eager)), key=lambda dtype: torch.finfo(dtype).eps)
    for a, e, t in zip(actual, eager, truth, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())
        assert_within_contract(a, e, t, lowest)
    return lowered


def check_kernel(name: str, *args: Any, **kwargs: Any) -> Any:
    """Run a CPU kernel; its fake kernel must predict the result, static and symbolic, without a guard. Returns the result."""
    packet, _, overload = name.split("::")[1].partition(".")
    op = getattr(getattr(getattr(torch.ops, name.split("::")[0]), packet), overload or "default")
    assert name in emulated_ops()
    real = op(*args, **kwargs)
    for dynamic in (False, True):
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)

        def fakeify(leaf: Any, mode: FakeTensorMode = mode, dynamic: bool = dynamic) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            sizes = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC] * leaf.dim()
            return mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext(sizes))

        fake_args, fake_kwargs = pytree.tree_map(fakeify, (args, kwargs))
        before = len(env.guards), len(env.deferred_runtime_asserts)
        with mode:
            fake = op(*fake_args, **fake_kwargs)
        assert (len(env.guards), len(env.deferred_runtime_asserts)) == before, env.guards
        assert_same_metadata(fake, real)
    return real
