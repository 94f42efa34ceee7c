"""Made-up measurements of kernels, and measuring that breaks. Light: worker processes import it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mqbench.harness.bench.spec import Case
from mqbench.harness.bench.worker import Bench, DeviceLost, Settings

SETTINGS = Settings("cuda", rounds=3, sample_ms=1.0)
CASE = Case("kernel_linear", "made-up", "layer", 4, {"n": 8, "k": 16, "bias": 0})
ENVIRONMENT = {
    "driver": "555.1",
    "packages": {"torch": "2.0"},
    "kernels": {"packages": {"triton": "3.0"}, "state": {"sm_clock_mhz": 1700.0, "power_limit_w": 400.0}},
}


def make_record(
    device: str,
    case: Case,
    timed: Mapping[str, tuple[Sequence[float], float, float]],
    notes: Mapping[str, str] | None = None,
    version: str = "1-abc",
) -> Any:
    """An ok record; ``timed`` has times in milliseconds, bytes and operations by contender, the baseline first."""
    from mqbench.harness.bench.contender import Check
    from mqbench.harness.bench.measure import Measurement, Timed, median_ratio
    from mqbench.harness.bench.run import record_of

    baseline = next(iter(timed))
    entries = {}
    for name, (times, num_bytes, ops) in timed.items():
        ratio = median_ratio(timed[baseline][0], times)
        entries[name] = Timed(tuple(times), ratio, Check(0.0, 0.01), int(num_bytes), int(ops))
    cell = case.cell(device, version, len(timed[baseline][0]))
    record = record_of(cell, Measurement(baseline, entries, dict(notes or {})), "2026-01-02T03:04:05+00:00", 1.5, "cpu")
    return replace(record, environment=ENVIRONMENT)


def lose_one(case: Case, settings: Settings, skip: dict[str, str]) -> Any:
    """Breaks the device while ``w8a8`` is at work."""
    if "w8a8" not in skip:
        raise DeviceLost("w8a8", "an illegal memory access")
    return dict(skip), os.getpid()


def lose_all(case: Case, settings: Settings, skip: dict[str, str]) -> Any:
    raise DeviceLost(f"contender {len(skip)}", "an illegal memory access")


def die_on_one_row(case: Case, settings: Settings, skip: dict[str, str]) -> Any:
    if case.rows == 1:
        os._exit(9)
    return os.getpid()


def tell_and_sleep(case: Case, settings: Settings, skip: dict[str, str]) -> Any:
    """Writes its process id into the file that the case names, and takes long."""
    Path(case.name).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


if __name__ == "__main__":
    with Bench(SETTINGS, tell_and_sleep) as bench:
        bench.measure(replace(CASE, name=sys.argv[1]))
