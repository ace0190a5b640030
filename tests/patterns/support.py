"""What the tests of all rules share: compiling a small function, and holding it to the numeric contract.

This folder is no package on purpose: pytest would import it as `patterns`, the name of the rules' own folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import npu_fusion
from npu_fusion import FusionConfig, FusionReport
from npu_fusion.numerics import assert_within_contract
from tests.models.float64 import Float64Mode, to_float64


def fused(
    fn: Callable[..., Any], *inputs: Any, dynamic: bool | None = False, config: FusionConfig | None = None
) -> tuple[Any, FusionReport]:
    """Compile `fn` with npu_fusion, run it once without gradients, and report.

    Dynamo starts afresh, so that nothing compiled before decides which sizes are dynamic.

    Returns:
        what the compiled `fn` returns, and the report of what ran.
    """
    torch.compiler.reset()
    compiled = torch.compile(fn, backend="npu_fusion", dynamic=dynamic, fullgraph=True, options=_options(config))
    with torch.no_grad():
        outputs = compiled(*inputs)
    return outputs, npu_fusion.report(compiled)


def fused_within_contract(
    fn: Callable[..., Any], *inputs: Any, dynamic: bool | None = False, config: FusionConfig | None = None
) -> FusionReport:
    """`fused`, every floating output of which is within the numeric contract against `fn` in float64, and every other one equal to eager's.

    No rule may have raised. Eager and float64 runs get copies of the inputs, so that `fn` may write to them.

    Returns:
        the report of what ran.
    """
    with torch.no_grad():
        eager = fn(*copy.deepcopy(inputs))
        exact_fn = to_float64(copy.deepcopy(fn)) if isinstance(fn, nn.Module) else fn
        with Float64Mode():
            exact = exact_fn(*to_float64(copy.deepcopy(inputs)))
    outputs, report = fused(fn, *inputs, dynamic=dynamic, config=config)
    assert not report.rule_errors, report.rule_errors
    dtype = _lowest_precision((inputs, outputs))
    for position, (a, e, x) in enumerate(zip(*map(_tensors, (outputs, eager, exact)), strict=True)):
        assert (a.shape, a.dtype, a.device) == (e.shape, e.dtype, e.device)
        if a.is_floating_point():
            assert_within_contract(a, e, x, dtype, f"output {position}")
        else:
            assert torch.equal(a, e), f"output {position}"
    return report


def _options(config: FusionConfig | None) -> Any:
    return None if config is None else {name: getattr(config, name) for name in config.__dataclass_fields__}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _lowest_precision(tree: Any) -> torch.dtype:
    """The floating dtype of fewest bits in the tree; float32 where there is none."""
    found = {tensor.dtype for tensor in _tensors(tree) if tensor.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
