"""Measures cases in a process of their own: a kernel that breaks the GPU's context takes no other case along."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from mqbench.harness.bench.catalog import FAILED
from mqbench.harness.bench.spec import Case

if TYPE_CHECKING:
    from mqbench.harness.bench.measure import Measurement

MAX_LOSSES = 3
"""So many contenders may break the GPU's context in one case before the case is given up."""


@dataclass(frozen=True)
class Settings:
    """How cases are measured; see ``measure``."""

    device: str
    rounds: int
    sample_ms: float


Measure = Callable[[Case, Settings, dict[str, str]], "Measurement"]
"""Case, settings, and contenders to leave out with their notes."""


class DeviceLost(Exception):
    """The GPU answers this process no more; the message says since when, ``contender`` who was at work."""

    def __init__(self, contender: str, message: str) -> None:
        super().__init__(contender, message)
        self.contender = contender
        self.message = message


class WorkerDied(Exception):
    """The process ended without an answer."""


class Bench:
    """Measures cases one after the other.

    On a GPU in a worker process, replaced when it dies or loses the device; elsewhere in this one.

    Args:
        settings: How.
        measure: What measures a case, by default ``measure_here``; it is imported by name in the worker.
    """

    def __init__(self, settings: Settings, measure: Measure | None = None) -> None:
        self._settings = settings
        self._measure = measure or measure_here
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def measure(self, case: Case) -> Measurement:
        """Leaves out, with a note, contenders that break the device.

        Raises:
            WrongResult: the baseline could not be timed.
            DeviceLost: too many contenders broke the device.
            WorkerDied: the worker process died.
        """
        lost: dict[str, str] = {}
        while True:
            try:
                return self._run(case, lost)
            except DeviceLost as error:
                self._stop()
                if error.contender in lost or len(lost) == MAX_LOSSES:
                    raise
                lost[error.contender] = f"{FAILED}: broke the GPU's context: {error.message}"
            except BrokenProcessPool as error:
                self._stop()
                raise WorkerDied("the worker process died; is there enough memory?") from error

    def _run(self, case: Case, skip: dict[str, str]) -> Measurement:
        if not self._settings.device.startswith("cuda"):
            return self._measure(case, self._settings, skip)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)
        return self._pool.submit(self._measure, case, self._settings, skip).result()

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def end_with_parent() -> None:
    """Ends this process when the parent is killed; else it would wait for work, and hold the GPU, forever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def measure_here(case: Case, settings: Settings, skip: dict[str, str]) -> Measurement:
    """In this process; gives the case's memory back afterwards."""
    import torch

    from mqbench.harness.bench.measure import measure

    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        return measure(case, settings.device, settings.rounds, settings.sample_ms, skip)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
