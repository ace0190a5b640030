"""Tensor-parallel layers: every spelling of a product with its collective that fuses, near misses that do not, and what a target lacks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol

import npu_fusion
from tests.patterns.support import fused
from tests.tensor_parallel import WORLD, all_gathered, all_reduced, calls_of, fake_ranks, fused_graph, reduce_scattered

M, K, N = 6, 256, 16
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "npu_mm_all_reduce_base", "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"
c10d: Any = torch.ops._c10d_functional
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Please use:FutureWarning")  # the names that torch has had for longest


@pytest.fixture(autouse=True)
def _ranks() -> Iterator[None]:
    with fake_ranks():
        yield


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x, a matrix [K, N], one stored transposed [N, K], and a vector [N]."""
    matrix = torch.randn(K, N) / K**0.5
    return [t.to(dtype) for t in (torch.randn(*(shape or (M, K))), matrix, matrix.t().contiguous(), torch.randn(N))]


Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Any]

ROWS: dict[str, tuple[Spelling, str]] = {
    "mm, all_reduce": (lambda x, w, t, b: all_reduced(x @ w), ALL_REDUCE),
    "linear, all_reduce": (lambda x, w, t, b: all_reduced(F.linear(x, t)), ALL_REDUCE),
    "linear with bias, all_reduce": (lambda x, w, t, b: all_reduced(F.linear(x, t, b / 2)), ALL_REDUCE),
    "bias added, all_reduce": (lambda x, w, t, b: all_reduced(b + x @ w), ALL_REDUCE),
    "all_reduce of a view": (lambda x, w, t, b: all_reduced((x @ w).view(2, -1, N)), ALL_REDUCE),
    "all_reduce, bias after it": (lambda x, w, t, b: all_reduced(x @ w) + b, ALL_REDUCE),
    "all_reduce_coalesced": (lambda x, w, t, b: funcol.all_reduce_coalesced([x @ w, x.relu() @ w], "sum", WORLD), f"{ALL_REDUCE} twice"),
    "all_gather, mm": (lambda x, w, t, b: all_gathered(x) @ w, ALL_GATHER),
    "all_gather, linear": (lambda x, w, t, b: F.linear(all_gathered(x), t), ALL_GATHER),
    "all_gather, read besides": (lambda x, w, t, b: [F.linear(y := all_gathered(x), t), y * 2], ALL_GATHER),
    "all_gather, bias added apart": (lambda x, w, t, b: [y := all_gathered(x) @ w, y + b], ALL_GATHER),
    "all_gather waited for twice": (
        lambda x, w, t, b: [c10d.wait_tensor(y := c10d.all_gather_into_tensor(x, 2, WORLD)) @ w, c10d.wait_tensor(y) * 2],
        ALL_GATHER,
    ),
    "all_gather_coalesced": (
        lambda x, w, t, b: [y @ w for y in funcol.all_gather_into_tensor_coalesced([x, x.relu()], WORLD)],
        f"{ALL_GATHER} twice",
    ),
    "chunks gathered and joined again": (lambda x, w, t, b: torch.cat(all_gathered(x).chunk(2)) @ w, ALL_GATHER),
    "mm, reduce_scatter": (lambda x, w, t, b: reduce_scattered(x @ w), REDUCE_SCATTER),
    "linear, reduce_scatter": (lambda x, w, t, b: reduce_scattered(F.linear(x, t)), REDUCE_SCATTER),
    "reduce_scatter_coalesced": (
        lambda x, w, t, b: funcol.reduce_scatter_tensor_coalesced([x @ w, x.relu() @ w], "sum", [0, 0], WORLD),
        f"{REDUCE_SCATTER} twice",
    ),
}
SEQUENCES: dict[str, tuple[Spelling, str, tuple[int, ...]]] = {
    "batch, all_reduce": (lambda x, w, t, b: all_reduced(F.linear(x, t)), ALL_REDUCE, (2, 3, K)),
    "batch with bias, all_reduce": (lambda x, w, t, b: all_reduced(F.linear(x, t, b)), ALL_REDUCE, (2, 3, K)),
    "sequence first, all_gather": (lambda x, w, t, b: F.linear(all_gathered(x), t), ALL_GATHER, (3, 2, K)),
    "one sequence, all_gather": (lambda x, w, t, b: F.linear(funcol.all_gather_tensor(x, 1, WORLD), t), ALL_GATHER, (1, M, K)),
    "one sequence, chunks joined": (lambda x, w, t, b: F.linear(torch.cat(all_gathered(x).chunk(2), 1), t), ALL_GATHER, (1, M, K)),
    "sequence first, reduce_scatter": (lambda x, w, t, b: reduce_scattered(F.linear(x, t)), REDUCE_SCATTER, (4, 2, K)),
    "one sequence, reduce_scatter": (
        lambda x, w, t, b: funcol.reduce_scatter_tensor(F.linear(x, t), "sum", 1, WORLD),
        REDUCE_SCATTER,
        (1, M, K),
    ),
}


