"""MoE collectives on Ascend: torch_npu's ops with our arguments, of the sizes that the fake kernels say, captured without a host sync.

HCCL is not simulated: the group is torch's fake one, and the communicator's name is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import npu_fusion
from npu_fusion import moe
from npu_fusion.moe import ascend
from tests.virtual_npu.launches import Trace

EXPERTS, TOP_K, MOST, HIDDEN = 16, 4, 32, 1024


@pytest.fixture(autouse=True)
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    monkeypatch.setattr(ascend, "communicator", lambda group, rank: "hccl")
    yield
    dist.destroy_process_group()


def layer(x: Tensor, ids: Tensor, weights: Tensor, quant: str = "none") -> Tensor:
    sent = moe.dispatch(x, ids, weights, EXPERTS, max_tokens=MOST, quant=quant)
    return moe.combine((sent.rows.float() * sent.scales[:, None]).to(x.dtype), sent, shared=x)


def inputs(tokens: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16).npu()
    return x, torch.zeros(tokens, TOP_K, dtype=torch.long).npu(), torch.zeros(tokens, TOP_K).npu()


def launched(trace: Trace) -> list[str]:
    """The collectives and products of what was captured, without their versions: torch_npu takes the newest that CANN has."""
    [captured] = trace.captured
    assert captured.replays >= 3
    names = [name.rstrip("0123456789").removesuffix("V") for name in captured.launches.elements()]
    return [name for name in names if name.startswith(("aclnnMoeDistribute", "aclnnGroupedMatmul"))]


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_layer_is_captured(quant: str, traced: Callable[[], Trace]) -> None:
    compiled = torch.compile(layer, backend="npu_fusion", fullgraph=True, options={"executor": "graph"})
    with torch.no_grad():
        for _ in range(4):
            compiled(*inputs(), quant)
    assert launched(traced()) == ["aclnnMoeDistributeDispatch", "aclnnMoeDistributeCombine"]


def block(x: Tensor, stream: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A router, the experts of two ranks, the residual sum and the norm of the next layer."""
    weights, ids = torch.topk(logits.softmax(-1), TOP_K)
    sent = moe.dispatch(x, ids, weights, EXPERTS, max_tokens=MOST)
    ends = sent.counts.cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(sent.rows, gate_up, ends).chunk(2, -1)
    y = moe.combine(torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, ends), sent)
    total = stream + y.view(stream.shape)
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype), total


@pytest.mark.parametrize("executor", ["graph", "npugraph_ex"])
def test_router_experts_and_norm_are_captured(executor: str, traced: Callable[[], Trace]) -> None:
    """Torch_npu's own ops from the dispatch to the norm, without a wait of the host, which a capture would not survive."""
    sizes = [(20, HIDDEN), (2, 10, HIDDEN), (20, EXPERTS), (EXPERTS // 2, HIDDEN, 128), (EXPERTS // 2, 64, HIDDEN), (HIDDEN,)]
    given = [torch.zeros(size, dtype=torch.bfloat16).npu() for size in sizes]
    compiled = torch.compile(block, backend="npu_fusion", fullgraph=True, options={"executor": executor})
    with torch.no_grad():
        for _ in range(5):
            compiled(*given)
    report = npu_fusion.report(compiled)
    assert report.effective_config.executor == executor, report.notes
    combine = "CombineAddRmsNorm" if report.effective_config.target == "ascend910_93" else "Combine"
    assert launched(traced()) == ["aclnnMoeDistributeDispatch", "aclnnGroupedMatmul", "aclnnGroupedMatmul", f"aclnnMoeDistribute{combine}"]


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_fake_kernels_have_the_sizes_of_the_device(quant: str) -> None:
    form = {"group": str(dist.group.WORLD.group_name), "ranks": 2, "experts": EXPERTS, "max_tokens": MOST, "quant": quant}
    real = torch.ops.npu_fusion.moe_dispatch(*inputs(), **form)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.npu_fusion.moe_dispatch(*[mode.from_tensor(t) for t in inputs()], **form)
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


def test_what_ascend_cannot_do_is_an_error() -> None:
    with pytest.raises(npu_fusion.CollectiveError, match="no fp8 dispatch on Ascend"):
        moe.dispatch(*inputs(), EXPERTS, max_tokens=MOST, quant="fp8")
    with pytest.raises(ValueError, match="no gradient on Ascend"):
        layer(inputs()[0].requires_grad_(), *inputs()[1:])
