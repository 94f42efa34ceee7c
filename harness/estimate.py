"""How long a plan takes, judged from earlier records."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mqbench.harness.fingerprint import folder_bytes
from mqbench.harness.plan import Group, Plan, rows_of
from mqbench.harness.record import Record

WORKER_BYTES = 3 * 2**30
"""Memory of one worker beside its weights: torch, transformers, vlmeval and activations."""

MEMORY_INFO = Path("/proc/meminfo")

SMALL_MODEL_BYTES = 2**30
"""Below this, one thread per worker is fastest and keeps results independent of the number of cores."""


@dataclass(frozen=True)
class Speed:
    """Seconds per evaluated row and per quantization of one model."""

    row_s: float
    quantize_s: float


def estimate_s(plan: Plan, workers: int, shipped: Iterable[Record] = ()) -> float | None:
    """Seconds that a plan will take; None when a model never ran on this kind of device.

    Args:
        plan: What will run; its own folder's records count first.
        workers: Processes that share the work.
        shipped: Records of other machines of the same kind, for models without any of their own.
    """
    speeds = measured_speeds(shipped) | measured_speeds(plan.records.values())
    keyed = [((group.source.label, group.cells[0].device), group) for group in plan.groups]
    if any(key not in speeds for key, _ in keyed):
        return None
    total = sum(_group_s(group, plan, speeds[key]) for key, group in keyed)
    return total / max(1, min(workers, len(plan.groups)))


def measured_speeds(records: Iterable[Record]) -> dict[tuple[str, str], Speed]:
    """Medians over the ok records of each model on each kind of device."""
    rows, quantizations = defaultdict(list), defaultdict(list)
    for record in records:
        key = record.cell.model, record.cell.device
        if record.ok and record.samples:
            rows[key].append(record.duration_s / len(record.samples))
        if record.ok and record.cell.calibration is not None:
            quantizations[key].append(record.quantize_s)
    return {key: Speed(median(values), median(quantizations[key] or [0.0])) for key, values in rows.items()}


def num_workers(plan: Plan) -> int:
    """One worker per core, or per GPU; fewer when there are fewer groups or too little memory for the weights."""
    request = plan.request
    if request.jobs is not None:
        wanted = request.jobs
    elif request.device == "cuda":
        import torch

        wanted = torch.cuda.device_count()
    elif request.device == "cpu":
        wanted = min(num_cores(), _fitting_in_memory(plan))
    else:
        wanted = 1
    return max(1, min(wanted, len(plan.groups)))


def num_threads(plan: Plan, workers: int) -> int:
    """Torch threads per worker."""
    if all(folder_bytes(group.source.weights) < SMALL_MODEL_BYTES for group in plan.groups):
        return 1
    return max(1, num_cores() // workers)


def _fitting_in_memory(plan: Plan) -> int:
    """Workers whose weights fit, when 16-bit files are held in 32 bits."""
    largest = max((folder_bytes(group.source.weights) for group in plan.groups), default=0)
    return max(1, _available_memory_bytes() // (2 * largest + WORKER_BYTES))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory_bytes() -> int:
    """Free and reclaimable memory where the system tells it, else all of it."""
    lines = MEMORY_INFO.read_text().splitlines() if MEMORY_INFO.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_s(group: Group, plan: Plan, speed: Speed) -> float:
    return rows_of(plan, group.cells) * speed.row_s + (speed.quantize_s if group.needs_calibration else 0.0)
