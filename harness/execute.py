"""One process's work: load a model, quantize it, evaluate its benchmarks and store a record for each."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mqbench.harness import discover, environment
from mqbench.harness.errors import DatasetError, MissingWeightsError, MQBenchError
from mqbench.harness.plan import Group, Request
from mqbench.harness.record import Cell, Record, Sample, Status
from mqbench.harness.select import FLOAT_METHOD
from mqbench.harness.sources import current_hash
from mqbench.harness.store import PartialAnswers, RecordStore

if TYPE_CHECKING:
    from mqbench.harness.datasets.files import TaskData
    from mqbench.harness.models.adapter import LoadedModel, ModelAdapter
    from mqbench.harness.quant.session import Batch, QuantReport

EVALUATOR = "mqbench.harness.evaluate"
"""Module that makes prompts, generates answers and scores them."""

MAX_REASON_LENGTH = 500


@dataclass(frozen=True)
class Advanced:
    """Some work was done: evaluated rows, or calibration samples used."""

    amount: int


@dataclass(frozen=True)
class Finished:
    """A cell has its record."""

    key: str
    label: str
    score: float | None
    reason: str


Notify = Callable[[Advanced | Finished], None]


@dataclass
class Executor:
    """Runs groups one after another, keeping data and calibration prompts in memory.

    Attributes:
        request: What the user asked for.
        device: This worker's device (``cuda:1``).
        notify: Told about progress.
        evaluator: Module with ``evaluate_task``, ``score``, ``calibration_prompts`` and ``make_batches``.
    """

    request: Request
    device: str
    notify: Notify
    evaluator: str = EVALUATOR
    _data: dict[str, TaskData] = field(default_factory=dict)
    _prompts: dict[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def store(self) -> RecordStore:
        return RecordStore(self.request.out)

    @cached_property
    def evaluate(self) -> Any:
        return importlib.import_module(self.evaluator)

    def run_group(self, group: Group) -> None:
        """Writes one record for each cell, whatever happens; only the store's own errors come out."""
        started = time.perf_counter()
        try:
            loaded, quantize_s = self.prepare(group)
        except Exception as error:
            for cell in group.cells:
                self._store_failure(cell, error, started)
            return
        adapter = discover.find_model(group.source.model)
        for cell in group.cells:
            self._run_cell(loaded, adapter, cell, quantize_s)

    def prepare(self, group: Group) -> tuple[LoadedModel, float]:
        """The model of a group, ready to evaluate, and the seconds that quantizing it took."""
        loaded = self.load(group)
        started = time.perf_counter()
        self.quantize(loaded, group)
        quantize_s = time.perf_counter() - started
        if group.needs_calibration:
            self.notify(Advanced(self.request.calib_samples))
        return loaded, quantize_s

    def quantize(self, loaded: LoadedModel, group: Group) -> QuantReport | None:
        """Quantizes in place; None when the folder was quantized before or the method is the float baseline."""
        import torch

        if group.source.quantized is not None:
            self._load_quantized(loaded, group)
            return None
        if group.recipe.method == FLOAT_METHOD:
            return None
        torch.manual_seed(group.recipe.seed)
        method = discover.find_method(group.recipe.method)
        batches = self._calibration_batches(loaded, group) if group.needs_calibration else []
        return method.quantize(loaded.model, loaded.layout, group.recipe, batches)

    def load(self, group: Group) -> LoadedModel:
        """The float model of a group."""
        import torch

        source = group.source
        if current_hash(source.weights, source.quantized) != source.weights_sha256:
            raise MissingWeightsError(f"'{source.weights}' changed while the run was under way; run again")
        adapter = discover.find_model(source.model)
        return adapter.load(group.source.weights, self.device, getattr(torch, self.request.torch_dtype))

    def _load_quantized(self, loaded: LoadedModel, group: Group) -> None:
        from mqbench.harness.quant.serialize import load_quantized

        assert group.source.quantized is not None
        method = discover.find_method(group.recipe.method)
        load_quantized(group.source.quantized, loaded, getattr(method, "restore", None))

    def _calibration_batches(self, loaded: LoadedModel, group: Group) -> list[Batch]:
        """Prompts with their answers, encoded in batches of similar length."""
        prompts = self._calibration_prompts(loaded.layout.family)
        adapter = discover.find_model(group.source.model)
        messages = [message for message, _ in prompts]
        return [
            adapter.encode(loaded, [prompts[row][0] for row in rows], [prompts[row][1] for row in rows])
            for rows in self.evaluate.make_batches(messages, self.request.batch_size)
        ]

    def _calibration_prompts(self, family: str) -> list[Any]:
        from mqbench.harness.plan import load_calibration_set

        if family not in self._prompts:
            calibration = load_calibration_set(self.request, needed=True)
            self._prompts[family] = self.evaluate.calibration_prompts(calibration, family)
        return self._prompts[family]

    def _run_cell(self, loaded: LoadedModel, adapter: ModelAdapter, cell: Cell, quantize_s: float) -> None:
        started = time.perf_counter()
        try:
            record = self._evaluated(loaded, adapter, cell, quantize_s, started)
        except Exception as error:
            self._store_failure(cell, error, started, loaded)
            return
        self.store.append(record)
        self.notify(Finished(cell.key, cell.label, record.score, ""))

    def _evaluated(
        self, loaded: LoadedModel, adapter: ModelAdapter, cell: Cell, quantize_s: float, started: float
    ) -> Record:
        from mqbench.harness.finite import finite_outputs

        data = self._task_data(cell)
        with finite_outputs(loaded.model, loaded.layout):
            answers = self._answers(loaded, adapter, data, cell)
        folder = self.store.folder / "partial"
        folder.mkdir(exist_ok=True)
        result = self.evaluate.score(data.task, data, answers, folder)
        return Record(
            cell=cell,
            status=Status.OK,
            started_at=_started_at(started),
            duration_s=round(time.perf_counter() - started, 3),
            score=result.score,
            metrics=result.metrics,
            samples=tuple(Sample(index, text, result.hits.get(index)) for index, text in answers.items()),
            environment=environment.describe(attention_of(loaded)),
            quantize_s=round(quantize_s, 3),
        )

    def _answers(self, loaded: LoadedModel, adapter: ModelAdapter, data: TaskData, cell: Cell) -> dict[str, str]:
        """Answers to every row; those of a run that was killed in this cell are kept."""
        partial: PartialAnswers = self.store.partial(cell.key)
        done = partial.load()
        self.notify(Advanced(len(done)))

        def keep(new: Mapping[str, str]) -> None:
            partial.append(new)
            self.notify(Advanced(sum(index not in done for index in new)))

        answers: dict[str, str] = self.evaluate.evaluate_task(
            loaded, adapter, data.task, data, cell.batch_size, on_progress=keep, done=done
        )
        return answers

    def _task_data(self, cell: Cell) -> TaskData:
        from mqbench.harness.datasets.catalog import find_task
        from mqbench.harness.datasets.files import load_task

        if cell.task not in self._data:
            self._data[cell.task] = load_task(find_task(cell.task), self.request.data_dir, self.request.limit)
        data = self._data[cell.task]
        if data.content_hash != cell.data_sha256:
            raise DatasetError(f"{data.source} changed while the run was under way; run again")
        return data

    def _store_failure(self, cell: Cell, error: Exception, started: float, loaded: LoadedModel | None = None) -> None:
        text = "".join(traceback.format_exception(error))
        self.store.write_failure(cell.key, text)
        attention = None if loaded is None else attention_of(loaded)
        record = failure(cell, reason_of(error), _started_at(started), time.perf_counter() - started, attention)
        self.store.append(record)
        self.notify(Finished(cell.key, cell.label, None, record.reason))


def failure(cell: Cell, reason: str, started_at: str, duration_s: float = 0.0, attention: str | None = None) -> Record:
    """The record of a cell that failed."""
    return Record(
        cell=cell,
        status=Status.FAILED,
        started_at=started_at,
        duration_s=round(duration_s, 3),
        reason=reason,
        environment=environment.describe(attention),
    )


def reason_of(error: Exception) -> str:
    """One line: our own errors speak for themselves, others need their kind."""
    text = " ".join(str(error).split())
    named = text if isinstance(error, MQBenchError) else f"{type(error).__name__}: {text}"
    return named[:MAX_REASON_LENGTH]


def attention_of(loaded: LoadedModel) -> str | None:
    """The attention backend, which changes scores."""
    return getattr(getattr(loaded.model, "config", None), "_attn_implementation", None)


def now() -> str:
    """ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _started_at(started: float) -> str:
    moment = datetime.now(UTC).timestamp() - (time.perf_counter() - started)
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
