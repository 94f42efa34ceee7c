"""What a worker reads for the cells it was given: data and calibration prompts, loaded once and found unchanged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mqbench.harness import discover
from mqbench.harness.datasets.catalog import TASKS, find_task
from mqbench.harness.errors import DatasetError
from mqbench.harness.inputs import modality_of_adapter
from mqbench.harness.record import CalibrationInfo, Cell
from mqbench.harness.request import Request
from mqbench.harness.tasks import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from mqbench.harness.datasets.files import TaskData
    from mqbench.harness.evaluated import EvaluatedBatch
    from mqbench.harness.models.adapter import LoadedModel
    from mqbench.harness.quant.session import Batch


@dataclass
class CellData:
    """Data of a request's cells; whoever changed a file since the plan was made gets a ``DatasetError``.

    Attributes:
        request: What the user asked for.
        evaluate: Module with ``build_messages``, ``calibration_prompts`` and ``make_batches``.
    """

    request: Request
    evaluate: Any
    _rows: dict[tuple[str, int | None], TaskData] = field(default_factory=dict)
    _prompts: dict[tuple[str, CalibrationInfo], list[Any]] = field(default_factory=dict)

    def calibration_batches(self, loaded: LoadedModel, info: CalibrationInfo) -> list[Batch]:
        """The calibration samples as model inputs: prompts with their answers, or windows of text."""
        adapter = discover.find_model(loaded.name)
        if modality_of_adapter(adapter) is Needs.TEXT:
            return self._text_calibration(loaded, adapter, info)
        prompts = self._calibration_prompts(loaded.layout.family, info)
        messages = [message for message, _ in prompts]
        return [
            adapter.encode(loaded, [prompts[row][0] for row in rows], [prompts[row][1] for row in rows])
            for rows in self.evaluate.make_batches(messages, self.request.batch_size)
        ]

    def _text_calibration(self, loaded: LoadedModel, adapter: Any, info: CalibrationInfo) -> list[Batch]:
        from mqbench.harness.datasets.text import load_text_calibration

        settings = info.num_samples, info.seed, adapter.context_length
        found = load_text_calibration(*settings, loaded.processor, self.request.data_dir)
        _require_unchanged(found.info.sha256, info.sha256, "the calibration text")
        return found.batches(loaded.model, self.request.batch_size)

    def _calibration_prompts(self, family: str, info: CalibrationInfo) -> list[Any]:
        from mqbench.harness.datasets.calibration import load_calibration

        if (family, info) not in self._prompts:
            found = load_calibration(info.split, info.num_samples, info.seed, self.request.data_dir)
            _require_unchanged(found.hash, info.sha256, "the calibration data")
            self._prompts[family, info] = self.evaluate.calibration_prompts(found, family)
        return self._prompts[family, info]

    def evaluated_batches(self, loaded: LoadedModel, adapter: Any, cell: Cell) -> Iterable[EvaluatedBatch]:
        """What is evaluated, as model inputs, batch by batch: windows of text, or the rows of all benchmarks."""
        from mqbench.harness.evaluated import benchmark_batches, rows_sha256, window_batches

        if modality_of_adapter(adapter) is Needs.TEXT:
            return window_batches(loaded, adapter, self.windows(loaded, adapter, cell), cell.batch_size)
        parts = [self._rows_of(task, cell.limit) for task in TASKS]
        _require_unchanged(rows_sha256(parts), cell.data_sha256, "what is evaluated")
        return benchmark_batches(loaded, adapter, parts, cell.batch_size, self.evaluate)

    def windows(self, loaded: LoadedModel, adapter: Any, cell: Cell) -> Tensor:
        """The evaluated windows of text, (windows, context_length) token ids."""
        from mqbench.harness.datasets.text import load_corpus, load_windows

        length = adapter.context_length
        found = load_corpus("test", self.request.data_dir).windows_hash(length)
        _require_unchanged(found, cell.data_sha256, "the evaluated text")
        return load_windows(loaded.processor, length, cell.limit, self.request.data_dir)

    def benchmark(self, cell: Cell) -> TaskData:
        """The rows of a benchmark."""
        data = self._rows_of(cell.task, cell.limit)
        _require_unchanged(data.content_hash, cell.data_sha256, str(data.source))
        return data

    def _rows_of(self, task: str, limit: int | None) -> TaskData:
        from mqbench.harness.datasets.files import load_task

        if (task, limit) not in self._rows:
            self._rows[task, limit] = load_task(find_task(task), self.request.data_dir, limit)
        return self._rows[task, limit]


def image_numbers(data: TaskData) -> list[float]:
    """A number per row, the same for rows with the same images: such rows are no independent evidence."""
    numbers: dict[Any, float] = {}
    rows = enumerate(data.frame["images"])
    return [numbers.setdefault(images or ("row", row), float(len(numbers))) for row, images in rows]


def _require_unchanged(found: str, planned: str, what: str) -> None:
    if found != planned:
        raise DatasetError(f"{what} changed while the run was under way; run again")
