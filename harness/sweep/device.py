"""Clocks and memory of a device, behind two small protocols: all that differs between a GPU and a CPU stands here."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

L2_FACTOR = 2
"""Before a sample, so many times the L2 cache is overwritten."""

QUIET_KINETO = ("KINETO_LOG_LEVEL", "99")
"""The profiler's library reports every start on stderr, and a missing driver as an error."""


class Clock(Protocol):
    """Marks on the device's own time line.

    Attributes:
        l2_state: What is in the L2 cache when a sample starts, for records.
    """

    l2_state: str

    def mark(self) -> Any:
        """A point in time: when everything given to the device so far is done."""
        ...

    def between_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, after ``wait``."""
        ...

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        ...

    def cool(self) -> None:
        """Brings the cache into the state that ``l2_state`` names."""
        ...


class HostClock:
    """Plain calls: the CPU has done its work when a call returns."""

    l2_state = "not controlled"

    def mark(self) -> float:
        return time.perf_counter()

    def between_ms(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def wait(self) -> None:
        pass

    def cool(self) -> None:
        pass


class CudaClock:
    """CUDA events on the current stream of the first device, where inputs go in and logits come out."""

    def __init__(self, device: torch.device, *others: torch.device) -> None:
        self._devices = (device, *others)
        num_bytes = L2_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size
        self._other: Tensor = torch.empty(num_bytes, dtype=torch.int8, device=device)
        self.l2_state = f"cold: {num_bytes} other bytes are written before each sample"

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end)

    def wait(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)

    def cool(self) -> None:
        self._other.zero_()


@dataclass
class Watched:
    """Memory during a piece of work, against what was allocated before it.

    Attributes:
        peak_bytes: At most.
        kept_bytes: Still at the end; negative when it freed more than it allocated.
    """

    peak_bytes: int = 0
    kept_bytes: int = 0


class Memory(Protocol):
    """The allocator of a device."""

    def watch(self, work: Callable[[], Any]) -> tuple[Any, Watched]:
        """Does some work and looks at its memory."""
        ...

    def used_bytes(self) -> int | None:
        """Of the whole device, all processes and the CUDA context included; None where nothing says."""
        ...

    def release(self) -> None:
        """Gives freed memory back to the device."""
        ...


class HostMemory:
    """Torch's allocations on the CPU, as its profiler sees them."""

    def watch(self, work: Callable[[], Any]) -> tuple[Any, Watched]:
        with profiling(torch.device("cpu"), memory=True) as profiler:
            result = work()
        return result, watched_of(memory_changes(profiler))

    def used_bytes(self) -> int | None:
        return None

    def release(self) -> None:
        gc.collect()


class CudaMemory:
    """The caching allocator; of several devices the sums, though their peaks need not fall together."""

    def __init__(self, *devices: torch.device) -> None:
        self._devices = devices

    def watch(self, work: Callable[[], Any]) -> tuple[Any, Watched]:
        self._wait()
        before = self._sum(torch.cuda.memory_allocated)
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        result = work()
        self._wait()
        peak, kept = self._sum(torch.cuda.max_memory_allocated), self._sum(torch.cuda.memory_allocated)
        return result, Watched(peak - before, kept - before)

    def used_bytes(self) -> int | None:
        def used(device: torch.device) -> int:
            free, total = torch.cuda.mem_get_info(device)
            return total - free

        return self._sum(used)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def _wait(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)

    def _sum(self, figure: Callable[[torch.device], int]) -> int:
        return sum(figure(device) for device in self._devices)


def clock_of(device: torch.device, *others: torch.device) -> Clock:
    """``others`` hold further parts of the model."""
    return CudaClock(device, *others) if device.type == "cuda" else HostClock()


def memory_of(device: torch.device, *others: torch.device) -> Memory:
    """``others`` hold further parts of the model."""
    return CudaMemory(device, *others) if device.type == "cuda" else HostMemory()


@contextmanager
def profiling(device: torch.device, memory: bool = False) -> Iterator[Any]:
    """torch's profiler over the CPU and, for a GPU, its kernels."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault(*QUIET_KINETO)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=memory, acc_events=True) as profiler:
        yield profiler
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def memory_changes(profiler: Any) -> list[int]:
    """Bytes allocated (positive) and freed on the CPU, in the order of time."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    cpu = torch.device("cpu").type
    return [
        event.nbytes() for event in events if event.name() == "[memory]" and event.device_type().name.lower() == cpu
    ]


def watched_of(changes: list[int]) -> Watched:
    """Peak and end of a running sum that starts at 0."""
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return Watched(peak, now)
