"""Runs a plan in worker processes: each imports once and takes groups until none is left.

A worker that dies is replaced; its group is tried once more and then recorded as failed, and the others go on. Results
are on disk as soon as a cell is done, so stopping at any moment loses at most one batch of answers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

from mqbench.harness.cell_record import failure, now
from mqbench.harness.estimate import num_threads, num_workers
from mqbench.harness.execute import EVALUATOR, Advanced, Executor, Finished
from mqbench.harness.plan import Group, Plan
from mqbench.harness.ranks import Ranks, join_ranks
from mqbench.harness.request import RAY, Request
from mqbench.harness.store import RecordStore

MAX_ATTEMPTS = 2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WORKER_VARIABLES = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""A run asks no network, and tokenizers start no threads of their own."""

JOIN_S = 5.0


class View(Protocol):
    """What shows the progress of a run."""

    def advance(self, amount: int) -> None: ...

    def finish(self, cell: Finished) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What became of the cells that were run, in the order in which they ended."""

    cells: tuple[Finished, ...]

    @property
    def failed(self) -> tuple[Finished, ...]:
        return tuple(cell for cell in self.cells if cell.reason)


@dataclass(frozen=True)
class GroupDone:
    """A worker is free again."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker process is started with."""

    request: Request
    device: str
    threads: int
    evaluator: str


@dataclass
class _Job:
    group: Group
    attempts: int = 0


@dataclass
class _Worker:
    settings: WorkerSettings
    process: BaseProcess
    connection: Connection
    job: _Job | None = None


