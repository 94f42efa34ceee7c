"""One process's work: load a model, quantize it, evaluate its benchmarks and store a record for each."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mqbench.harness import discover, environment
from mqbench.harness.backend import backend_of, choose_backend, layers_of
from mqbench.harness.cell_data import CellData, image_numbers
from mqbench.harness.cell_record import attention_of, failure, reason_of, started_at_of
from mqbench.harness.errors import MissingWeightsError, RequestError
from mqbench.harness.plan import Group
from mqbench.harness.ranks import Ranks
from mqbench.harness.record import Cell, Record, Sample, Status
from mqbench.harness.request import Request
from mqbench.harness.select import FLOAT_METHOD
from mqbench.harness.sources import current_hash, remote_code
from mqbench.harness.store import RecordStore
from mqbench.harness.tasks import TaskKind, TaskResult, task_info

if TYPE_CHECKING:
    from mqbench.harness.models.adapter import LoadedModel, ModelAdapter
    from mqbench.harness.quant.integer import BackendReport
    from mqbench.harness.quant.session import Batch, QuantReport

EVALUATOR = "mqbench.harness.evaluate"
"""Module that makes prompts, generates answers and scores them."""


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


@dataclass(frozen=True)
class Ready:
    """A model in memory, quantized, with what is known about it.

    Attributes:
        report: What quantization did; None for the float baseline.
        quantize_s: Seconds that it took.
        integers: What runs in integers; None under the simulated backend.
    """

    loaded: LoadedModel
    adapter: ModelAdapter
    report: QuantReport | None
    quantize_s: float
    integers: BackendReport | None = None


@dataclass(frozen=True)
class Measured:
    """What a cell came to; ``prompts_sha256`` is empty where there are no prompts."""

    result: TaskResult
    prompts_sha256: str = ""


Notify = Callable[[Advanced | Finished], None]


@dataclass
class Executor:
    """Runs groups one after another, keeping data and calibration prompts in memory.

    Attributes:
        request: What the user asked for.
        device: This worker's device (``cuda:1``).
        notify: Told about progress.
        evaluator: Module with ``evaluate_task``, ``score``, ``prompts_sha256``, ``calibration_prompts`` and
            ``make_batches``.
        ranks: This process among those that share each cell's rows.
    """

    request: Request
    device: str
    notify: Notify
    evaluator: str = EVALUATOR
    ranks: Ranks = field(default_factory=Ranks)

    @cached_property
    def store(self) -> RecordStore:
        return RecordStore(self.request.out)

    @cached_property
    def evaluate(self) -> Any:
        return importlib.import_module(self.evaluator)

    @cached_property
    def data(self) -> CellData:
        return CellData(self.request, self.evaluate)

    def run_group(self, group: Group) -> None:
        """Writes one record for each cell, whatever happens; only the store's own errors come out."""
        started = time.perf_counter()
        ready: list[Ready] = []

        def prepare() -> dict[str, str]:
            ready.append(self.prepare(group))
            return {}

        try:
            self.ranks.merge(prepare)
        except Exception as error:
            for cell in group.cells:
                self._store_failure(cell, error, started)
            return
        for cell in group.cells:
            self._run_cell(ready[0], cell)

    def prepare(self, group: Group) -> Ready:
        """The model of a group, ready to evaluate."""
        loaded = self.load(group)
        started = time.perf_counter()
        report = self.quantize(loaded, group)
        quantize_s = time.perf_counter() - started
        if group.needs_calibration and group.calibration is not None:
            self.notify(Advanced(group.calibration.num_samples))
        integers = choose_backend(loaded, group)
        return Ready(loaded, discover.find_model(group.source.model), report, quantize_s, integers)

    def quantize(self, loaded: LoadedModel, group: Group) -> QuantReport | None:
        """Quantizes in place, or puts back what was quantized before; None for the float baseline."""
        import torch

        if group.source.quantized is not None:
            report = self._load_quantized(loaded, group)
            self._offload(loaded)
            return report
        self._offload(loaded)
        if group.recipe.method == FLOAT_METHOD:
            return None
        torch.manual_seed(group.recipe.seed)
        method = discover.find_method(group.recipe.method)
        batches = self.data.calibration_batches(loaded, group.calibration) if group.calibration else []
        return method.quantize(loaded.model, loaded.layout, group.recipe, batches)

    def load(self, group: Group) -> LoadedModel:
        """The float model of a group."""
        import torch

        source = group.source
        if current_hash(source.weights, source.quantized) != source.weights_sha256:
            raise MissingWeightsError(f"'{source.weights}' changed while the run was under way; run again")
        adapter = discover.find_model(source.model)
        dtype = getattr(torch, self.request.torch_dtype)
        trusted = {"trust_remote_code": True} if remote_code(adapter) and self.request.trust_remote_code else {}
        device = "cpu" if self.request.offload else self.device
        return adapter.load(group.source.weights, device, dtype, **trusted)

    def _offload(self, loaded: LoadedModel) -> None:
        """From now on blocks come to this worker's device one at a time, where that was asked for."""
        if self.request.offload:
            import torch

            from mqbench.harness.quant.offload import BlockOffload

            BlockOffload(loaded.model, loaded.layout, torch.device(self.device))

    def _load_quantized(self, loaded: LoadedModel, group: Group) -> QuantReport:
        from mqbench.harness.quant.serialize import load_quantized

        assert group.source.quantized is not None
        method = discover.find_method(group.recipe.method)
        return load_quantized(group.source.quantized, loaded, getattr(method, "restore", None)).report

    def _run_cell(self, ready: Ready, cell: Cell) -> None:
        started = time.perf_counter()
        try:
            measured = self._measure(ready, cell)
        except Exception as error:
            self._store_failure(cell, error, started, ready.loaded)
            return
        record = Record(
            cell=cell,
            status=Status.OK,
            started_at=started_at_of(started),
            duration_s=round(time.perf_counter() - started, 3),
            score=measured.result.score,
            metrics=measured.result.metrics,
            samples=measured.result.samples,
            arrays=measured.result.arrays,
            prompts_sha256=measured.prompts_sha256,
            environment=environment.describe(attention_of(ready.loaded)) | layers_of(ready.integers),
            backend=backend_of(ready.integers),
            quantize_s=round(ready.quantize_s, 3),
        )
        self._store(record)

    def _measure(self, ready: Ready, cell: Cell) -> Measured:
        match task_info(cell.task).kind:
            case TaskKind.BENCHMARK:
                return self._benchmark(ready, cell)
            case TaskKind.PERPLEXITY:
                return self._perplexity(ready, cell)
            case TaskKind.PROBE:
                return self._probe(ready, cell)
            case kind:
                raise RequestError(f"a cell of kind '{kind}' runs on no model in memory")

    def _benchmark(self, ready: Ready, cell: Cell) -> Measured:
        from mqbench.harness.finite import finite_outputs

        loaded, data = ready.loaded, self.data.benchmark(cell)
        done, keep = self._resumed(cell)

        def answer() -> dict[str, str]:
            with finite_outputs(loaded.model, loaded.layout):
                answers: dict[str, str] = self.evaluate.evaluate_task(
                    loaded, ready.adapter, data.task, data, cell.batch_size, keep, done, self.ranks.share
                )
            return answers

        merged = self._merged(answer)
        answers = {index: merged[index] for index in data.indices}
        folder = self.store.folder / "partial"
        folder.mkdir(exist_ok=True)
        scored = self.evaluate.score(data.task, data, answers, folder)
        samples = tuple(Sample(index, text, scored.hits.get(index)) for index, text in answers.items())
        prompts = self.evaluate.prompts_sha256(data.task, data, loaded.layout.family)
        arrays = {"cluster": image_numbers(data)}
        return Measured(TaskResult(scored.score, scored.metrics, samples, arrays), prompts)

    def _perplexity(self, ready: Ready, cell: Cell) -> Measured:
        from mqbench.harness.finite import finite_outputs
        from mqbench.harness.perplexity import perplexity, window_losses

        loaded, windows = ready.loaded, self.data.windows(ready.loaded, ready.adapter, cell)
        done, keep = self._resumed(cell)

        def answer() -> dict[str, str]:
            with finite_outputs(loaded.model, loaded.layout):
                own = window_losses(loaded, windows, cell.batch_size, keep, done, self.ranks.share)
            return {index: repr(loss) for index, loss in own.items()}

        merged = self._merged(answer)
        losses = {str(row): float(merged[str(row)]) for row in range(len(windows))}
        count, length = windows.shape
        metrics = {"perplexity": perplexity(losses), "num_items": float(count), "context_length": float(length)}
        samples = tuple(Sample(index, "", loss) for index, loss in losses.items())
        return Measured(TaskResult(metrics["perplexity"], metrics, samples))

    def _merged(self, answer: Callable[[], dict[str, str]]) -> dict[str, str]:
        """The answers of all ranks; those of the others count as progress when they arrive."""
        own: dict[str, str] = {}

        def remember() -> dict[str, str]:
            own.update(answer())
            return own

        merged = self.ranks.merge(remember)
        self.notify(Advanced(len(merged.keys() - own.keys())))
        return merged

    def _probe(self, ready: Ready, cell: Cell) -> Measured:
        from mqbench.harness.probes import PROBES, ProbeContext

        def batches() -> list[Batch]:
            if cell.calibration is None:
                raise RequestError(f"task '{cell.task}' looks at calibration samples, and none were planned")
            return self.data.calibration_batches(ready.loaded, cell.calibration)

        context = ProbeContext(
            ready.loaded,
            cell.recipe,
            ready.report,
            batches,
            lambda: self.data.evaluated_batches(ready.loaded, ready.adapter, cell),
        )
        result = PROBES[cell.task].run(context)
        self.notify(Advanced(1))
        return Measured(result)

    def _resumed(self, cell: Cell) -> tuple[dict[str, str], Callable[[Mapping[str, str]], None]]:
        """The answers of a run that was killed in this cell, and what keeps new ones."""
        partial = self.store.partial(cell.key)
        done = partial.load()
        self.notify(Advanced(len(done)))

        def keep(new: Mapping[str, str]) -> None:
            partial.append(new)
            self.notify(Advanced(sum(index not in done for index in new)))

        return done, keep

    def _store_failure(self, cell: Cell, error: Exception, started: float, loaded: LoadedModel | None = None) -> None:
        text = "".join(traceback.format_exception(error))
        self.store.write_failure(cell.key, text)
        attention = None if loaded is None else attention_of(loaded)
        record = failure(cell, reason_of(error), started_at_of(started), time.perf_counter() - started, attention)
        self._store(record)

    def _store(self, record: Record) -> None:
        if self.ranks.leads:
            self.store.append(record)
        self.notify(Finished(record.cell.key, record.cell.label, record.score, record.reason))
