"""Shows a benchmark run: a bar on a terminal, a line per finished case everywhere."""

from __future__ import annotations

from rich.console import Console

from mqbench.harness.bench.catalog import CONTENDERS
from mqbench.harness.bench.report import broken, entries_of
from mqbench.harness.bench.run import Job
from mqbench.harness.progress import ProgressBar
from mqbench.harness.record import Record


class CaseProgress(ProgressBar):
    """Counts cases; without ``timed`` no time of a kernel is shown."""

    def __init__(self, total: int, console: Console, timed: bool) -> None:
        super().__init__("cases", total, console)
        self._timed = timed

    def finish(self, job: Job, record: Record) -> None:
        """A case has its record."""
        self.step(job.case.label, outcome_text(record, self._timed))


def outcome_text(record: Record, timed: bool) -> str:
    """Ratios of our contenders, or how many passed; what is broken in any case."""
    wrong = list(broken(record))
    if wrong:
        return f"FAILED {'; '.join(wrong)}"
    entries = [entry for entry in entries_of(record) if entry.time_ms is not None]
    if not timed:
        return f"{len(entries)} checks passed"
    ours = [entry for entry in entries if CONTENDERS[entry.contender].ours]
    return ", ".join(f"{entry.contender} {entry.ratio:.2f}x" for entry in ours) or f"{len(entries)} timed"