@dataclass
class _Pool:
    """The parent's side: assigns jobs, forwards progress, replaces dead workers."""

    plan: Plan
    view: View
    evaluator: str
    jobs: deque[_Job] = field(default_factory=deque)
    workers: list[_Worker] = field(default_factory=list)
    finished: dict[str, Finished] = field(default_factory=dict)

    def run(self) -> None:
        self.jobs.extend(_Job(group) for group in self.plan.groups)
        count = num_workers(self.plan)
        threads = num_threads(self.plan, count)
        for device in worker_devices(self.plan.request.device, count):
            self.workers.append(_start(WorkerSettings(self.plan.request, device, threads, self.evaluator)))
        while self.jobs or any(worker.job for worker in self.workers):
            self._assign()
            self._receive()

    def stop(self, kill: bool) -> None:
        """Lets idle workers end; ``kill`` ends busy ones too."""
        for worker in self.workers:
            if kill:
                worker.process.terminate()
            else:
                with contextlib.suppress(OSError):  # it is gone already
                    worker.connection.send(None)
        for worker in self.workers:
            worker.process.join(JOIN_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
            worker.connection.close()

    def _assign(self) -> None:
        for index, worker in enumerate(self.workers):
            if worker.job is None and self.jobs:
                if not worker.process.is_alive():
                    worker = self._replace(index)
                worker.job = self.jobs.popleft()
                worker.job.attempts += 1
                with contextlib.suppress(OSError):  # it died just now; _receive notices
                    worker.connection.send(worker.job.group)

    def _receive(self) -> None:
        busy = [worker for worker in self.workers if worker.job is not None]
        ready = wait([item for worker in busy for item in (worker.connection, worker.process.sentinel)])
        for worker in busy:
            if worker.connection in ready or worker.process.sentinel in ready:
                dead = worker.process.sentinel in ready
                try:
                    while worker.job is not None and worker.connection.poll():
                        self._handle(worker, worker.connection.recv())
                except (EOFError, ConnectionError):
                    dead = True
                if dead and worker.job is not None:
                    self._bury(worker)

    def _handle(self, worker: _Worker, message: Advanced | Finished | GroupDone) -> None:
        match message:
            case Advanced(amount):
                self.view.advance(amount)
            case Finished():
                self._finish(message)
            case GroupDone():
                worker.job = None

    def _finish(self, cell: Finished) -> None:
        self.finished[cell.key] = cell
        self.view.finish(cell)

    def _bury(self, worker: _Worker) -> None:
        """Puts the unfinished cells of a dead worker back, or records them as failed."""
        job, worker.job = worker.job, None
        assert job is not None
        worker.process.join()
        how = _cause_of_death(worker.process.exitcode)
        rest = self._unfinished(job.group)
        if not rest.cells:
            return
        if job.attempts < MAX_ATTEMPTS:
            self.view.say(f"{job.group.label}: its worker process {how}; trying once more")
            self.jobs.appendleft(_Job(rest, job.attempts))
            return
        for cell in rest.cells:
            reason = f"the worker process {how}, {job.attempts} times"
            RecordStore(self.plan.request.out).append(failure(cell, reason, now()))
            self._finish(Finished(cell.key, cell.label, None, reason))

    def _unfinished(self, group: Group) -> Group:
        """The cells without a record; one whose record was written but whose message was lost counts as finished."""
        records = RecordStore(self.plan.request.out).latest()
        for cell in group.cells:
            record = records.get(cell.key)
            if cell.key not in self.finished and record is not None and record.ok:
                self._finish(Finished(cell.key, cell.label, record.score, ""))
        return replace(group, cells=tuple(cell for cell in group.cells if cell.key not in self.finished))

    def _replace(self, index: int) -> _Worker:
        old = self.workers[index]
        old.process.join()
        old.process.close()
        old.connection.close()
        self.workers[index] = _start(old.settings)
        return self.workers[index]


def run_plan(plan: Plan, view: View, evaluator: str = EVALUATOR) -> Outcome:
    """Runs every group of a plan and returns when all cells have a record.

    Raises:
        KeyboardInterrupt: the user stopped it; workers are gone, finished cells are stored.
    """
    ranks = join_ranks()
    if ranks.leads:
        RecordStore(plan.request.out).remove_leftovers()
    if not plan.groups:
        return Outcome(())
    if ranks.size > 1:
        return Outcome(_run_as_rank(plan, view, evaluator, ranks))
    if plan.request.executor == RAY:
        from mqbench.harness.ray_run import run_on_ray

        return Outcome(run_on_ray(plan, view, evaluator, MAX_ATTEMPTS))
    pool = _Pool(plan, view, evaluator)
    completed = False
    try:
        pool.run()
        completed = True
    finally:
        pool.stop(kill=not completed)
    return Outcome(tuple(pool.finished.values()))


def _run_as_rank(plan: Plan, view: View, evaluator: str, ranks: Ranks) -> tuple[Finished, ...]:
    """Runs every group in this process, together with the other ranks."""
    finished = []

    def tell(message: Advanced | Finished) -> None:
        if isinstance(message, Advanced):
            view.advance(message.amount)
        else:
            finished.append(message)
            view.finish(message)

    ranks.meet()  # everybody has planned before anybody stores
    executor = Executor(plan.request, ranks.device(plan.request.device), tell, evaluator, ranks)
    for group in plan.groups:
        executor.run_group(group)
    ranks.meet()
    return tuple(finished)


def worker_devices(device: str, count: int) -> Sequence[str]:
    """One device per worker: ``cuda`` spreads over the GPUs, everything else is taken as it is."""
    return [f"cuda:{index}" for index in range(count)] if device == "cuda" else [device] * count


def serve(connection: Connection, settings: WorkerSettings) -> None:
    """A worker process: runs the groups that come in until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers in order.
    import torch

    def tell(message: Advanced | Finished | GroupDone) -> None:
        try:
            connection.send(message)
        except OSError:  # The parent is gone. No cell failed, so no record may say so: end here.
            raise SystemExit(1) from None

    torch.set_num_threads(settings.threads)
    executor = Executor(settings.request, settings.device, tell, settings.evaluator)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone, and with it the queue
        while (group := connection.recv()) is not None:
            executor.run_group(group)
            tell(GroupDone())


def _start(settings: WorkerSettings) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, settings), daemon=True, name="mqbench-worker")
    with _worker_environment(settings.threads):
        process.start()
    theirs.close()
    return _Worker(settings, process, ours)


@contextlib.contextmanager
def _worker_environment(threads: int) -> Iterator[None]:
    """Environment variables of a worker while it starts: libraries read these when they are imported."""
    wanted = dict.fromkeys(THREAD_VARIABLES, str(threads)) | WORKER_VARIABLES
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    hint = " (often: out of memory)" if -exitcode == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
