"""Runs the points that have no record yet; a record is on disk as soon as its point is measured."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mqbench.harness import environment
from mqbench.harness.bench.device import describe_device
from mqbench.harness.bench.run import code_fingerprint, store_each
from mqbench.harness.cell_record import now
from mqbench.harness.record import Backend, Cell, Record, Sample, Status
from mqbench.harness.store import RecordStore
from mqbench.harness.sweep.measure import Settings
from mqbench.harness.sweep.outcome import OUT_OF_MEMORY, Outcome, note_of
from mqbench.harness.sweep.protocol import Shape, figures
from mqbench.harness.sweep.spec import Point
from mqbench.harness.sweep.worker import make_worker
from mqbench.harness.sweep_records import SWEEPS_NAME

VERSION = "1"
"""Of the way of measuring; raised when figures change their meaning."""

CODE = (environment.ROOT / "kernels", environment.ROOT / "harness" / "runtime")
PACKAGES = ("torch", "transformers", "triton")
MAX_REASON_CHARACTERS = 500


@dataclass(frozen=True)
class Job:
    """A point with the cell that stands for it."""

    point: Point
    cell: Cell


def store_in(folder: Path) -> RecordStore:
    """The records of sweeps in an output folder."""
    return RecordStore(folder, SWEEPS_NAME)


def jobs_of(points: Iterable[Point], settings: Settings) -> tuple[Job, ...]:
    """The cells of points on this machine.

    Raises:
        RuntimeError: torch cannot use the device.
    """
    kind, version = device_label(settings), code_version()

    def cell(point: Point) -> Cell:
        return point.cell(settings.model, version=version, device=kind, dtype=settings.dtype, seed=settings.seed)

    return tuple(Job(point, cell(point)) for point in points)


def device_label(settings: Settings) -> str:
    """The device's kind; of several ``2 x NVIDIA H200``, or all kinds joined by ``+``."""
    kinds = [environment.device_kind(device) for device in settings.devices]
    if len(kinds) == 1:
        return kinds[0]
    return f"{len(kinds)} x {kinds[0]}" if len(set(kinds)) == 1 else " + ".join(kinds)


def missing(jobs: Iterable[Job], store: RecordStore) -> list[Job]:
    """Jobs without an outcome: an ok record, or one that ran out of memory, which it would do again."""
    known = store.latest()
    return [job for job in jobs if job.cell.key not in known or not is_outcome(known[job.cell.key])]


def is_outcome(record: Record) -> bool:
    """Whether a record answers its point for good."""
    return record.ok or record.reason.startswith(OUT_OF_MEMORY)


def run_jobs(
    jobs: Sequence[Job],
    settings: Settings,
    store: RecordStore,
    finish: Callable[[Job, Record], None],
    worker: Callable[[Settings], Any] = make_worker,
) -> list[Record]:
    """Measures jobs in order and stores each record at once.

    Args:
        jobs: What to measure.
        settings: How.
        store: Where records go.
        finish: Called with every record as soon as it is stored.
        worker: Makes what measures, a context with ``measure(point)``.

    Raises:
        OutputError: the store cannot be written.
    """
    with worker(settings) as bench:
        return store_each(jobs, lambda job: _measured(job, settings, store, bench.measure), store, finish)


def record_of(
    cell: Cell, outcome: Outcome, started_at: str, duration_s: float, device: str, before: dict[str, Any] | None = None
) -> Record:
    """What is kept: raw samples as arrays, medians and spread as metrics, a note per system as a sample's prediction.

    The score is that of the first system that ran. Without any, the record has failed.
    """
    scores = outcome.scores
    measured = {**outcome.environment, **describe_device(device)}
    measured |= {"state_before": before} if before else {}
    return Record(
        cell=cell,
        status=Status.OK if scores else Status.FAILED,
        started_at=started_at,
        duration_s=duration_s,
        reason=outcome.reason[:MAX_REASON_CHARACTERS],
        score=next(iter(scores.values()), None),
        metrics=dict(outcome.metrics),
        samples=tuple(Sample(name, note, scores.get(name)) for name, note in outcome.notes.items()),
        arrays=dict(outcome.arrays),
        environment=environment.describe() | {"sweep": measured},
        backend=Backend.REAL,
    )


@cache
def code_version() -> str:
    """Changes with the source of kernels and runtime, with torch and with Triton: other code is measured anew."""
    return code_fingerprint(VERSION, CODE, PACKAGES)


def _measured(job: Job, settings: Settings, store: RecordStore, measure: Callable[[Point], Outcome]) -> Record:
    started_at, start = now(), time.perf_counter()
    before = describe_device(settings.device).get("state")
    try:
        outcome = measure(job.point)
    except Exception as error:  # one point must not end the others; the record and the traceback say what happened
        store.write_failure(job.cell.key, traceback.format_exc())
        reason, work = note_of(error), job.point.work
        return Record(
            job.cell,
            Status.FAILED,
            started_at,
            time.perf_counter() - start,
            reason,
            metrics=figures(work, settings.model.rules) if isinstance(work, Shape) else {},
            environment=environment.describe(),
            backend=Backend.REAL,
        )
    return record_of(job.cell, outcome, started_at, time.perf_counter() - start, settings.device, before)
