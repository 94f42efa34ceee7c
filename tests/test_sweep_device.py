"""The lines that only a GPU runs, against stand-ins of torch.cuda; and the worker's process."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mqbench.harness.bench.worker import Bench, DeviceLost
from mqbench.harness.sweep import peaks as peaks_module
from mqbench.harness.sweep.device import CudaClock, CudaMemory, Watched, clock_of, memory_of, profiling
from mqbench.harness.sweep.measure import Settings
from mqbench.harness.sweep.model import find_sweep_model
from mqbench.harness.sweep.outcome import Outcome
from mqbench.harness.sweep.peaks import measured_peaks, peak_metrics
from mqbench.harness.sweep.spec import CHECK, points_of
from mqbench.harness.sweep.worker import make_worker, measure_point

GPU = torch.device("cuda:0")


class FakeCuda:
    """Allocations and events in call order, as ``torch.cuda`` names them."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self.now_ms = 0.0
        self.calls: list[str] = []

    def take(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at_ms: float | None = None

            def record(self) -> None:
                self.at_ms = fake.now_ms

            def elapsed_time(self, end: Event) -> float:
                assert self.at_ms is not None and end.at_ms is not None
                return end.at_ms - self.at_ms

        def reset_peak(device: Any) -> None:
            self.peak = self.allocated

        replacements = {
            "Event": Event,
            "synchronize": lambda device=None: self.calls.append("synchronize"),
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": reset_peak,
            "mem_get_info": lambda device: (30, 100),
            "empty_cache": lambda: self.calls.append("empty_cache"),
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50),
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def test_memory_is_counted_against_what_others_hold(cuda: FakeCuda) -> None:
    cuda.take(1000)
    cuda.peak = 5000

    def work() -> str:
        cuda.take(70)
        cuda.take(-50)
        return "done"

    assert CudaMemory(GPU).watch(work) == ("done", Watched(peak_bytes=70, kept_bytes=20))
    assert cuda.calls == ["synchronize", "synchronize"]
    assert CudaMemory(GPU).used_bytes() == 70


def test_memory_of_several_devices_is_the_sum(cuda: FakeCuda) -> None:
    memory = memory_of(GPU, torch.device("cuda:1"))
    assert memory.watch(lambda: cuda.take(70)) == (None, Watched(peak_bytes=140, kept_bytes=140))
    assert memory.used_bytes() == 140
    assert cuda.calls == ["synchronize"] * 4, "both, before and behind the work"


def test_clock_waits_for_every_device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    real, waited = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: real(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock_of(GPU, torch.device("cuda:1")).wait()
    assert waited == [GPU, torch.device("cuda:1")]


def test_release_gives_memory_back(cuda: FakeCuda) -> None:
    CudaMemory(GPU).release()
    assert cuda.calls == ["empty_cache"]


def test_clock_reads_events(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = torch.empty

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        sizes.append((shape, dtype, device))
        return real(*shape, dtype=dtype).fill_(7)

    monkeypatch.setattr(torch, "empty", empty)
    clock = CudaClock(GPU)
    assert sizes == [((100,), torch.int8, GPU)], "twice the L2 cache"
    assert clock.l2_state == "cold: 100 other bytes are written before each sample"
    clock.cool()
    assert not clock._other.any()
    start = clock.mark()
    cuda.now_ms = 2.5
    assert clock.between_ms(start, clock.mark()) == 2.5
    clock.wait()
    assert cuda.calls == ["synchronize"]


def test_devices_have_their_own(cuda: FakeCuda) -> None:
    assert isinstance(memory_of(GPU), CudaMemory)
    assert type(memory_of(torch.device("cpu"))).__name__ == "HostMemory"
    assert type(clock_of(torch.device("cpu"))).__name__ == "HostClock"


def test_profiler_sees_kernels_and_waits_for_them(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import profiler

    asked: list[Any] = []

    class Profile:
        def __init__(self, activities: list[Any], profile_memory: bool, acc_events: bool) -> None:
            assert acc_events, "without it torch 2.11 warns"
            asked.extend(activities)

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: Any) -> None:
            cuda.calls.append("stopped")

    monkeypatch.setattr(profiler, "profile", Profile)
    with profiling(GPU):
        pass
    assert asked == [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA]
    assert cuda.calls == ["synchronize", "stopped"]


def test_peaks_are_those_of_the_kernel_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best contender of each kind; a copy moves what it reads and writes."""
    from mqbench.harness.bench import measure as bench_module

    def timed(median_ms: float, num_bytes: int = 0, ops: int = 0) -> SimpleNamespace:
        return SimpleNamespace(median_ms=median_ms, bytes=num_bytes, ops=ops)

    found = {
        "copy": timed(2.0, num_bytes=6_000_000_000),
        "bf16_matmul": timed(4.0, ops=2_000_000_000_000),
        "int8_matmul": timed(4.0, ops=3_000_000_000_000),
        "int8_linear": timed(2.0, ops=3_000_000_000_000),
    }
    asked = []

    def measure(case: Any, device: str, rounds: int, sample_ms: float) -> SimpleNamespace:
        asked.append((case.task, device))
        return SimpleNamespace(timed=found)

    monkeypatch.setattr(bench_module, "measure", measure)
    peaks_module.measured_peaks.cache_clear()
    try:
        peaks = measured_peaks("cuda:7")
        assert measured_peaks("cuda:7") is peaks and asked == [("kernel_peaks", "cuda:7")]
    finally:
        peaks_module.measured_peaks.cache_clear()
    assert peaks is not None and peaks.bytes_s == 3e12
    assert peaks.ops_s == {"bf16": 5e14, "int8": 1.5e15}
    assert peak_metrics(peaks) == {"peak_copy_gb_s": 3000.0, "peak_bf16_tflops": 500.0, "peak_int8_tops": 1500.0}
    assert measured_peaks("cpu") is None and peak_metrics(None) == {}


SETTINGS = Settings("cpu", "float32", 0, find_sweep_model("standin-qwen2-vl", None, {}))


def test_what_goes_to_a_worker_process_and_back_can_travel() -> None:
    (point,) = points_of("attention", CHECK)
    outcome = Outcome({"a.x_ms": 1.0}, {"a.x_ms": (1.0,)}, {"a": "ok"}, {"a": 1.0}, {"l2": "cold"})
    for thing in (point, SETTINGS, outcome):
        assert pickle.loads(pickle.dumps(thing)) == thing
    assert pickle.loads(pickle.dumps(measure_point)) is measure_point
    for error in (DeviceLost("a", "b"), torch.OutOfMemoryError("CUDA out of memory")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_worker_leaves_out_a_system_that_broke_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from mqbench.harness.sweep import measure as measure_module

    asked: list[dict[str, str]] = []

    def measure_sequences(point: Any, settings: Settings, skip: dict[str, str], hints: Any) -> Outcome:
        asked.append(dict(skip))
        if not skip:
            raise DeviceLost("w4a8-token", "illegal memory access")
        return Outcome({}, {}, dict(skip), {})

    monkeypatch.setattr(measure_module, "measure_sequences", measure_sequences)
    (point, *_) = points_of("latency", CHECK)
    with make_worker(SETTINGS) as worker:
        assert isinstance(worker, Bench)
        outcome: Any = worker.measure(point)  # type: ignore[arg-type]
    assert asked[0] == {} and outcome.notes == {"w4a8-token": "failed: broke the GPU's context: illegal memory access"}
