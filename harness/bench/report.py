"""What the records of kernels say: one report per GPU, with ratios, shares of the measured peaks, and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mqbench.harness.bench.catalog import CONTENDERS, UNAVAILABLE, Rate
from mqbench.harness.bench.run import OK
from mqbench.harness.bench.spec import BANDWIDTH, COST, FULL, PEAKS, TASKS, Target, profile, targets
from mqbench.harness.record import Backend, Record

PEAK_CONTENDERS: Mapping[Rate, tuple[str, ...]] = {
    Rate.BF16: ("bf16_matmul",),
    Rate.INT8: ("int8_matmul", "int8_linear"),
    Rate.FP8: ("fp8_matmul",),
}
"""Whose best rate is the peak of a unit."""

FIGURES = ("ms", "iqr_ms", "ratio", "bytes", "ops")
"""Of a contender in a record's metrics, behind its name."""

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Entry:
    """One contender in one case.

    Attributes:
        task: A key of ``TASKS``.
        case: Name of the layer, the width or the operation.
        rows: M, or tokens.
        contender: Its name.
        time_ms: Median, or None when it was not timed.
        iqr_ms: Interquartile range.
        ratio: Baseline's time over its own.
        bytes: Read and written at least.
        ops: Arithmetic operations.
        note: Why it was not timed.
    """

    task: str
    case: str
    rows: int
    contender: str
    time_ms: float | None = None
    iqr_ms: float = 0.0
    ratio: float = 0.0
    bytes: float = 0.0
    ops: float = 0.0
    note: str = ""

    @property
    def place(self) -> tuple[str, str, int]:
        return self.task, self.case, self.rows


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured: its value at the worst place, and every place where it is missed."""

    target: Target
    state: str
    worst: float | None = None
    where: str = ""
    places: int = 0
    missed: tuple[str, ...] = ()

    @property
    def wanted(self) -> int:
        """Places that the target holds for in the whole benchmark; fewer were measured where part of it ran."""
        return sum(self.target.covers(case.task, case.name, case.rows) for case in profile(FULL).cases)


@dataclass(frozen=True)
class Report:
    """Everything measured on one GPU with one version of the code.

    Attributes:
        device: Name of the GPU.
        version: Of the code that ran.
        records: What it is made of, one record per case.
    """

    device: str
    version: str
    records: tuple[Record, ...]

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(entry for record in self.records for entry in entries_of(record))

    @cached_property
    def _by_place(self) -> Mapping[tuple[str, str, int], Mapping[str, Entry]]:
        places: dict[tuple[str, str, int], dict[str, Entry]] = {}
        for entry in self.entries:
            places.setdefault(entry.place, {})[entry.contender] = entry
        return places

    @cached_property
    def copy_bytes_per_ms(self) -> float | None:
        """Measured copy bandwidth, or None."""
        return self._best("copy", lambda entry: entry.bytes)

    def peak_ops_per_ms(self, rate: Rate) -> float | None:
        """Measured peak of a unit, or None."""
        rates = [self._best(name, lambda entry: entry.ops) for name in PEAK_CONTENDERS[rate]]
        return max((value for value in rates if value is not None), default=None)

    def floor_ms(self, entry: Entry) -> float | None:
        """The roofline: the time that the entry's bytes or operations take at the measured peaks."""
        if self.copy_bytes_per_ms is None:
            return None
        floor, rate = entry.bytes / self.copy_bytes_per_ms, CONTENDERS[entry.contender].rate
        if rate is Rate.NONE:
            return floor
        peak = self.peak_ops_per_ms(rate)
        return None if peak is None else max(floor, entry.ops / peak)

    def percent_of_peak(self, entry: Entry) -> float | None:
        """The roofline's time in percent of the measured one."""
        floor = self.floor_ms(entry)
        return None if floor is None or entry.time_ms is None else 100 * floor / entry.time_ms

    def value(self, target: Target, entry: Entry) -> float | None:
        """What a target looks at, or None where something for it was not measured."""
        if entry.time_ms is None:
            return None
        if target.measure == BANDWIDTH:
            peak = self.copy_bytes_per_ms
            return None if peak is None else 100 * entry.bytes / entry.time_ms / peak
        other = self._by_place[entry.place].get(target.against)
        if other is None or other.time_ms is None or not entry.ratio:
            return None
        speedup = entry.ratio / other.ratio  # both ratios are to the same baseline, round by round
        return 1 / speedup if target.measure == COST else speedup

    def verdict(self, target: Target) -> Verdict:
        """Met when it is met wherever it holds; a contender that failed there misses it."""
        values: dict[str, float] = {}
        failed: list[str] = []
        for entry in self.entries:
            if entry.contender != target.contender or not target.covers(*entry.place):
                continue
            value, where = self.value(target, entry), f"{entry.case}, M = {entry.rows}"
            if value is not None:
                values[where] = value
            elif entry.note and not entry.note.startswith(UNAVAILABLE):
                failed.append(where)
        if not values and not failed:
            return Verdict(target, NOT_MEASURED)
        ranked = sorted(values, key=lambda where: values[where], reverse=target.at_most is not None)
        missed = [*failed, *(where for where in ranked if not target.is_met(values[where]))]
        worst = values[ranked[0]] if ranked else None
        where = ranked[0] if ranked else failed[0]
        return Verdict(target, MISSED if missed else MET, worst, where, len(values) + len(failed), tuple(missed))

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(self.verdict(target) for target in targets())

    def _best(self, name: str, amount: Callable[[Entry], float]) -> float | None:
        found = [entry for entry in self.entries if entry.task == PEAKS and entry.contender == name]
        return max((amount(entry) / entry.time_ms for entry in found if entry.time_ms), default=None)


