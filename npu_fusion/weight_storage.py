"""How a weight lies in memory, for ops that read it in one way only: done once after a model is loaded, by its author.

A linear's weight [outputs, inputs] stays the same parameter with the same values, and every write to it (`load_state_dict`, an optimiser,
`parameter.data.copy_`) goes where the op reads. Nothing is kept twice, and nothing is to be done again after a reload.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from . import torch_private
from .errors import UnsupportedInputError
from .weights import why_not_owned

FRACTAL_NZ = 29


def store_inputs_first(weights: Iterable[nn.Module | Tensor]) -> None:
    """Store weights [outputs, inputs] with the inputs first, as `npu_mla_prolog_v3` reads them; on an NPU in the format FRACTAL_NZ.

    The parameters keep their identity, shape and values; their memory is new, and its rows are those of the transposed matrix. To be called
    before `torch.compile` first runs, which otherwise compiles anew::

        attention = model.layers[0].self_attn
        npu_fusion.store_inputs_first([attention.q_a_proj, attention.q_b_proj, attention.kv_a_proj_with_mqa])

    Args:
        weights: matrices, or modules whose `weight` is one.

    Raises:
        UnsupportedInputError: a weight is no matrix, or others refer to its memory, which would no longer see what is written to it.
    """
    for given in weights:
        weight = given.weight if isinstance(given, nn.Module) else given
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise UnsupportedInputError(f"the weight of {type(given).__name__} is no matrix")
        if not weight.t().is_contiguous():
            reason = why_not_owned([weight])
            if reason is not None:
                raise UnsupportedInputError(f"a weight of shape {list(weight.shape)} cannot be stored anew: {reason}")
            _store(weight)
        elif weight.device.type == "npu":
            _store(weight)


def _store(weight: Tensor) -> None:
    with torch.no_grad():
        transposed = weight.data.t().contiguous()
        if transposed.device.type == "npu":
            transposed = torch_private.npu_tensor_in_format(transposed, FRACTAL_NZ)
        weight.data = transposed.t()


# -------------------------------------------------------------------- what a graph may know of it

_FORMAT = "npu_fusion_format"
"""Key of a placeholder's metadata: the format of the tensor that will be passed, of one on an NPU."""


def note_formats(gm: GraphModule, real_inputs: Sequence[Any]) -> None:
    """Note in a graph the formats of its parameters, which fake tensors do not have.

    Args:
        real_inputs: for each placeholder the tensor that will be passed, or None.
    """
    for node, real in zip(gm.graph.find_nodes(op="placeholder"), real_inputs, strict=False):
        if isinstance(real, Tensor) and real.device.type == "npu" and not torch_private.has_no_memory(real):
            node.meta[_FORMAT] = torch_private.npu_format_of(real)


def is_in_nz(weight: Node) -> bool:
    """Whether a parameter, of which the node may be a transposition, is in the format FRACTAL_NZ, or on a device that has no formats."""
    while weight.op == "call_function" and weight.target in _TRANSPOSITIONS:
        weight = weight.args[0]  # type: ignore[assignment]
    return weight.meta["val"].device.type != "npu" or weight.meta.get(_FORMAT) == FRACTAL_NZ


_TRANSPOSITIONS = (torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default)
