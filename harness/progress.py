"""Shows a run: a bar with the time left on a terminal, a line per finished cell everywhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mqbench.harness.execute import Finished
from mqbench.harness.plan import Plan, rows_of


class ProgressBar:
    """A bar on a terminal with the time left, and lines everywhere."""

    def __init__(self, description: str, total: int, console: Console) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._started = time.monotonic()
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
        self._task = self._bar.add_task(description, total=total, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, label: str, outcome: str) -> None:
        """One more of ``total`` is done, with a line that says what came of it."""
        self._done += 1
        left = self._time_left()
        self.say(f"[{self._done}/{self._total}] {label}: {outcome}" + (f"  ({left})" if left else ""))
        self._bar.update(self._task, completed=self._done, left=left)

    def _time_left(self) -> str:
        """From the average speed so far; empty before anything was done and when nothing is left."""
        if not self._done or self._done >= self._total:
            return ""
        elapsed = time.monotonic() - self._started
        return f"about {duration_text(elapsed / self._done * (self._total - self._done))} left"


class ProgressView(ProgressBar):
    """A ``run.View`` on a rich console. The unit of work is an evaluated row or a calibration sample used."""

    def __init__(self, plan: Plan, console: Console) -> None:
        super().__init__("starting workers", work_of(plan), console)
        self._num_cells = plan.num_to_run
        self._num_done = 0

    def advance(self, amount: int) -> None:
        self._done = min(self._total, self._done + amount)
        description = f"cells {self._num_done}/{self._num_cells}"
        self._bar.update(self._task, completed=self._done, description=description, left=self._time_left())

    def finish(self, cell: Finished) -> None:
        self._num_done += 1
        outcome = f"FAILED {cell.reason}" if cell.score is None else f"{cell.score:8.2f}"
        left = self._time_left()
        self.say(f"[{self._num_done}/{self._num_cells}] {cell.label}: {outcome}" + (f"  ({left})" if left else ""))
        self.advance(0)


def work_of(plan: Plan) -> int:
    """Rows to evaluate plus calibration samples to use, over all groups that run."""
    rows = sum(rows_of(plan, group.cells) for group in plan.groups)
    samples = [group.calibration.num_samples for group in plan.groups if group.needs_calibration and group.calibration]
    return rows + sum(samples)


def duration_text(seconds: float) -> str:
    """``45 s``, ``3 min`` or ``2 h 05 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
