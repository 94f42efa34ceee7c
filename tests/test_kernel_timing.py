"""CUDA graphs between events, with a stand-in for torch.cuda whose clock the calls move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mqbench.harness.bench import timing
from mqbench.harness.bench.contender import Check, Contender
from mqbench.harness.bench.timing import GraphTimer, timer_for

L2_BYTES = 1000
CALL_MS, SLEEP_MS = 0.25, 7.0
BYTES = 4 * 8 * 2  # a vector of 8 is read and one is written


class FakeCuda:
    """Records what is captured; a replay advances the clock of the device by the time of its calls."""

    def __init__(self) -> None:
        self.now_ms, self.captured, self.graphs = 0.0, None, []

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = SimpleNamespace(L2_cache_size=L2_BYTES)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "get_device_properties": lambda _: device,
            "Stream": lambda _: stream,
            "current_stream": lambda _: stream,
            "stream": self.on_stream,
            "synchronize": lambda _: None,
            "CUDAGraph": lambda: FakeGraph(self),
            "graph": self.capture,
            "Event": lambda enable_timing: FakeEvent(self),
            "_sleep": self.sleep,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextmanager
    def capture(self, graph: FakeGraph) -> Iterator[None]:
        self.captured = graph
        yield
        self.captured = None
        self.graphs.append(graph)

    def sleep(self, cycles: int) -> None:
        self.now_ms += SLEEP_MS

    def call(self, x: Tensor) -> Tensor:
        y = x + 1
        if self.captured is not None:
            self.captured.calls.append((x.data_ptr(), y.data_ptr()))
        return y


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.calls = cuda, []

    def replay(self) -> None:
        self.cuda.now_ms += CALL_MS * len(self.calls)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at_ms = cuda, -1.0

    def record(self) -> None:
        self.at_ms = self.cuda.now_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.replace(monkeypatch)
    return fake


def prepare(cuda: FakeCuda, sample_ms: float, num_bytes: int = BYTES) -> Any:
    timer = timer_for(torch.device("cuda"), sample_ms)
    assert isinstance(timer, GraphTimer)
    return timer.prepare(Contender(cuda.call, (torch.zeros(8),), lambda _: Check(0.0, 1.0), num_bytes))


def test_a_sample_is_the_time_of_one_call_without_the_wait_before(cuda: FakeCuda) -> None:
    assert prepare(cuda, sample_ms=20.0).sample() == pytest.approx(CALL_MS)


def test_a_sample_lasts_as_long_as_asked_for(cuda: FakeCuda) -> None:
    prepare(cuda, sample_ms=20.0)
    copies = timing.num_copies(BYTES, L2_BYTES)
    assert len(cuda.graphs[-1].calls) == copies * 3  # 32 copies of 0.25 ms: 8, 16, 24 ms
    assert len(cuda.graphs) == 2


def test_inputs_and_results_rotate_through_more_than_the_cache(cuda: FakeCuda) -> None:
    prepare(cuda, sample_ms=1.0)
    calls, copies = cuda.graphs[-1].calls, timing.num_copies(BYTES, L2_BYTES)
    assert copies * BYTES >= 2 * L2_BYTES
    assert len({x for x, _ in calls}) == len({y for _, y in calls}) == copies


def test_one_call_longer_than_a_sample_is_captured_once(cuda: FakeCuda) -> None:
    replay = prepare(cuda, sample_ms=0.01, num_bytes=2 * L2_BYTES)
    assert len(cuda.graphs) == 1 and len(cuda.graphs[0].calls) == 1
    assert torch.equal(replay.result, torch.ones(8))


def test_copies_exceed_the_cache_twice_and_stand_elsewhere() -> None:
    assert timing.num_copies(30, 50) == 4 and timing.num_copies(1000, 50) == 1
    assert timing.num_copies(1, 1 << 30) == timing.MAX_COPIES
    x = torch.ones(2)
    first, second = timing.input_sets((x, None, 3), 2)
    assert first[0] is x and second[0].data_ptr() != x.data_ptr() and torch.equal(second[0], x)
    assert second[1:] == (None, 3)
