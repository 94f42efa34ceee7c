"""Timing: CUDA graphs between device events, over copies of inputs and results that together exceed the L2 cache."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mqbench.harness.bench.contender import Contender

L2_FACTOR = 2
"""Inputs, results and their copies take this many times the L2 cache: each is gone from it at its next turn."""

MAX_COPIES = 128
MAX_CALLS = 4096
"""Calls in one graph."""

WARMUP_CALLS = 3
SLEEP_CYCLES = 2_000_000
"""The GPU waits this long before the first event, so that the graph's launch is over when the clock starts."""


Call = Callable[[], Any]


class Replay(Protocol):
    """A contender ready to be timed."""

    result: Any
    """Of the last call."""

    def sample(self) -> float:
        """Milliseconds per call."""


class Timer(Protocol):
    """Makes replays on one kind of device."""

    def prepare(self, contender: Contender) -> Replay: ...


def timer_for(device: torch.device, sample_ms: float) -> Timer:
    """The right timer: graphs on a GPU, plain calls elsewhere."""
    return GraphTimer(device, sample_ms) if device.type == "cuda" else CallTimer()


class CallTimer:
    """Plain calls and a host clock: to see that everything runs."""

    def prepare(self, contender: Contender) -> Replay:
        return _CallReplay(partial(contender.run, *contender.inputs))


class _CallReplay:
    def __init__(self, call: Call) -> None:
        self._call = call
        self.result = call()

    def sample(self) -> float:
        start = time.perf_counter()
        self.result = self._call()
        return (time.perf_counter() - start) * 1e3


class GraphTimer:
    """One CUDA graph per contender, long enough for about ``sample_ms``."""

    def __init__(self, device: torch.device, sample_ms: float) -> None:
        self._device = device
        self._sample_ms = sample_ms
        self._l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size

    def prepare(self, contender: Contender) -> Replay:
        sets = input_sets(contender.inputs, num_copies(contender.bytes, self._l2_bytes))
        calls: list[Call] = [partial(contender.run, *inputs) for inputs in sets]
        self._warm_up(calls)
        first = _GraphReplay(calls, 1)
        first.sample()
        repeats = math.ceil(self._sample_ms / (first.sample() * len(calls)))
        repeats = max(1, min(repeats, MAX_CALLS // len(calls)))
        return first if repeats == 1 else _GraphReplay(calls, repeats)

    def _warm_up(self, calls: list[Call]) -> None:
        """Compiles, tunes and allocates on a side stream, as capturing asks for."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for call in (calls * WARMUP_CALLS)[: max(WARMUP_CALLS, len(calls))]:
                call()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)


class _GraphReplay:
    """Calls in turns, captured. As many results as calls live at a time, so that results rotate as inputs do."""

    def __init__(self, calls: list[Call], repeats: int) -> None:
        self._num_calls = len(calls) * repeats
        self._graph = torch.cuda.CUDAGraph()
        results: deque[Any] = deque()
        with torch.cuda.graph(self._graph):
            for call in calls * repeats:
                if len(results) == len(calls):
                    results.popleft()
                results.append(call())
        self.result = results[-1]

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self._num_calls


def num_copies(num_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs keep each other out of the L2 cache."""
    return max(1, min(MAX_COPIES, math.ceil(L2_FACTOR * l2_bytes / num_bytes)))


def input_sets(inputs: tuple[Any, ...], count: int) -> list[tuple[Any, ...]]:
    """The inputs and ``count - 1`` copies of them in other memory."""
    return [inputs, *(tuple(_copied(value) for value in inputs) for _ in range(count - 1))]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, nn.Module) else value
