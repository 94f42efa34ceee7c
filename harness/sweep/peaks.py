"""Peaks of the device, measured in the run whose limits they give: the kernel benchmark's own measurement."""

from __future__ import annotations

from functools import cache

from mqbench.harness.bench.catalog import CONTENDERS, Rate
from mqbench.harness.bench.spec import PEAKS, QUICK, profile
from mqbench.harness.sweep.roofline import Peaks

COPY = "copy"
MS_PER_S = 1e3
UNITS = {"bf16": "peak_bf16_tflops", "int8": "peak_int8_tops", "fp8": "peak_fp8_tflops"}


@cache
def measured_peaks(device: str) -> Peaks | None:
    """Once per process; None on a CPU, where no limit is shown."""
    if not device.startswith("cuda"):
        return None
    from mqbench.harness.bench.measure import measure

    chosen = profile(QUICK, ())
    case = next(case for case in chosen.cases if case.task == PEAKS)
    timed = measure(case, device, chosen.rounds, chosen.sample_ms).timed
    copy = timed[COPY]
    rates: dict[str, float] = {}
    for name, entry in timed.items():
        kind = CONTENDERS[name].rate
        if kind is not Rate.NONE:
            rates[kind.value] = max(rates.get(kind.value, 0.0), entry.ops / entry.median_ms * MS_PER_S)
    return Peaks(copy.bytes / copy.median_ms * MS_PER_S, rates)


def peak_metrics(peaks: Peaks | None) -> dict[str, float]:
    """For a record: GB/s and tera-operations per second."""
    if peaks is None:
        return {}
    rates = {UNITS[kind]: rate / 1e12 for kind, rate in peaks.ops_s.items()}
    return {"peak_copy_gb_s": peaks.bytes_s / 1e9, **rates}