def check_fused(spelling: Spelling, expected: str, shape: tuple[int, ...], dtype: torch.dtype, dynamic: bool) -> None:
    op, _, twice = expected.partition(" ")
    gm, record = fused_graph(spelling, *inputs(*shape, dtype=dtype), dynamic=dynamic)
    assert calls_of(gm) == [op] * (2 if twice else 1)
    assert {site.lowered_to for site in record.sites} == {f"npu.{op}"}
    assert all(site.fused for site in record.sites)


FORMS = itertools.cycle(itertools.product((torch.bfloat16, torch.float16), (True, False)))  # each spelling in one of them, in turn


@pytest.mark.parametrize(("spelling", "form"), list(zip(ROWS, FORMS, strict=False)), ids=str)
def test_rows(spelling: str, form: tuple[torch.dtype, bool]) -> None:
    check_fused(*ROWS[spelling], (M, K), *form)


@pytest.mark.parametrize("spelling", SEQUENCES)
def test_sequences(spelling: str) -> None:
    fn, op, shape = SEQUENCES[spelling]
    check_fused(fn, op, shape, torch.bfloat16, dynamic=False)


@pytest.mark.parametrize("spelling", ["batch, all_reduce", "batch with bias, all_reduce"])
def test_sequences_of_any_number_and_length(spelling: str) -> None:
    fn, op, shape = SEQUENCES[spelling]
    check_fused(fn, op, shape, torch.bfloat16, dynamic=True)


def test_several_layers_read_what_one_of_them_gathers() -> None:
    gm, _ = fused_graph(lambda x, w, t, b: [(y := all_gathered(x)) @ w, F.linear(y, t), y @ w.flip(1)], *inputs())
    assert calls_of(gm) == [ALL_GATHER, "mm", "mm"]


def test_all_reduce_then_add_and_norm() -> None:
    def block(x: Tensor, w: Tensor, t: Tensor, b: Tensor, residual: Tensor) -> list[Tensor]:
        h = residual + all_reduced(F.linear(x, t))
        wide = h.float()
        return [b * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(h.dtype), h]

    gm, record = fused_graph(block, *inputs(), torch.randn(M, N).bfloat16())
    assert calls_of(gm) == [ALL_REDUCE, "npu_add_rms_norm"]
    assert {site.idiom for site in record.sites if site.fused} == {"linear_all_reduce", "rms_norm", "residual_add"}


# -------------------------------------------------------------------- what must not fuse


def unwaited(x: Tensor, w: Tensor) -> list[Tensor]:
    """What is consumed is not what is waited for."""
    reduced = c10d.all_reduce(x @ w, "sum", WORLD)
    return [reduced * 2, c10d.wait_tensor(reduced)]


def one_of_two(x: Tensor, w: Tensor) -> list[Tensor]:
    """Of two coalesced all-reduces one is of a product."""
    return funcol.all_reduce_coalesced([x @ w, x], "sum", WORLD)


