"""Shows a sweep: a bar on a terminal, a line per finished point everywhere, a table at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from rich.console import Console
from rich.table import Table

from mqbench.harness.progress import ProgressBar
from mqbench.harness.record import Record, Sample
from mqbench.harness.sweep.outcome import FAILED, OK
from mqbench.harness.sweep.run import Job, is_outcome

GIB = float(1 << 30)
CPU = "cpu"
CPU_TITLE = "functional check on a CPU: no speed"

COLUMNS: Mapping[str, tuple[str, float, int]] = MappingProxyType(
    {
        "prefill ms": ("prefill_ms", 1.0, 2),
        "IQR": ("prefill_iqr_ms", 1.0, 2),
        "decode ms": ("decode_ms", 1.0, 3),
        "total ms": ("total_ms", 1.0, 2),
        "baseline / own": ("ratio", 1.0, 3),
        "limit ms": ("limit_ms", 1.0, 2),
        "launch gaps ms": ("launch_gap_ms", 1.0, 2),
        "peak GiB": ("peak_bytes", 1 / GIB, 3),
        "weights GiB": ("weights_bytes", 1 / GIB, 3),
    }
)
"""Header -> figure, factor and digits; a column that no record fills is left out."""


class PointProgress(ProgressBar):
    """Counts points."""

    def __init__(self, total: int, console: Console) -> None:
        super().__init__("points", total, console)

    def finish(self, job: Job, record: Record) -> None:
        """A point has its record."""
        self.step(job.point.label, outcome_text(record))


def outcome_text(record: Record) -> str:
    """How many systems ran, and why the others did not."""
    if not record.ok:
        return record.reason if is_outcome(record) else f"FAILED {record.reason}"
    others = [f"{one.index} {one.prediction}" for one in record.samples if not one.prediction.startswith(OK)]
    ran = f"{len(record.samples) - len(others)} system(s) measured"
    return "; ".join([ran, *others])


def complaints(records: Iterable[Record]) -> list[str]:
    """What went wrong: failed points and failed systems. Running out of memory and missing hardware are outcomes."""
    lines = []
    for record in records:
        if not is_outcome(record):
            lines.append(f"{record.cell.task}: {record.reason}")
        lines += [f"{record.cell.task}, {one.index}: {one.prediction}" for one in failed_systems(record)]
    return lines


def failed_systems(record: Record) -> list[Sample]:
    """Of an ok record; a failed one names them in its reason."""
    return [one for one in record.samples if one.prediction.startswith(FAILED)] if record.ok else []


def results_table(jobs: Iterable[Job], records: Mapping[str, Record]) -> Table:
    """A line per point and system."""
    rows = [(job, records[job.cell.key]) for job in jobs if job.cell.key in records]
    filled = [name for name, (figure, _, _) in COLUMNS.items() if any(_has(record, figure) for _, record in rows)]
    device = rows[0][1].cell.device if rows else CPU
    model = rows[0][1].cell.model if rows else ""
    title = f"{model} on {device}" + (f" ({CPU_TITLE})" if device == CPU else "")
    table = Table(title=title)
    for name in ("point", "system", *filled):
        table.add_column(name, justify="right" if name in filled else "left")
    table.add_column("note")
    for job, record in rows:
        for number, one in enumerate(record.samples):
            cells = [_cell(record, one.index, *COLUMNS[name]) for name in filled]
            note = "" if one.prediction == OK else one.prediction
            table.add_row(job.point.work.label if number == 0 else "", one.index, *cells, note, end_section=False)
        if not record.samples:
            table.add_row(job.point.work.label, "", *[""] * len(filled), record.reason)
        table.add_section()
    return table


def _has(record: Record, figure: str) -> bool:
    return any(name.endswith(f".{figure}") for name in record.metrics)


def _cell(record: Record, system: str, figure: str, factor: float, digits: int) -> str:
    value = record.metrics.get(f"{system}.{figure}")
    return "-" if value is None else f"{value * factor:.{digits}f}"
