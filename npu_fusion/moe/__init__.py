"""MoE collectives: dispatch and combine as ops that a graph capture can hold, on gloo, NCCL, symmetric memory and Ascend.

    sent = npu_fusion.moe.dispatch(x, ids, weights, experts, group=group, max_tokens=128)
    y = npu_fusion.moe.combine(experts(sent.rows, sent.counts), sent)

    npu_fusion.moe.expert_parallel(model, group)      # a transformers model, its experts shared by the ranks

`plan` has the index arithmetic, `transport` how rows are moved, `npu_fusion.ops.moe_collectives` the ops.
"""

from ..errors import CollectiveError
from .api import Dispatched, check, combine, dispatch, prepare
from .buffer import Buffer
from .parallel import expert_parallel
from .plan import with_shared_experts

__all__ = ["Buffer", "CollectiveError", "Dispatched", "check", "combine", "dispatch", "expert_parallel", "prepare", "with_shared_experts"]
