"""CUDA graphs of our own on a CUDA device: a thousand replays, decoding into a static cache, lengths, streams, threads. `make gpu-test`."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import npu_fusion
from npu_fusion.backend import FusionBackend
from npu_fusion.config import FusionConfig

pytestmark = pytest.mark.gpu

WIDTH, HEADS, ROOM = 128, 4, 64


class Layer(nn.Module):
    """Norm, attention over a static cache, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 256), nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        seen = torch.arange(ROOM, device=x.device) <= at[-1]
        x = x + self.out(F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None, None, None]).transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, caches: list[Tensor], at: Tensor) -> Tensor:
        for layer, keys, values in zip(self.layers, caches[::2], caches[1::2]):
            x = layer(x, keys, values, at)
        return x


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().cuda().eval()


def new_caches(batch: int = 2) -> list[Tensor]:
    return [torch.zeros(batch, HEADS, ROOM, WIDTH // HEADS, device="cuda") for _ in range(4)]


def compiled(fn: Any, dynamic: bool = False, **options: Any) -> Callable[..., Any]:
    """The compiled function, run without gradients; it has the `backend` with its records."""
    backend = FusionBackend(FusionConfig(executor="graph", **options))
    run = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)

    def call(*args: Any) -> Any:
        with torch.no_grad():
            return run(*args)

    call.backend, call.run = backend, run  # type: ignore[attr-defined]
    return call


def assert_captured(run: Any) -> None:
    assert {record.config.executor for record in run.backend.records} == {"graph"}
    assert [note for record in run.backend.records for note in record.notes if "eager" in note] == []


def memory() -> tuple[int, int]:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def test_a_thousand_replays_with_changing_inputs() -> None:
    model, caches, twins = decoder(), new_caches(), new_caches()
    run = compiled(model)
    first = torch.randn(2, 1, WIDTH, device="cuda")
    positions = [torch.tensor([i], device="cuda") for i in range(ROOM)]
    beginning = run(first, caches, positions[0])
    with torch.no_grad():
        torch.testing.assert_close(beginning, model(first, twins, positions[0]), rtol=1e-4, atol=1e-4)
        used = []
        for step in range(1, 1020):
            x = torch.randn(2, 1, WIDTH, device="cuda")
            actual, expected = run(x, caches, positions[step % ROOM]), model(x, twins, positions[step % ROOM])
            if step % 51 == 19:
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
                used.append(memory())
    torch.testing.assert_close(caches, twins, rtol=1e-4, atol=1e-4)
    allocated, reserved = zip(*used)
    assert set(allocated) == {allocated[0]}
    assert max(reserved) == reserved[1], "after the first round of what runs beside it"
    again, once_more = (run(first, caches, positions[0]) for _ in range(2))
    assert torch.equal(again, once_more), "replays of one input agree to the bit"
    assert_captured(run)


def test_replays_equal_the_eager_executor_bit_for_bit() -> None:
    """The same FX graph, captured or not."""
    model = decoder()
    options = {"executor": "eager"}
    eager = torch.compile(model, backend="npu_fusion", dynamic=False, options=options)
    run = compiled(model)
    caches, twins = new_caches(), new_caches()
    for step in range(8):
        x, at = torch.randn(2, 1, WIDTH, device="cuda"), torch.tensor([step], device="cuda")
        actual = run(x, caches, at)
        with torch.no_grad():
            expected = eager(x, twins, at)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(caches, twins, rtol=0, atol=1e-6)
    npu_fusion.report(run.run).expect(rms_norm=4, glu=2, attention=2, kv_update=4)  # type: ignore[attr-defined]


def test_shapes_share_memory_and_keep_their_results_apart() -> None:
    """Prompts of several lengths: results of one stay what they are while others replay."""
    mlp = nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 8192), nn.SiLU(), nn.Linear(8192, WIDTH)).cuda().eval()
    run = compiled(mlp, dynamic=True)
    kept: list[tuple[Tensor, Tensor]] = []
    reserved = []
    for length in (1024, 1000, 960, 900, 1024, 1000, 960, 900):
        for _ in range(2):
            x = torch.randn(length, WIDTH, device="cuda")
            with torch.no_grad():
                kept.append((run(x), mlp(x)))
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    for actual, expected in kept:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    one = 1024 * 8192 * 4
    assert reserved[3] - reserved[0] < one, f"four captures, {one} bytes for the largest result of one: {reserved}"
    assert_captured(run)


def test_lengths_that_change() -> None:
    """A length that a kernel launch depends on is a capture each; met once, none."""

    def attend(q: Tensor, cache: Tensor, length: int) -> Tensor:
        return F.scaled_dot_product_attention(q, cache[:, :, :length], cache[:, :, :length]) * 2

    run = compiled(attend, dynamic=True, capture_limit=4)
    cache = torch.randn(2, HEADS, ROOM, 32, device="cuda")
    for round_ in range(3):
        for length in range(8, 20):
            q = torch.randn(2, HEADS, 1, 32, device="cuda")
            torch.testing.assert_close(run(q, cache, length), attend(q, cache, length), rtol=1e-4, atol=1e-4, msg=f"{round_} {length}")
    notes = [note for record in run.backend.records for note in record.notes]  # type: ignore[attr-defined]
    assert [note for note in notes if "capture limit of 4 reached" in note]