def reports(records: Iterable[Record]) -> list[Report]:
    """One per GPU, by name, each of the version of the code that was measured last on it.

    Functional checks on a CPU are no speeds and have no report. Of a case that was measured with more and fewer rounds,
    more count; of equal ones the newest.
    """
    by_device: dict[str, list[Record]] = {}
    for record in records:
        if record.ok and record.backend is Backend.REAL and record.cell.task in TASKS and record.cell.device != "cpu":
            by_device.setdefault(record.cell.device, []).append(record)
    return [_report(device, by_device[device]) for device in sorted(by_device)]


def _report(device: str, records: Sequence[Record]) -> Report:
    version = records[-1].cell.method_version
    chosen: dict[tuple[str, str, int], Record] = {}
    for record in records:
        place = _place(record)
        before = chosen.get(place)
        if record.cell.method_version == version and (before is None or _rounds(record) >= _rounds(before)):
            chosen[place] = record
    order = list(TASKS)
    ranked = sorted(chosen, key=lambda place: order.index(place[0]))
    return Report(device, version, tuple(chosen[place] for place in ranked))


def _place(record: Record) -> tuple[str, str, int]:
    options = record.cell.recipe.options
    return record.cell.task, str(options["case"]), int(options["rows"])


def _rounds(record: Record) -> int:
    return record.cell.limit or 0


def entries_of(record: Record) -> Iterable[Entry]:
    """Everyone in one ok record, timed or not."""
    metrics, place = record.metrics, _place(record)
    for sample in record.samples:
        name = sample.index
        if sample.prediction != OK:
            yield Entry(*place, name, note=sample.prediction)
            continue
        time_ms, iqr_ms, ratio, num_bytes, ops = (metrics[f"{name}_{what}"] for what in FIGURES)
        yield Entry(*place, name, time_ms, iqr_ms, ratio, num_bytes, ops)


def broken(record: Record) -> Iterable[str]:
    """What is wrong with a record: it failed, or an operation of ours failed its check or did not run."""
    if not record.ok:
        yield record.reason
    for sample in record.samples:
        known = sample.prediction == OK or sample.prediction.startswith(UNAVAILABLE)
        if CONTENDERS[sample.index].ours and not known:
            yield f"{sample.index} {sample.prediction}"
