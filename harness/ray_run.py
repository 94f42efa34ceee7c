"""Runs a plan on a Ray cluster: a task per group, on any node; records come back and are stored here as they are made.

Nodes need the weights, the data and mqbench with the same versions; they share no folder with this process. A worker
that dies loses the cell that it was at: the group's other cells are stored already, and the rest is tried once more.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mqbench.harness.cell_record import failure, now
from mqbench.harness.errors import RequestError
from mqbench.harness.execute import Advanced, Executor, Finished
from mqbench.harness.plan import Group, Plan
from mqbench.harness.record import Record
from mqbench.harness.request import Request
from mqbench.harness.store import RecordStore

HINT = "install it with: pip install 'mqbench[ray]'"
DEVICE_ON_NODE = "cuda:0"
"""Ray shows a task the GPUs that it was given, and no others."""


@dataclass(frozen=True)
class Task:
    """What a worker gets.

    Attributes:
        request: What the user asked for; records go to a folder of the worker's own.
        group: Cells of one model under one recipe.
        device: The worker's device.
        evaluator: Module that makes prompts, generates answers and scores them.
    """

    request: Request
    group: Group
    device: str
    evaluator: str


@dataclass
class Job:
    """A group and how often it was begun."""

    group: Group
    attempts: int = 0


@dataclass
class Driver:
    """Hands out groups, stores what comes back, tries groups of dead workers again."""

    plan: Plan
    view: Any
    evaluator: str
    max_attempts: int
    submit: Any
    running: dict[Any, Job] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)

    def run(self, ray: Any) -> None:
        """Returns when every cell has a record."""
        for group in self.plan.groups:
            self.start(Job(group))
        while self.running:
            ready, _ = ray.wait(list(self.running), num_returns=1)
            for stream in ready:
                self._receive(ray, stream)

    def start(self, job: Job) -> None:
        """Hands a group to the cluster."""
        job.attempts += 1
        device = DEVICE_ON_NODE if self.plan.request.device.startswith("cuda") else self.plan.request.device
        self.running[self.submit(Task(self.plan.request, job.group, device, self.evaluator))] = job

    def _receive(self, ray: Any, stream: Any) -> None:
        try:
            message = ray.get(next(stream))
        except StopIteration:
            self._end(self.running.pop(stream), "ended without a word")
        except ray.exceptions.RayError as error:
            self._end(self.running.pop(stream), f"died ({type(error).__name__})")
        else:
            self._take(message)

    def _take(self, message: Advanced | Record) -> None:
        if isinstance(message, Advanced):
            self.view.advance(message.amount)
            return
        RecordStore(self.plan.request.out).append(message)
        cell = message.cell
        self._finish(Finished(cell.key, cell.label, message.score, message.reason))

    def _finish(self, cell: Finished) -> None:
        self.finished[cell.key] = cell
        self.view.finish(cell)

    def _end(self, job: Job, how: str) -> None:
        """Tries cells without a record once more, or records them as failed."""
        rest = tuple(cell for cell in job.group.cells if cell.key not in self.finished)
        if not rest:
            return
        if job.attempts < self.max_attempts:
            self.view.say(f"{job.group.label}: its worker {how}; trying once more")
            self.start(Job(replace(job.group, cells=rest), job.attempts))
            return
        for cell in rest:
            self._take(failure(cell, f"the worker {how}, {job.attempts} times", now()))


def run_on_ray(plan: Plan, view: Any, evaluator: str, max_attempts: int) -> tuple[Finished, ...]:
    """Runs every group of a plan on the cluster that ``RAY_ADDRESS`` names, or on this machine without it.

    Returns:
        What became of the cells, in the order in which they ended.

    Raises:
        RequestError: Ray is not installed.
        KeyboardInterrupt: the user stopped it; finished cells are stored.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        resources = {"num_gpus": 1} if plan.request.device.startswith("cuda") else {"num_cpus": 1}
        remote = ray.remote(max_retries=0, num_returns="streaming", **resources)(work)
        driver = Driver(plan, view, evaluator, max_attempts, remote.remote)
        driver.run(ray)
        return tuple(driver.finished.values())
    finally:
        if ours:
            ray.shutdown()


def import_ray() -> Any:
    """The package.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise RequestError(f"--executor ray needs Ray, which is not installed; {HINT}") from None
    return ray


def work(task: Task) -> Iterator[Advanced | Record]:
    """On a worker: runs a group and gives out progress and records as they come."""
    messages: queue.SimpleQueue[Advanced | Finished | None] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mqbench-") as folder:
        store = RecordStore(Path(folder))
        store.prepare()
        executor = Executor(replace(task.request, out=Path(folder)), task.device, messages.put, task.evaluator)
        thread = threading.Thread(target=_run, args=(executor, task.group, messages), daemon=True)
        thread.start()
        while (message := messages.get()) is not None:
            yield store.latest()[message.key] if isinstance(message, Finished) else message
        thread.join()


def _run(executor: Executor, group: Group, messages: queue.SimpleQueue[Any]) -> None:
    try:
        executor.run_group(group)
    finally:
        messages.put(None)
