"""What a request reads: rows, text windows and calibration samples, each loaded once and checked before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mqbench.harness import discover
from mqbench.harness.datasets.catalog import TASKS
from mqbench.harness.errors import CalibrationError
from mqbench.harness.evaluated import rows_sha256
from mqbench.harness.record import CalibrationInfo
from mqbench.harness.request import Request
from mqbench.harness.sources import Source
from mqbench.harness.tasks import Needs, TaskInfo, TaskKind

if TYPE_CHECKING:
    from mqbench.harness.datasets.calibration import Calibration
    from mqbench.harness.datasets.files import TaskData
    from mqbench.harness.models.adapter import ModelAdapter

WEIGHTS_ONLY = hashlib.sha256(b"").hexdigest()
"""``data_sha256`` of a probe that reads nothing but the model."""


@dataclass(frozen=True)
class TaskInput:
    """What one cell reads.

    Attributes:
        data_sha256: Hash of the rows, windows or samples.
        num_rows: How many, for progress.
        limit: As the cell records it: None where no limit applies.
        calibration: Samples that a probe looks at; None for all others.
    """

    data_sha256: str
    num_rows: int
    limit: int | None = None
    calibration: CalibrationInfo | None = None


@dataclass
class Inputs:
    """Reads what the cells of one request need, each file once."""

    request: Request
    _benchmarks: dict[str, TaskData] = field(default_factory=dict)
    _windows: dict[str, int] = field(default_factory=dict)
    _multimodal: list[Calibration] = field(default_factory=list)

    def benchmark(self, name: str) -> TaskData:
        """The rows of a benchmark.

        Raises:
            DatasetError: a file is unusable.
        """
        from mqbench.harness.datasets.catalog import find_task
        from mqbench.harness.datasets.files import load_task

        if name not in self._benchmarks:
            self._benchmarks[name] = load_task(find_task(name), self.request.data_dir, self.request.limit)
        return self._benchmarks[name]

    def text(self, source: Source) -> TaskInput:
        """The text windows that a model's perplexity is measured on, counted in its own tokens.

        Raises:
            DatasetError: a file is unusable.
        """
        from transformers import AutoTokenizer

        from mqbench.harness.datasets.text import load_corpus, load_windows

        request, length = self.request, context_length(source)
        if source.model not in self._windows:
            tokenizer = AutoTokenizer.from_pretrained(source.weights, local_files_only=True)
            self._windows[source.model] = len(load_windows(tokenizer, length, request.limit, request.data_dir))
        corpus = load_corpus("test", request.data_dir)
        return TaskInput(corpus.windows_hash(length), self._windows[source.model], request.limit)

    def task(self, info: TaskInfo, source: Source) -> TaskInput:
        """What a task reads when it runs on a model."""
        if info.kind is TaskKind.BENCHMARK:
            rows = self.benchmark(info.name)
            return TaskInput(rows.content_hash, len(rows), self.request.limit)
        if info.kind is TaskKind.PERPLEXITY:
            return self.text(source)
        if info.uses_rows:
            return self._rows(source)
        if not info.uses_calibration:
            return TaskInput(WEIGHTS_ONLY, 1)
        calibration = self.calibration(source)
        return TaskInput(calibration.sha256, 1, calibration=calibration)

    def _rows(self, source: Source) -> TaskInput:
        """All that is evaluated on a model: the windows of text, or the rows of every benchmark."""
        if modality_of(source) is Needs.TEXT:
            return replace(self.text(source), num_rows=1)
        return TaskInput(rows_sha256([self.benchmark(name) for name in TASKS]), 1, self.request.limit)

    def calibration(self, source: Source) -> CalibrationInfo:
        """The samples that set a model's static scales.

        Raises:
            CalibrationError: there are too few, or they overlap with what is evaluated.
        """
        if modality_of(source) is Needs.TEXT:
            from mqbench.harness.datasets.text import text_calibration_info

            request = self.request
            return text_calibration_info(request.calib_samples, request.seed, context_length(source), request.data_dir)
        if not self._multimodal:
            self._multimodal.append(load_multimodal(self.request))
        return calibration_info(self._multimodal[0])

    def calibration_hashes(self, source: Source) -> tuple[str, ...]:
        """Content hashes of a model's calibration samples, by which an overlap is found later on."""
        if modality_of(source) is Needs.TEXT:
            return self._text_hashes("train")
        parts = [part for calibration in self._multimodal for part in calibration.parts]
        return tuple(row for part in parts for row in part.prompt_hashes)

    def check_overlap(self, sources: Sequence[Source]) -> None:
        """No evaluated row was calibrated on, now or when a quantized folder was made.

        Raises:
            CalibrationError: one was.
        """
        for rows in self._benchmarks.values():
            for calibration in self._multimodal:
                calibration.refuse_overlap(rows)
            for source in sources:
                _check_provenance(source, rows.prompt_hashes, str(rows.source))
        for source in sources:
            if source.provenance is not None and source.model in self._windows:
                _check_provenance(source, self._text_hashes("test"), "the evaluated text")

    def _text_hashes(self, split: str) -> tuple[str, ...]:
        from mqbench.harness.datasets.text import load_corpus, paragraph_hashes

        return tuple(digest.hex() for digest in paragraph_hashes(load_corpus(split, self.request.data_dir)))


def modality_of(source: Source) -> Needs:
    """Whether a model sees images."""
    return modality_of_adapter(discover.find_model(source.model))


def modality_of_adapter(adapter: ModelAdapter) -> Needs:
    """Whether an adapter's models see images; adapters that do not say so do."""
    return Needs(getattr(adapter, "modality", Needs.MULTIMODAL))


def load_multimodal(request: Request) -> Calibration:
    """The calibration samples with images that a request asks for."""
    from mqbench.harness.datasets.calibration import load_calibration

    return load_calibration(request.calib_split, request.calib_samples, request.seed, request.data_dir)


def context_length(source: Source) -> int:
    """Tokens per window of a text-only model."""
    return int(discover.find_model(source.model).context_length)  # type: ignore[attr-defined]


def calibration_info(calibration: Calibration) -> CalibrationInfo:
    """The form that records keep: a user's folder is named without its path."""
    dataset = "shipped" if calibration.dataset == "shipped" else "data-dir"
    return CalibrationInfo(dataset, calibration.split, calibration.num_samples, calibration.seed, calibration.hash)


def _check_provenance(source: Source, hashes: Sequence[str], where: str) -> None:
    seen = set() if source.provenance is None else set(source.provenance.prompt_hashes) & set(hashes)
    if seen:
        raise CalibrationError(
            f"'{source.quantized}' was calibrated on {len(seen)} evaluated row(s) of {where}; "
            "quantize again with another --calib-split or --data-dir"
        )