NEAR_MISSES: dict[str, tuple[Spelling, str]] = {
    "a mean": (lambda x, w, t, b: all_reduced(x @ w, "avg"), "reduction = avg, expected sum"),
    "a maximum": (lambda x, w, t, b: all_reduced(x @ w, "max"), "reduction = max, expected sum"),
    "a scattered mean": (lambda x, w, t, b: reduce_scattered(x @ w, "avg"), "reduction = avg, expected sum"),
    "the product is read besides": (lambda x, w, t, b: [all_reduced(y := x @ w), y], "product is read besides"),
    "the product is activated besides": (lambda x, w, t, b: [all_reduced(y := x @ w), y.relu()], "product is read besides"),
    "the product is read before its bias": (lambda x, w, t, b: [all_reduced((y := x @ w) + b), y.relu()], "product is read besides"),
    "the product is reduced twice": (lambda x, w, t, b: [all_reduced(y := x @ w), all_reduced(y.relu())], "product is read besides"),
    "a view of the product is read besides": (lambda x, w, t, b: [all_reduced(y := x @ w), y.view(-1)], "product is read besides"),
    "a scattered product is read besides": (lambda x, w, t, b: [reduce_scattered(y := x @ w), y * 2], "product is read besides"),
    "a residual is added before": (lambda x, w, t, b: all_reduced(x @ w + x[:, :N]), "not one vector along the outputs"),
    "a number for each row is added before": (lambda x, w, t, b: all_reduced(x @ w + x[:, :1]), "not one vector along the outputs"),
    "the sum is in fp32": (lambda x, w, t, b: all_reduced((x @ w).float()), ""),
    "the product is activated": (lambda x, w, t, b: all_reduced((x @ w).relu()), ""),
    "the product is transposed": (lambda x, w, t, b: all_reduced((x @ w).t().contiguous()), ""),
    "no wait": (lambda x, w, t, b: unwaited(x, w), ""),
    "one of two coalesced": (lambda x, w, t, b: one_of_two(x, w), "no fewer"),
    "a matrix for each batch": (
        lambda x, w, t, b: all_reduced(torch.bmm(x.view(2, 3, K), torch.stack([w, w * 2]))),
        "not multiplied with one matrix",
    ),
    "the weight is gathered": (lambda x, w, t, b: x @ all_gathered(w[: K // 2]), ""),
    "what is gathered is activated": (lambda x, w, t, b: all_gathered(x).relu() @ w, ""),
    "gathered along the last dimension": (
        lambda x, w, t, b: funcol.all_gather_tensor(x[:, : K // 2].contiguous(), 1, WORLD) @ w,
        "another order",
    ),
    "gathered along the tokens of a batch": (
        lambda x, w, t, b: F.linear(funcol.all_gather_tensor(x.view(3, 2, K), 1, WORLD), t),
        "another order",
    ),
    "chunks joined in another order": (lambda x, w, t, b: torch.cat(all_gathered(x).chunk(2)[::-1]) @ w, ""),
    "scattered along the outputs": (lambda x, w, t, b: funcol.reduce_scatter_tensor(x @ w, "sum", 1, WORLD), "another order"),
    "scattered along the tokens of a batch": (
        lambda x, w, t, b: funcol.reduce_scatter_tensor(F.linear(x.view(3, 2, K), t), "sum", 1, WORLD),
        "another order",
    ),
    "reduced in other rows": (lambda x, w, t, b: all_reduced((x @ w).view(-1, 2 * N)), "does not have the rows of the product"),
    "multiplied in other rows": (
        lambda x, w, t, b: all_gathered(x).view(-1, K // 2) @ w[: K // 2],
        "does not have the rows that were gathered",
    ),
    "the operands depend on each other": (lambda x, w, t, b: (y := all_gathered(x)) @ y.t(), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_as_they_are(name: str) -> None:
    fn, reason = NEAR_MISSES[name]
    gm, record = fused_graph(fn, *inputs())
    assert not any(call.startswith("npu_") for call in calls_of(gm))
    missed = [site.reason or "" for site in record.sites if not site.fused]
    assert reason in " ".join(missed)
    assert not reason or missed


@pytest.mark.parametrize(
    ("fn", "given", "options", "reason"),
    [
        (ROWS["mm, all_reduce"][0], inputs(), {"target": "cpu"}, "nothing on cpu is known to compute it as one"),
        (ROWS["mm, all_reduce"][0], inputs(), {"target": "ascend910_93"}, "nothing on ascend910_93 is known"),
        (ROWS["mm, all_reduce"][0], inputs(dtype=torch.float32), {}, "x1 is float32"),
        (ROWS["linear, all_reduce"][0], inputs(1, K), {}, "one token"),
        (SEQUENCES["batch, all_reduce"][0], inputs(4, 1, K), {}, "one token"),
        (ROWS["mm, all_reduce"][0], inputs(), {"executor": "npugraph_ex"}, "captured graph"),
        (ROWS["all_gather, mm"][0], inputs(), {"executor": "torchair"}, "torchair cannot convert"),
        (lambda x, w, t, b: all_gathered(x[:, :128].contiguous()) @ w[:128], inputs(), {}, "x2[0] is 128, not known to be at least 256"),
        (lambda x, w, t, b: reduce_scattered(x[:, :128] @ w[:128]), inputs(), {}, "x2[0] is 128, not known to be at least 256"),
        (lambda x, w, t, b: F.linear(all_gathered(x), t, b), inputs(), {}, "it takes no bias"),
        (lambda x, w, t, b: reduce_scattered(F.linear(x, t, b)), inputs(), {}, "it takes no bias"),
        (lambda x, w, t, b: all_gathered(x, 4) @ w, inputs(), {}, "has 2 ranks, not 4"),
        (lambda x, w, t, b: all_reduced(x @ w, group="nobody"), inputs(), {}, "there is no process group 'nobody'"),
    ],
)  # fmt: skip
def test_what_the_target_does_not_take_stays_as_it_is(fn: Spelling, given: list[Tensor], options: dict[str, Any], reason: str) -> None:
    gm = torch.fx.experimental.proxy_tensor.make_fx(fn, tracing_mode="fake")(*given)
    before = [str(node.target) for node in gm.graph.nodes]
    config = npu_fusion.FusionConfig(**{"target": "ascend910b", "emulate": options.get("target") != "cpu", **options})
    npu_fusion.fuse(gm, given, config)
    assert [str(node.target) for node in gm.graph.nodes] == before
    [site] = gm.meta["npu_fusion_record"].sites
    assert not site.fused
    assert reason in (site.reason or "")


# -------------------------------------------------------------------- as Dynamo writes them


def test_collectives_of_torch_distributed() -> None:
    x, w, *_ = inputs()

    def model(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reduced = x @ w
        dist.all_reduce(reduced)
        gathered = x.new_empty(2 * M, K)
        dist.all_gather_into_tensor(gathered, x)
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x.relu())
        scattered = x.new_empty(M // 2, N)
        dist.reduce_scatter_tensor(scattered, x @ w)
        return reduced, gathered @ w + torch.cat(parts) @ w, scattered

    outputs, report = fused(model, x, config=npu_fusion.FusionConfig(target="ascend910b", emulate=True))
    assert calls_of(report.graph("lowered")) == [ALL_REDUCE, ALL_GATHER, ALL_GATHER, REDUCE_SCATTER]
    for actual, expected in zip(outputs, model(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.up, self.down = nn.Linear(K, 2 * K, bias=False), nn.Linear(2 * K, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


@pytest.mark.parametrize(
    ("dim", "shape", "dynamic", "expected"),
    [
        (0, (M, K), True, ["all_gather_linear", "linear_reduce_scatter"]),
        (1, (1, M, K), False, ["all_gather_linear", "linear_reduce_scatter"]),
    ],
)
def test_dtensor(dim: int, shape: tuple[int, ...], dynamic: bool, expected: list[str]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    model = Layer().bfloat16()
    norm = SequenceParallel(sequence_dim=dim, use_local_output=True)
    plan = {"norm": norm, "up": ColwiseParallel(input_layouts=Shard(dim)), "down": RowwiseParallel(output_layouts=Shard(dim))}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    x = torch.randn(shape, dtype=torch.bfloat16)
    actual, report = fused(model, x, dynamic=dynamic, config=npu_fusion.FusionConfig(target="ascend910b", emulate=True))
    parallel = ("linear_all_reduce", "all_gather_linear", "linear_reduce_scatter")
    assert [site.op for site in report.sites if site.idiom in parallel and site.fused] == expected
    assert not [site for site in report.missed if site.idiom in parallel]
    with torch.no_grad():
        torch.testing.assert_close(actual, model(x), rtol=2e-2, atol=2e-2)
