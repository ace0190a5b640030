"""Capture and replay, on a device that records: numbers of replays, caches in place, results, limits, failures."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_fusion.capture.device import GraphDevice
from tests.capture.recording import Captured, captured, recording_device

aten = torch.ops.aten


@pytest.fixture
def device() -> GraphDevice:
    return recording_device()


def agrees(mine: Captured, fn: Any, *args: Any) -> None:
    """One call gives what the function gives, in values and layout."""
    expected = fn(*[arg.clone() if isinstance(arg, Tensor) else arg for arg in args])
    actual = mine.run(*args)
    for a, e in zip(actual if isinstance(actual, tuple) else (actual,), expected if isinstance(expected, tuple) else (expected,)):
        if isinstance(e, Tensor):
            torch.testing.assert_close(a, e)
            assert a.stride() == e.stride()
        else:
            assert a == e


class TestReplays:
    def test_eager_then_captured_then_replayed(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(torch.sin, device, monkeypatch)
        for _ in range(4):
            agrees(mine, torch.sin, torch.randn(3))
        assert mine.log == ["capture", "replay", "replay", "replay"]

    def test_sizes_that_come_once_are_not_captured(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(torch.sin, device, monkeypatch, dynamic=True)
        for size in (3, 4, 5, 6):
            agrees(mine, torch.sin, torch.randn(size))
        assert mine.log == []

    def test_one_capture_for_each_size(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor) -> Tensor:
            return F.silu(x) + x.size(0)

        mine = captured(fn, device, monkeypatch, dynamic=True)
        for size in (3, 4, 3, 4, 3, 4):
            agrees(mine, fn, torch.randn(size, 2))
        assert mine.log.count("capture") == 2
        assert mine.log.count("replay") == 4

    def test_parameters_lie_in_place(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = nn.Linear(3, 3)
        mine = captured(layer, device, monkeypatch)
        for _ in range(3):
            agrees(mine, layer, torch.randn(2, 3))
            with torch.no_grad():
                layer.weight.mul_(2)
        (capture,) = mine.replayer.captures.values()
        assert len(capture.buffers) == 1
        assert len(capture.memory) == 2

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.randn(4, 3).t(),
            lambda: torch.randn(3, 8)[:, ::2],
            lambda: torch.randn(3, 1).expand(3, 4),
            lambda: torch.randn(1, 4).expand(3, 4),
            lambda: torch.randn(20)[4:16].view(3, 4),
        ],
    )
    def test_inputs_keep_their_layout(self, make: Any, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.sum(0)

        mine = captured(fn, device, monkeypatch)
        for _ in range(3):
            agrees(mine, fn, make())

    def test_host_scalars_are_part_of_the_key(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor, scale: Tensor) -> Tensor:
            return x * scale

        mine = captured(fn, device, monkeypatch)
        for value in (2.0, 2.0, 3.0, 2.0, 3.0, 2.0):
            agrees(mine, fn, torch.randn(3), torch.tensor(value, dtype=torch.float64))
        assert mine.log.count("capture") == 2

    def test_numbers_are_part_of_the_key(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor, n: int) -> tuple[Tensor, int]:
            return x * n, n + 1

        mine = captured(fn, device, monkeypatch, dynamic=True)
        for n in (2, 2, 3, 3, 2, 3):
            agrees(mine, fn, torch.randn(3), n)
        assert mine.log.count("capture") == 2

    def test_inputs_that_are_the_same_tensor(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor, y: Tensor) -> Tensor:
            return x + y

        mine = captured(fn, device, monkeypatch)
        for _ in range(3):
            base = torch.randn(4)
            agrees(mine, fn, base[:3], base[1:])

    def test_a_call_leaves_its_list_empty(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(torch.sin, device, monkeypatch)
        mine.run(torch.randn(3))
        for _ in range(2):
            arguments = [torch.randn(3)]
            mine.replayer(arguments)
            assert arguments == []


class TestCaches:
    @staticmethod
    def step(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
        cache.index_copy_(0, at, x)
        return cache.sum(0)

    def test_are_written_in_place_once_a_call(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def count(cache: Tensor, x: Tensor) -> Tensor:
            cache.add_(x)
            return cache * 2

        mine = captured(count, device, monkeypatch)
        cache, expected = torch.zeros(3), torch.zeros(3)
        for _ in range(5):
            x = torch.randn(3)
            torch.testing.assert_close(mine.run(cache, x), count(expected, x))
            torch.testing.assert_close(cache, expected)

    def test_another_cache_is_another_capture(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(self.step, device, monkeypatch)
        caches = [torch.zeros(4, 2), torch.zeros(4, 2)]
        twins = [cache.clone() for cache in caches]
        for i in range(6):
            x, at = torch.randn(1, 2), torch.tensor([i % 4])
            for cache, twin in zip(caches, twins):
                torch.testing.assert_close(mine.run(cache, x, at), self.step(twin, x, at))
                torch.testing.assert_close(cache, twin)
        assert mine.log.count("capture") == 2

    def test_are_not_kept_alive_and_their_captures_go(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever makes a new cache for each request must not run into the limit."""
        mine = captured(self.step, device, monkeypatch, capture_limit=2)
        kept = torch.zeros(4, 2)
        for _ in range(2):
            mine.run(kept, torch.randn(1, 2), torch.tensor([0]))
        others = [torch.zeros(4, 2) for _ in range(6)]  # all at once, for an address may be given out again
        while others:
            cache = others.pop()
            for _ in range(3):
                mine.run(cache, torch.randn(1, 2), torch.tensor([0]))
            (capture,) = [known for known in mine.replayer.captures.values() if known.memory[0].freed() is False][1:]
            memory = capture.memory[0]
            del cache, capture
            gc.collect()
            assert memory.freed()
        assert mine.log.count("capture") == 7
        assert len(mine.replayer.captures) <= 2
        assert mine.record.notes == []

    def test_buffers_of_a_module(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("count", torch.zeros(2))

            def forward(self, x: Tensor) -> Tensor:
                self.count += 1
                return x * self.count

        module, twin = Counting(), Counting()
        mine = captured(module, device, monkeypatch)
        for _ in range(4):
            x = torch.randn(2)
            torch.testing.assert_close(mine.run(x), twin(x))
        assert mine.log.count("capture") == 1


class TestResults:
    def test_are_not_overwritten_by_the_next_replay(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(torch.sin, device, monkeypatch)
        xs = [torch.randn(3) for _ in range(5)]
        results = [mine.run(x) for x in xs]
        for x, result in zip(xs, results):
            torch.testing.assert_close(result, torch.sin(x))

    def test_keep_their_layout(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor) -> tuple[Tensor, ...]:
            y = x + 1
            return (x * 2).t(), y[:, -1:], y[0].expand(2, 4), torch.zeros(0, 3) + x.sum()

        mine = captured(fn, device, monkeypatch)
        for _ in range(3):
            agrees(mine, fn, torch.randn(3, 4))

    def test_that_share_memory_share_it_afterwards(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = x + 1
            return y, y[1:], y.view(torch.int32)

        mine = captured(fn, device, monkeypatch)
        for _ in range(3):
            y, rest, bits = mine.run(torch.zeros(4))
            y[2] = 5.0
            assert rest.tolist() == [1.0, 5.0, 1.0]
            assert bits[2] == torch.tensor(5.0).view(torch.int32)

    def test_an_input_comes_back_as_itself(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(cache: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
            cache.mul_(x)
            return cache, x, cache[1:], None

        mine = captured(fn, device, monkeypatch)
        cache = torch.ones(3)
        for _ in range(3):
            x = torch.randn(3)
            same, also, rest, nothing = mine.run(cache, x)
            assert same is cache
            assert also is x
            assert rest.data_ptr() == cache[1:].data_ptr()
            assert nothing is None


class TestLimits:
    def test_beyond_the_limit_a_graph_runs_eagerly_and_says_so(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(torch.sin, device, monkeypatch, dynamic=True, capture_limit=2)
        for size in (2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5):
            agrees(mine, torch.sin, torch.randn(size))
        assert mine.log.count("capture") == 2
        assert mine.log.count("replay") == 4
        (note,) = mine.record.notes
        assert "capture limit of 2 reached: other sizes and addresses run eagerly" in note
        assert mine.record.config.executor == "graph"

    def test_one_pool_for_all_captures_as_long_as_one_lives(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(torch.sin, device, monkeypatch, dynamic=True)
        also = captured(torch.cos, device, monkeypatch)
        for size in (2, 3, 2, 3):
            mine.run(torch.randn(size))
        for _ in range(2):
            also.run(torch.randn(3))
        assert device.module.pools == [1, 1, 1]
        mine.replayer.captures.clear()
        also.replayer.captures.clear()
        gc.collect()
        for _ in range(2):
            also.run(torch.randn(3))
        assert device.module.pools[3:] == [2]

    def test_under_somebody_elses_capture_it_runs_eagerly(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(torch.sin, device, monkeypatch)
        for _ in range(3):
            mine.run(torch.randn(3))
        device.module.foreign = True
        agrees(mine, torch.sin, torch.randn(3))
        assert mine.log == ["capture", "replay", "replay"]

    def test_another_stream_waits_for_the_one_before(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = captured(torch.sin, device, monkeypatch)
        for _ in range(3):
            mine.run(torch.randn(3))
        with device.module.stream(device.module.Stream()):
            mine.run(torch.randn(3))
        assert mine.log[-2:] == ["side waits for main", "replay"]

    def test_threads_take_turns(self, device: GraphDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor) -> Tensor:
            return (x * 2 + 1).sin()

        mine = captured(fn, device, monkeypatch)
        for _ in range(2):
            mine.run(torch.randn(64))
        wrong: list[int] = []

        def work(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            for i in range(30):
                x = torch.randn(64, generator=generator)
                if not torch.equal(mine.replayer([x])[0], fn(x)):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


class TestFailures:
    def test_leave_the_graph_running_and_name_the_op(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Nothing is computed twice, in place or not."""
        device = recording_device(refuses=lambda op: op is aten.cos.default)

        def fn(cache: Tensor, x: Tensor) -> Tensor:
            cache.add_(1)
            return torch.sin(x) + torch.cos(x)

        mine = captured(fn, device, monkeypatch)
        cache = torch.zeros(3)
        stream = device.module.current_stream()
        with caplog.at_level("WARNING", "npu_fusion"):
            for step in range(1, 5):
                x = torch.randn(3)
                torch.testing.assert_close(mine.run(cache, x), torch.sin(x) + torch.cos(x))
                assert cache.tolist() == [step] * 3
        assert len(caplog.records) == 1
        assert mine.record.config.executor == "eager"
        (note,) = mine.record.notes
        reason = "cos (aten.cos.default): operation not permitted when stream is capturing: aten.cos.default"
        assert note.startswith(f"executor eager in place of graph: capture failed: {reason}, at ")
        assert "test_replay.py:" in note
        assert device.module.current_stream() is stream
        assert mine.log == ["capture", "capture"]  # the second is empty, and ends the first for the random generators
