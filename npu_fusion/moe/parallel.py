"""Expert parallelism for models as they are: the experts of transformers' MoE blocks shared by the ranks of a group.

transformers keeps a block's experts in one module with stacked weights [E, ...], called with (hidden_states [T, H], top_k_index [T, K],
top_k_weights [T, K]); its attributes say how the weights lie. Here the module keeps the slice of a rank, and its forward becomes
dispatch, the experts on rows in expert order, combine. Routers, shared experts and all else stay as they are.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedInputError
from . import api

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_FLAGS = ("num_experts", "act_fn", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts the way transformers 5 does."""
    if not all(hasattr(module, name) for name in _FLAGS if name != "act_fn"):
        return False
    stacked = [getattr(module, name, None) for name in _WEIGHTS]
    return all(w.dim() == 3 and w.shape[0] == module.num_experts for w in stacked if isinstance(w, Tensor)) and isinstance(
        stacked[2], Tensor
    )


def expert_parallel(
    model: nn.Module, group: Any = None, *, max_tokens: int | None = None, quant: str = "none", placement: Tensor | None = None
) -> nn.Module:
    """Share the experts of every MoE block of a model among the ranks of a group. Changes the model in place, and returns it.

    Every rank must hold the same model, run the same layers, and may have tokens of its own.

    Args:
        model: of transformers 5 (Qwen3-MoE, Mixtral, DeepSeek-V3, ...), or a part of one.
        group: a process group, its name, or None for the default group.
        max_tokens: the most tokens (batch times sequence) of any rank at a call; None as for `npu_fusion.moe.dispatch`.
        quant: how rows travel to the experts: `none`, `int8` or `fp8`.
        placement: [E] integers, the slot of each expert, for all blocks; rank r has the slots from r * E / R on. None for e in slot e.

    Raises:
        UnsupportedInputError: there are no such experts, or the ranks cannot share them equally.
    """
    name, ranks = api.group_name(group)
    from .transport import resolve

    rank = resolve(name, ranks).rank
    found = [(path, module) for path, module in model.named_modules() if is_experts(module)]
    if not found:
        raise UnsupportedInputError(
            "the model has no modules of stacked experts as transformers 5 makes them; call npu_fusion.moe.dispatch and combine instead"
        )
    for path, module in found:
        if module.num_experts % ranks:
            raise UnsupportedInputError(f"{path}: {module.num_experts} experts cannot be shared equally by {ranks} ranks")
    for _, module in found:
        _shard(module, rank, ranks, placement)
        module.moe_group, module.moe_ranks, module.moe_max_tokens, module.moe_quant = name, ranks, max_tokens, quant
        module.forward = types.MethodType(_forward, module)
    return model


def _shard(module: Any, rank: int, ranks: int, placement: Tensor | None) -> None:
    """Keep the stacked parameters of this rank's slots, in the order of the slots."""
    experts = module.num_experts
    local = experts // ranks
    held = torch.arange(rank * local, (rank + 1) * local)
    if placement is not None:
        if sorted(placement.tolist()) != list(range(experts)):
            raise UnsupportedInputError(f"placement must name each of the slots 0 to {experts - 1} once")
        held = torch.argsort(placement)[held.to(placement.device)]
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[:1] == (experts,):
            kept = parameter.detach()[held.to(parameter.device)].clone()
            setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    module.register_buffer("moe_placement", placement, persistent=False)
    module.moe_experts, module.num_experts = experts, local


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Dispatch, this rank's experts, combine: what the module's own forward computes with all experts."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    form = {
        "group": self.moe_group,
        "ranks": self.moe_ranks,
        "experts": self.moe_experts,
        "max_tokens": api.most_tokens(self.moe_group, self.moe_ranks, x) if self.moe_max_tokens is None else self.moe_max_tokens,
        "placement": self.moe_placement,
    }
    ops = torch.ops.npu_fusion
    rows, scales, counts, handle = ops.moe_dispatch(x, top_k_index, top_k_weights, quant=self.moe_quant, **form)
    if self.moe_quant != "none":
        rows = (rows.float() * scales[:, None]).to(x.dtype)
    y = ops.moe_combine(_experts(self, rows, counts), top_k_index, top_k_weights, handle, **form)
    result: Tensor = y.reshape(hidden_states.shape)
    return result


def _experts(self: Any, rows: Tensor, counts: Tensor) -> Tensor:
    """The experts on rows [A, H] in expert order, `counts` [L] of each; what comes of the rows past them has no meaning."""
    ends = counts.cumsum(0).to(torch.int32)
    expert = None
    if self.has_bias:
        positions = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
        expert = torch.searchsorted(ends, positions, right=True).clamp(max=self.num_experts - 1)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    hidden = _grouped(self, first, rows, ends, expert)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    y = _grouped(self, "down_proj", hidden, ends, expert)
    result: Tensor = self.post_expert_norm(y) if self.has_post_expert_norm else y
    return result


def _grouped(self: Any, name: str, rows: Tensor, ends: Tensor, expert: Tensor | None) -> Tensor:
    """Each expert's rows times its matrix, plus its bias."""
    from transformers.integrations.moe import _grouped_linear

    bias = None if expert is None else getattr(self, f"{name}_bias")[expert]
    result: Tensor = _grouped_linear(rows, getattr(self, name), ends, bias=bias, is_transposed=self.is_transposed)
    return result
