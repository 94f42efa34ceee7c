"""Records of sweeps as tables and figures read them: which ones count, figures of a system, and what ran out of memory.

A sweep writes one record per point (an image size, a batch, ...) that holds every system, measured in turns; a ratio
between two systems is only ever taken within one record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mqbench.harness.record import INTEGER, Record
from mqbench.harness.select import passes, settings_of
from mqbench.harness.store import RecordStore

SWEEPS_NAME = "sweeps.jsonl"
"""File of the records of sweeps, beside the other records."""

SWEEP_PREFIX = "sweep_"
OUT_OF_MEMORY = "out of memory"
CPU = "cpu"
DEVICE = "device"

HEADLINES: Mapping[str, str] = MappingProxyType(
    {
        "sweep_latency": "prefill_ms",
        "sweep_batch": "total_ms",
        "sweep_turns": "total_ms",
        "sweep_linears": "total_ms",
        "sweep_attention": "total_ms",
    }
)
"""The figure of a system that its ``ratio`` is of: the baseline's time over its own, both in the same rounds."""

VARYING = frozenset({"batch_size", "data_sha256", "limit", "method_version"})
"""Settings in which the points of one device may differ: other points are other inputs, large ones repeat less, and the
code may have changed between them (captions name every commit)."""

UNSPECIFIC = VARYING | {"options", "recipe.label"}
"""Settings that differ wherever an option does; a message had better name the option."""


def is_sweep(task: str) -> bool:
    return task.startswith(SWEEP_PREFIX)


def load_records(folder: Path) -> list[Record]:
    """All records of a folder, those of sweeps last.

    Raises:
        RecordError: a line is not a record that this version can read.
    """
    return RecordStore(folder).load() + RecordStore(folder, SWEEPS_NAME).load()


def measured_points(records: Iterable[Record], tasks: Collection[str], filters: Mapping[str, Any]) -> list[Record]:
    """The newest outcome of each point, whatever code it ran: an ok record, else one that ran out of memory.

    Args:
        records: In the order written.
        tasks: Of these; tasks that are no sweeps do not count.
        filters: Setting -> wanted value or list of values. The CPU counts only where they name a device; simulated
            arithmetic never does.
    """
    newest: dict[str, Record] = {}
    for record in records:
        cell = record.cell
        counts = is_sweep(cell.task) and cell.task in tasks and cell.backend == INTEGER
        if not counts or (cell.device == CPU and DEVICE not in filters) or not passes(settings_of(record), filters):
            continue
        point = replace(cell, method_version="").key
        before = newest.get(point)
        keeps = before is not None and before.ok and before.cell == cell
        if record.ok or (record.reason.startswith(OUT_OF_MEMORY) and not keeps):
            newest[point] = record
    return list(newest.values())


def to_compare(record: Record, metric: str, against: str) -> tuple[float, float] | None:
    """Two figures of one record as they may be divided; None where one is missing, is zero, or must not be compared.

    Where memory did not hold all systems at once, times are replaced by their multiples of the baseline's, which was
    measured with each group; only the headline figure of a sweep has them. Others are compared within a group.
    """
    values = record.metrics.get(metric), record.metrics.get(against)
    if not values[0] or not values[1]:
        return None
    (one, name), (other, _) = (text.split(".", 1) for text in (metric, against))
    groups, ratios = ([record.metrics.get(f"{system}.{key}") for system in (one, other)] for key in ("group", "ratio"))
    if not is_grouped(record) or not name.endswith("_ms"):
        return values[0], values[1]
    if name == HEADLINES[record.cell.task] and ratios[0] and ratios[1]:
        return 1 / ratios[0], 1 / ratios[1]
    return (values[0], values[1]) if groups[0] == groups[1] else None


def ran_out_of_memory(record: Record, metric: str) -> bool:
    """Whether the system of ``<system>.<figure>`` did; points have figures without a system, too."""
    system, dot, _ = metric.partition(".")
    if not dot:
        return False
    outcomes = [sample.prediction for sample in record.samples if sample.index == system]
    return any(text.startswith(OUT_OF_MEMORY) for text in (outcomes if record.samples else [record.reason]))


def is_clamped(record: Record) -> bool:
    """The model's processor made the image smaller than asked for."""
    return bool(record.metrics.get("clamped"))


def is_grouped(record: Record) -> bool:
    """Memory did not hold all systems at once, so that not all of them were timed in turns."""
    return record.ok and record.cell.task in HEADLINES and not record.metrics.get("interleaved", 1.0)
