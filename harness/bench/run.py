"""Runs the cases that have no record yet; a record is on disk as soon as its case is measured."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mqbench.harness import environment
from mqbench.harness.bench.device import describe_device, package_version
from mqbench.harness.bench.spec import Case, Profile
from mqbench.harness.bench.worker import Bench, Settings
from mqbench.harness.cell_record import now
from mqbench.harness.record import Backend, Cell, Record, Sample, Status
from mqbench.harness.store import RecordStore

if TYPE_CHECKING:
    from mqbench.harness.bench.measure import Measurement

KERNEL_RECORDS = "kernels.jsonl"
"""Beside ``records.jsonl``: timings are no scores, and no table of scores should meet them."""

VERSION = "1"
"""Of the way of measuring; raised when figures change their meaning."""

CODE = environment.ROOT / "kernels"
PACKAGES = ("torch", "triton")
FINGERPRINT_CHARACTERS = 12
OK = "ok"

AnyJob = TypeVar("AnyJob")


@dataclass(frozen=True)
class Job:
    """A case with the cell that stands for it."""

    case: Case
    cell: Cell


def store_in(folder: Path) -> RecordStore:
    """The kernel records of an output folder."""
    return RecordStore(folder, KERNEL_RECORDS)


def jobs_of(profile: Profile, kind: str) -> tuple[Job, ...]:
    """The cells of a profile on one kind of device: ``cpu``, or the GPU's name."""
    return tuple(Job(case, case.cell(kind, code_version(), profile.rounds)) for case in profile.cases)


def missing(jobs: Iterable[Job], store: RecordStore) -> list[Job]:
    """Jobs without an ok record."""
    known = store.latest()
    return [job for job in jobs if job.cell.key not in known or not known[job.cell.key].ok]


def run_jobs(
    jobs: Sequence[Job],
    settings: Settings,
    store: RecordStore,
    finish: Callable[[Job, Record], None],
    make_bench: Callable[[Settings], Bench] = Bench,
) -> list[Record]:
    """Measures jobs in order and stores each record at once.

    Args:
        jobs: What to measure.
        settings: How.
        store: Where records go.
        finish: Called with every record as soon as it is stored.
        make_bench: What measures.

    Raises:
        OutputError: the store cannot be written.
    """
    with make_bench(settings) as bench:
        return store_each(jobs, lambda job: _measured(job, settings, store, bench), store, finish)


def store_each(
    jobs: Iterable[AnyJob],
    measure: Callable[[AnyJob], Record],
    store: RecordStore,
    finish: Callable[[AnyJob, Record], None],
) -> list[Record]:
    """The records of jobs, each stored as soon as it is there, and then handed to ``finish``."""
    records = []
    for job in jobs:
        record = measure(job)
        store.append(record)
        records.append(record)
        finish(job, record)
    return records


def record_of(cell: Cell, measurement: Measurement, started_at: str, duration_s: float, device: str) -> Record:
    """What is kept: raw samples as arrays, medians and spread as metrics, notes as samples' predictions.

    The score is the baseline's median in milliseconds. One ``Sample`` stands for each contender: ``ok`` with its
    median, or the reason why it was not timed.
    """
    timed = measurement.timed
    samples = [Sample(name, OK, entry.median_ms) for name, entry in timed.items()]
    samples += [Sample(name, note, None) for name, note in measurement.notes.items()]
    return Record(
        cell=cell,
        status=Status.OK,
        started_at=started_at,
        duration_s=duration_s,
        score=timed[measurement.baseline].median_ms,
        metrics=_metrics(measurement),
        samples=tuple(samples),
        arrays={f"{name}_ms": entry.times_ms for name, entry in timed.items()},
        environment=environment.describe() | {"kernels": describe_device(device)},
        backend=Backend.REAL,
    )


@cache
def code_version() -> str:
    """Changes with the source of the kernels, with torch and with Triton: other code is measured anew."""
    return code_fingerprint(VERSION, (CODE,), PACKAGES)


def code_fingerprint(version: str, folders: Iterable[Path], packages: Iterable[str]) -> str:
    """``version`` and a hash of the Python files in some folders and of packages' versions."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for name in packages:
        digest.update(f"{name} {package_version(name)}".encode())
    return f"{version}-{digest.hexdigest()[:FINGERPRINT_CHARACTERS]}"


def _measured(job: Job, settings: Settings, store: RecordStore, bench: Bench) -> Record:
    started_at, start = now(), time.perf_counter()
    try:
        measurement = bench.measure(job.case)
    except Exception as error:  # one case must not end the others; the record and the traceback say what happened
        store.write_failure(job.cell.key, traceback.format_exc())
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Record(job.cell, Status.FAILED, started_at, time.perf_counter() - start, reason, backend=Backend.REAL)
    return record_of(job.cell, measurement, started_at, time.perf_counter() - start, settings.device)


def _metrics(measurement: Measurement) -> Mapping[str, float]:
    metrics: dict[str, float] = {}
    for name, entry in measurement.timed.items():
        metrics |= {
            f"{name}_ms": entry.median_ms,
            f"{name}_iqr_ms": entry.iqr_ms,
            f"{name}_ratio": entry.ratio,
            f"{name}_bytes": float(entry.bytes),
            f"{name}_ops": float(entry.ops),
            f"{name}_error": entry.check.error,
            f"{name}_error_limit": entry.check.limit,
        }
    return metrics
