"""Ratios of the kernels, each measured in one run: ``nox -s bench``.

On a GPU the targets of ``results/specs/kernels.toml`` are asserted on the quick choice of shapes; all shapes and the
table are the matter of ``mqbench bench kernels``. On a CPU the exact integer products are compared with the simulated
ones that they stand for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from mqbench.harness import environment
from mqbench.harness.bench import spec
from mqbench.harness.bench.measure import median_ratio
from mqbench.harness.bench.report import MET, NOT_MEASURED, Report, Verdict
from mqbench.harness.bench.run import code_version, record_of
from mqbench.harness.bench.spec import PEAKS, Case, Target
from mqbench.harness.bench.worker import Bench, Settings
from mqbench.harness.quant.activation import fake_quantize
from mqbench.harness.quant.scheme import QuantArgs
from mqbench.harness.record import Record
from mqbench.kernels import api

DEVICE = "cuda"
STARTED_AT = "1970-01-01T00:00:00+00:00"  # these records are not kept
QUICK = spec.profile(spec.QUICK)
OPTIONAL = "fast_hadamard"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="speed targets need an NVIDIA GPU")

CPU_SHAPE = (256, 512, 1280)
CPU_ROUNDS = 20
MAX_CPU_COST = 2.0
"""An exact integer product on a CPU may take this many times as long as the simulated one."""


@pytest.fixture(scope="module")
def measured() -> Iterator[Callable[[Case], Record]]:
    """Measures a case once, in a worker process as the command does."""
    settings = Settings(DEVICE, QUICK.rounds, QUICK.sample_ms)
    with Bench(settings) as bench:

        @cache
        def measure(place: tuple[str, str, int]) -> Record:
            case = next(case for case in QUICK.cases if (case.task, case.name, case.rows) == place)
            cell = case.cell(environment.device_kind(DEVICE), code_version(), QUICK.rounds)
            return record_of(cell, bench.measure(case), STARTED_AT, 0.0, DEVICE)

        yield lambda case: measure((case.task, case.name, case.rows))


@needs_gpu
@pytest.mark.parametrize("target", spec.targets(), ids=lambda target: target.title)
def test_target(benchmark: BenchmarkFixture, measured: Callable[[Case], Record], target: Target) -> None:
    covered = [case for case in QUICK.cases if case.task == PEAKS or target.covers(case.task, case.name, case.rows)]

    def judge() -> Verdict:
        records = tuple(measured(case) for case in covered)
        return Report(environment.device_kind(DEVICE), code_version(), records).verdict(target)

    verdict = benchmark.pedantic(judge, rounds=1)
    benchmark.extra_info.update(wanted=target.limit_text, worst=verdict.worst, where=verdict.where)
    if verdict.state == NOT_MEASURED and target.against == OPTIONAL:
        pytest.skip("fast-hadamard-transform is not installed, or was not right")
    assert verdict.state == MET, f"{target.limit_text}; worst {verdict.worst} at {verdict.where}; {verdict.missed}"


@pytest.mark.benchmark(group="integer linear on the CPU")
@pytest.mark.parametrize("num_bits", [8, 4])
def test_exact_integers_on_the_cpu_cost_little(benchmark: BenchmarkFixture, num_bits: int) -> None:
    """W8A8 and W4A8 beside quantize, dequantize and a float32 product; both results agree."""
    simulated, integer = cpu_linears(num_bits)
    torch.testing.assert_close(integer(), simulated(), rtol=1e-4, atol=1e-3)
    benchmark(integer)
    times: dict[Callable[[], Tensor], list[float]] = {simulated: [], integer: []}
    for _ in range(CPU_ROUNDS):
        for call, own in times.items():
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    cost = median_ratio(times[integer], times[simulated])
    benchmark.extra_info["time over simulated"] = cost
    assert cost <= MAX_CPU_COST


def cpu_linears(num_bits: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The same layer with static 8-bit activations, simulated and in integers."""
    rows, num_out, width = CPU_SHAPE
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, width, generator=generator) for size in (rows, num_out))
    scale = (x.abs().amax() / 127).reshape(1)
    levels, w_scale = api.quantize_token(w, num_bits)
    rounded, args = levels * w_scale[:, None], QuantArgs(8)
    multiply, weight = (api.linear_int8, levels) if num_bits == 8 else (api.linear_int4, api.pack_int4(levels))

    def simulated() -> Tensor:
        return F.linear(fake_quantize(x, scale, args), rounded)

    def integer() -> Tensor:
        return multiply(api.quantize_static(x, scale), weight, scale, w_scale, out_dtype=torch.float32)

    return simulated, integer
