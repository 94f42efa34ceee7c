"""Where the time of a pass goes: kernels by the part of the model that launched them.

Parts are ``record_function`` ranges named ``mqbench:<part>``; scopes, ``mqbench-scope:<name>``, go around several of
them. A kernel belongs to the innermost range that was open when it was launched; one that cannot be matched counts as
``other``. On a CPU the operations stand for kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

from mqbench.harness.runtime.parts import OTHER, RANGE_PREFIX, SCOPE_PREFIX, VISION_SCOPE
from mqbench.harness.sweep.device import profiling

US_PER_MS = 1e3


@dataclass(frozen=True)
class Range:
    """An open ``record_function``, in microseconds of host time."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Launch:
    """A kernel: when the host launched it, and how long the device worked on it, in microseconds."""

    at: float
    duration: float


@dataclass(frozen=True)
class Split:
    """One instrumented pass.

    Attributes:
        parts_ms: Kernel time by part.
        vision_ms: Kernel time inside the vision tower with its projector, whatever the part; None if nothing says.
        kernels_ms: All kernels together.
    """

    parts_ms: dict[str, float]
    vision_ms: float | None
    kernels_ms: float


def split_pass(run: Callable[[], Any], device: torch.device, vision: nn.Module | None) -> Split:
    """Runs something under the profiler.

    Args:
        run: A pass with ranges of its own.
        device: Where it runs.
        vision: The vision tower, whose calls become a scope; a runtime that calls it in pieces opens its own.
    """
    hooks = [] if vision is None else scope_hooks(vision, VISION_SCOPE)
    try:
        with profiling(device) as profiler:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    events = list(profiler.events())
    launches, total_us = cuda_launches(events) if device.type == "cuda" else cpu_launches(events)
    parts = attribute(launches, ranges_of(events, RANGE_PREFIX))
    lost_us = total_us - sum(parts.values())
    parts[OTHER] = parts.get(OTHER, 0.0) + max(0.0, lost_us)
    scopes = attribute(launches, ranges_of(events, SCOPE_PREFIX))
    vision_us = scopes.get(VISION_SCOPE)
    return Split(
        {name: value / US_PER_MS for name, value in parts.items()},
        None if vision_us is None else vision_us / US_PER_MS,
        total_us / US_PER_MS,
    )


def scope_hooks(module: nn.Module, name: str) -> list[Any]:
    """Opens a range around every call of a module."""
    opened: list[Any] = []

    def enter(*_: Any) -> None:
        opened.append(record_function(SCOPE_PREFIX + name))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def attribute(launches: Iterable[Launch], ranges: Sequence[Range]) -> dict[str, float]:
    """Microseconds by name of the innermost range around each launch; ``other`` outside all of them.

    Ranges of one thread nest: of those open at a moment, the last one to start is the innermost.
    """
    found: dict[str, float] = {}
    waiting = sorted(ranges, key=lambda one: one.start)
    stack: list[Range] = []
    index = 0
    for launch in sorted(launches, key=lambda one: one.at):
        while index < len(waiting) and waiting[index].start <= launch.at:
            stack.append(waiting[index])
            index += 1
        while stack and stack[-1].end < launch.at:
            stack.pop()
        name = stack[-1].name if stack else OTHER
        found[name] = found.get(name, 0.0) + launch.duration
    return found


def ranges_of(events: Iterable[Any], prefix: str) -> list[Range]:
    """The host's ranges of a profile whose names have a prefix, which is taken off."""
    return [
        Range(event.name.removeprefix(prefix), event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CPU and _is_range(event) and event.name.startswith(prefix)
    ]


def cuda_launches(events: Iterable[Any]) -> tuple[list[Launch], float]:
    """Kernels that the profiler linked to a host operation, and the time of all kernels and copies, linked or not.

    The profiler repeats the host's ranges on the device's time line, where they look like kernels: those are left out.
    """
    events = list(events)
    ranges = {event.name for event in events if _is_range(event)}
    launches, total = [], 0.0
    for event in events:
        if event.device_type == DeviceType.CPU:
            kernels = [kernel for kernel in event.kernels if kernel.name not in ranges]
            launches += [Launch(event.time_range.start, kernel.duration) for kernel in kernels]
        elif event.name not in ranges:
            total += event.time_range.elapsed_us()
    return launches, total


def cpu_launches(events: Iterable[Any]) -> tuple[list[Launch], float]:
    """Every operation with its own time, without that of operations inside it."""
    found = [
        Launch(event.time_range.start, event.self_cpu_time_total)
        for event in events
        if event.device_type == DeviceType.CPU and not _is_range(event)
    ]
    return found, sum(one.duration for one in found)


def _is_range(event: Any) -> bool:
    """Operations of our namespace are called ``mqbench::``, nearly like the ranges."""
    return bool(event.is_user_annotation)