def test_a_new_cache_for_each_request_does_not_pile_up() -> None:
    model = decoder()
    run = compiled(model, capture_limit=3)
    allocated = []
    held: list[list[Tensor]] = []
    for _ in range(12):
        caches = new_caches()
        held = [*held[-1:], caches]  # addresses differ from one request to the next
        for step in range(4):
            run(torch.randn(2, 1, WIDTH, device="cuda"), caches, torch.tensor([step], device="cuda"))
        gc.collect()
        allocated.append(memory()[0])
    assert max(allocated[6:]) <= max(allocated[2:6]), allocated
    assert_captured(run)


def test_random_numbers_differ_between_replays_and_follow_the_seed() -> None:
    run = compiled(lambda x: x + torch.rand_like(x))
    x = torch.zeros(1024, device="cuda")
    drawn = [run(x) for _ in range(6)]
    for i, one in enumerate(drawn):
        assert all(not torch.equal(one, other) for other in drawn[:i])
        assert 0.4 < one.mean().item() < 0.6
    torch.cuda.manual_seed(3)
    first = run(x)
    torch.cuda.manual_seed(3)
    assert torch.equal(run(x), first)


def test_side_streams_take_turns() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4096), nn.ReLU(), nn.Linear(4096, WIDTH)).cuda().eval()
    run = compiled(model)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results: list[tuple[Tensor, Tensor]] = []
    for i in range(60):
        x = torch.randn(512, WIDTH, device="cuda")
        stream = streams[i % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append((x, run(x)))
    torch.cuda.synchronize()
    with torch.no_grad():
        for x, actual in results:
            torch.testing.assert_close(actual, model(x), rtol=1e-3, atol=1e-3)


def test_threads_take_turns() -> None:
    run = compiled(lambda x: torch.relu(x * 2) + 1)
    for _ in range(3):
        run(torch.randn(4096, device="cuda"))
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(100):
                x = torch.full((4096,), float(seed * 1000 + i), device="cuda")
                if not torch.equal(run(x), torch.relu(x * 2) + 1):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_inputs_keep_their_layout_and_results_theirs() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x + 1
        return y, y[:, -1:], x.sum(0)

    for make in (
        lambda: torch.randn(8, 6, device="cuda").t(),
        lambda: torch.randn(6, 16, device="cuda")[:, ::2],
        lambda: torch.randn(6, 1, device="cuda").expand(6, 8),
    ):
        run = compiled(fn)
        for _ in range(4):
            x = make()
            for actual, expected in zip(run(x), fn(x)):
                torch.testing.assert_close(actual, expected)
                assert actual.stride() == expected.stride()
        assert_captured(run)
        torch.compiler.reset()


def test_under_an_outer_capture_kernels_belong_to_that() -> None:
    run = compiled(lambda x: torch.sigmoid(x) * 3)
    x = torch.randn(64, device="cuda")
    for _ in range(3):
        run(x)
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        result = run(x)
    x.copy_(torch.randn(64, device="cuda"))
    outer.replay()
    torch.testing.assert_close(result, torch.sigmoid(x) * 3)


def test_captures_can_all_be_dropped_and_made_again() -> None:
    """The shared pool goes with its last capture; what cuBLAS keeps in it must not get in the way of the next."""
    for _ in range(3):
        layer = nn.Linear(256, 256).cuda().eval()
        run = compiled(layer)
        for _ in range(4):
            x = torch.randn(64, 256, device="cuda")
            with torch.no_grad():
                torch.testing.assert_close(run(x), layer(x), rtol=1e-3, atol=1e-3)
        assert_captured(run)
        del run
        torch.compiler.reset()
        gc.collect()


def test_what_cannot_be_captured_runs_eagerly_and_is_named() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * torch.argmax(x).item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = compiled(fn)
        for _ in range(3):
            x = torch.randn(8, device="cuda")
            torch.testing.assert_close(run(x), fn(x))
    (record,) = run.backend.records  # type: ignore[attr-defined]
    assert record.config.executor == "eager"
    assert any("reads a value back to the host, at" in note and "test_capture.py:" in note for note in record.notes)


def test_a_capture_that_fails_leaves_the_device_usable() -> None:
    """An op that says nothing of its synchronising, so that only the device refuses it."""
    library = torch.library.Library("npu_fusion_test_gpu", "DEF")
    library.define("sync(Tensor x) -> Tensor")

    def sync(x: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return x * 2

    library.impl("sync", sync, "CUDA")
    library.impl("sync", torch.empty_like, "Meta")
    run = compiled(lambda x: torch.ops.npu_fusion_test_gpu.sync(x) + 1)
    for _ in range(4):
        x = torch.randn(8, device="cuda")
        torch.testing.assert_close(run(x), x * 2 + 1)
    (record,) = run.backend.records  # type: ignore[attr-defined]
    assert record.config.executor == "eager"
    assert any("capture failed: sync (npu_fusion_test_gpu.sync.default)" in note for note in record.notes)
    after = compiled(torch.sigmoid)
    for _ in range(3):
        x = torch.randn(8, device="cuda")
        torch.testing.assert_close(after(x), torch.sigmoid(x))
    assert_captured(after)
