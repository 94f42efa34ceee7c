"""Shows a benchmark run: a bar on a terminal, a line per finished case everywhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mqbench.harness.bench.catalog import CONTENDERS
from mqbench.harness.bench.report import broken, entries_of
from mqbench.harness.bench.run import Job
from mqbench.harness.progress import duration_text
from mqbench.harness.record import Record


class CaseProgress:
    """Counts cases; without ``timed`` no time of a kernel is shown."""

    def __init__(self, total: int, console: Console, timed: bool) -> None:
        self._console, self._total, self._timed = console, total, timed
        self._done, self._started = 0, time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("cases", total=total, left="")

    def __enter__(self) -> CaseProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def finish(self, job: Job, record: Record) -> None:
        """A case has its record."""
        self._done += 1
        left = ""
        if self._done < self._total:
            seconds = (time.monotonic() - self._started) / self._done * (self._total - self._done)
            left = f"about {duration_text(seconds)} left"
        text = f"[{self._done}/{self._total}] {job.case.label}: {outcome_text(record, self._timed)}"
        self._console.print(f"{text}  ({left})" if left else text, markup=False, highlight=False, soft_wrap=True)
        self._bar.update(self._task, completed=self._done, left=left)


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
