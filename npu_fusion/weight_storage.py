"""How a weight lies in memory, for ops that read it in one way only: done once after a model is loaded, by its author.

A linear's weight [outputs, inputs] stays the same parameter with the same values, and every write to it (`load_state_dict`, an optimiser,
`parameter.data.copy_`) goes where the op reads. Nothing is kept twice, and nothing is to be done again after a reload.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

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
            transposed = importlib.import_module("torch_npu").npu_format_cast(transposed, FRACTAL_NZ)
        weight.data = transposed.t()
