"""Kernel times by part: from made-up profiles of a GPU, and from real ones of the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

from mqbench.harness.sweep import split as split_module
from mqbench.harness.sweep.device import HostMemory
from mqbench.harness.sweep.split import Launch, Range, attribute, cuda_launches, ranges_of, split_pass

Kernel = namedtuple("Kernel", ["name", "device", "duration"])


@dataclass
class Span:
    start: float
    end: float

    def elapsed_us(self) -> float:
        return self.end - self.start


@dataclass
class Event:
    """What ``split`` reads of the profiler's ``FunctionEvent``."""

    name: str
    time_range: Span
    device_type: DeviceType = DeviceType.CPU
    is_user_annotation: bool = False
    kernels: list[Any] = field(default_factory=list)
    self_cpu_time_total: float = 0.0


def host_range(name: str, start: float, end: float) -> Event:
    return Event(name, Span(start, end), is_user_annotation=True)


def gpu(name: str, start: float, end: float, annotation: bool = False) -> Event:
    return Event(name, Span(start, end), DeviceType.CUDA, annotation)


def op(name: str, start: float, *durations: float) -> Event:
    return Event(name, Span(start, start + 1), kernels=[Kernel(f"{name}_kernel", 0, time) for time in durations])


GPU_PROFILE = [
    host_range("mqbench-scope:vision", 0, 50),
    host_range("mqbench:vision attention", 1, 40),
    op("aten::softmax", 2, 7.0),
    host_range("mqbench:vision gemm", 10, 20),
    op("mqbench::linear_int4", 11, 100.0, 20.0),
    op("aten::add", 30, 3.0),
    op("aten::cat", 45, 5.0),
    host_range("mqbench:llm gemm", 60, 70),
    op("aten::mm", 61, 1000.0),
    op("aten::mul", 80, 11.0),
    gpu("softmax_kernel", 100, 107),
    gpu("linear_kernel", 107, 207),
    gpu("epilogue_kernel", 207, 227),
    gpu("add_kernel", 227, 230),
    gpu("cat_kernel", 230, 235),
    gpu("mm_kernel", 300, 1300),
    gpu("mul_kernel", 1300, 1311),
    gpu("launched by a library that the profiler could not link", 1400, 1402),
    gpu("mqbench:llm gemm", 290, 1305),  # the profiler repeats ranges on the device's time line
]
"""Ranges and operations in host time, kernels in device time; all microseconds."""


def run_fake(monkeypatch: pytest.MonkeyPatch, events: list[Event]):  # type: ignore[no-untyped-def]
    class Profiler:
        def __enter__(self):  # type: ignore[no-untyped-def]
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def events(self) -> list[Event]:
            return events

    monkeypatch.setattr(split_module, "profiling", lambda device: Profiler())
    return split_pass(lambda: None, torch.device("cuda"), None)


def test_kernels_belong_to_the_innermost_range_of_their_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_fake(monkeypatch, GPU_PROFILE)
    assert found.parts_ms == pytest.approx(
        {"vision attention": 0.010, "vision gemm": 0.120, "llm gemm": 1.0, "other": 0.005 + 0.011 + 0.002}
    )
    assert found.kernels_ms == pytest.approx(1.148)
    assert sum(found.parts_ms.values()) == pytest.approx(found.kernels_ms), "nothing is lost"


def test_scope_counts_whatever_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_fake(monkeypatch, GPU_PROFILE).vision_ms == pytest.approx(0.135)
    assert run_fake(monkeypatch, GPU_PROFILE[1:]).vision_ms is None


def test_ranges_that_look_like_kernels_are_not_counted_twice() -> None:
    """A range is linked to its copy on the device's time line as if that were a kernel of its own."""
    linked = host_range("mqbench:llm gemm", 0, 10)
    linked.kernels = [Kernel("mqbench:llm gemm", 0, 50.0)]
    launches, total = cuda_launches([linked, op("aten::mm", 1, 30.0), gpu("mm", 0, 30), gpu("mqbench:llm gemm", 0, 50)])
    assert launches == [Launch(1, 30.0)] and total == 30.0


def test_operations_of_our_namespace_are_no_ranges() -> None:
    events = [Event("mqbench::linear_int4", Span(0, 9)), host_range("mqbench:llm gemm", 1, 2)]
    assert ranges_of(events, "mqbench:") == [Range("llm gemm", 1, 2)]


def test_attribution_of_nested_ranges() -> None:
    ranges = [Range("a", 0, 10), Range("b", 1, 2), Range("c", 3, 9), Range("d", 4, 5)]
    moments = {0.5: "a", 1.5: "b", 2.5: "a", 3.5: "c", 4.5: "d", 6.0: "c", 9.5: "a", 11.0: "other"}
    for at, name in moments.items():
        assert attribute([Launch(at, 2.0)], ranges) == {name: 2.0}
    assert attribute([Launch(at, 1.0) for at in moments], ranges) == {"a": 3, "b": 1, "c": 2, "d": 1, "other": 1}


def test_split_of_a_real_pass_on_the_cpu() -> None:
    """Two products of very different sizes, one of them inside the scope, and work of no part."""
    small, large = torch.ones(8, 8), torch.ones(400, 400)
    vision = nn.Identity()

    def run() -> None:
        with record_function("mqbench:vision gemm"):
            vision(small @ small)
        with record_function("mqbench:llm gemm"):
            for _ in range(5):
                _ = large @ large

    found = split_pass(run, torch.device("cpu"), vision)
    assert set(found.parts_ms) == {"vision gemm", "llm gemm", "other"}
    assert found.parts_ms["llm gemm"] > found.parts_ms["vision gemm"] > 0
    assert sum(found.parts_ms.values()) == pytest.approx(found.kernels_ms)
    assert not vision._forward_hooks and not vision._forward_pre_hooks


def test_custom_operations_count_for_the_part_around_them() -> None:
    """On the CPU, too: their names begin nearly like those of ranges."""
    from mqbench.kernels import api

    x = torch.randint(-8, 8, (64, 256), dtype=torch.int8)
    w = torch.randint(-8, 8, (256, 256), dtype=torch.int8)

    def run() -> None:
        with record_function("mqbench:llm gemm"):
            for _ in range(20):
                api.linear_int8(x, w, torch.ones(1), torch.ones(256), out_dtype=torch.float32)

    run()
    found = split_pass(run, torch.device("cpu"), None)
    assert found.parts_ms["llm gemm"] > 0.9 * found.kernels_ms


def test_hooks_go_away_when_a_pass_fails() -> None:
    vision = nn.Identity()
    with pytest.raises(ValueError, match="broken"):
        split_pass(lambda: _raise(ValueError("broken")), torch.device("cpu"), vision)
    assert not vision._forward_hooks and not vision._forward_pre_hooks


def _raise(error: Exception) -> None:
    raise error


def test_memory_of_the_cpu_counts_bytes() -> None:
    kept: list[torch.Tensor] = []

    def work() -> str:
        first = torch.empty(1000, dtype=torch.float32)
        kept.append(torch.empty(500, dtype=torch.float32))
        del first
        return "result"

    result, watched = HostMemory().watch(work)
    assert result == "result"
    assert 6000 <= watched.peak_bytes < 6200
    assert 2000 <= watched.kept_bytes < 2100


QUIET = """
import torch
from mqbench.harness.sweep.device import profiling

with profiling(torch.device("cpu")):
    torch.ones(2).sum()
"""


def test_profiler_is_quiet() -> None:
    """In a process of its own: the profiler reads its log level once, and another test may have been first."""
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
