"""Scores by VLMEvalKit's evaluators, with exact matching in place of a judge model."""

from __future__ import annotations

import ast
import contextlib
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pandas as pd

from mqbench.harness.datasets.catalog import Kind, Task
from mqbench.harness.datasets.files import TaskData
from mqbench.harness.datasets.headline import (
    attainable,
    check_sum,
    context_accuracy,
    flat_metrics,
    headline_of_hits,
    official_headline,
)
from mqbench.harness.errors import OutputError, ScoringError
from mqbench.harness.vlmeval_kit.library import build_dataset, vlmeval_module, vlmeval_state


@dataclass(frozen=True)
class EvalResult:
    """What a benchmark says about one set of predictions.

    Attributes:
        score: The headline, 0 to ``task.max_score``.
        metrics: Every figure of VLMEvalKit's evaluator in its own units, ``num_items``, and for multiple choice the
            accuracy by context: TXT (the row has a hint), IMG (an image), NO (neither).
        hits: Row index -> score of that row, 0 to 1 (MME: of the single question).
    """

    score: float
    metrics: dict[str, float]
    hits: dict[str, float]


def score(task: Task, data: TaskData, predictions: Mapping[str, str], work_dir: Path) -> EvalResult:
    """Scores predictions with VLMEvalKit's evaluator, exact matching only.

    Args:
        task: The benchmark.
        data: Its rows.
        predictions: Row index -> answer, one for every row.
        work_dir: Existing folder for files that are removed before returning.

    Raises:
        ScoringError: a prediction is missing or belongs to no row, or the rows' scores do not add up to the whole's.
        OutputError: ``work_dir`` cannot be written.
    """
    _check_predictions(task, data, predictions)
    dataset = build_dataset(task, data)
    frame = dataset.data.assign(prediction=[predictions[index] for index in data.indices])
    if task.kind is Kind.YES_NO_PAIRS:  # the evaluator pairs questions by this column; base64 files repeat images
        frame = frame.assign(image_path=data.frame["image_path"])
    with _scratch_folder(work_dir) as folder, vlmeval_state(), _silent_serial_scorer():
        run = _Run(task, data, dataset, frame, folder / f"{task.dataset}.pkl")
        result = run.evaluate(frame, run.eval_file)
        hits = [float(hit) for hit in _ITEM_SCORES[task.kind](run)]
    metrics = flat_metrics(result)
    official = official_headline(task, data, result, metrics)
    check_sum(task, official, headline_of_hits(task, data, hits))
    if task.kind is Kind.MULTIPLE_CHOICE:
        metrics |= context_accuracy(data, hits)
    metrics["num_items"] = float(len(data))
    headline = official / attainable(task, data) * task.max_score
    return EvalResult(headline, metrics, dict(zip(data.indices, hits, strict=True)))


@dataclass(frozen=True)
class _Run:
    """One evaluation in progress: ``frame`` was written to ``eval_file`` and scored by ``dataset``."""

    task: Task
    data: TaskData
    dataset: Any
    frame: pd.DataFrame
    eval_file: Path

    def evaluate(self, frame: pd.DataFrame, path: Path) -> Any:
        # A pickle keeps predictions as they are; spreadsheets turn '007' into 7.0 and '=1+1' into 0.
        path.write_bytes(pickle.dumps(frame))
        return self.dataset.evaluate(str(path), model="exact_matching")

    def side_file(self, suffix: str) -> Path:
        return self.eval_file.with_name(f"{self.eval_file.stem}{suffix}")


@contextlib.contextmanager
def _silent_serial_scorer() -> Iterator[None]:
    """Keeps progress bars off the screen, and scorers from forking 16 processes of a process that holds a model."""
    module = vlmeval_module("vlmeval.dataset.image_vqa")
    processes = module.mp
    serial = SimpleNamespace(map=lambda function, items: [function(item) for item in items])
    module.mp = SimpleNamespace(Pool=lambda _workers: serial)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        module.mp = processes


@contextlib.contextmanager
def _scratch_folder(work_dir: Path) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix=".score-", dir=work_dir)
    except OSError as error:
        raise OutputError(f"cannot write to '{work_dir}': {error.strerror or error}; choose another --out") from None
    with folder as name:
        yield Path(name)


def _check_predictions(task: Task, data: TaskData, predictions: Mapping[str, str]) -> None:
    missing = [index for index in data.indices if index not in predictions]
    unknown = predictions.keys() - set(data.indices)
    if missing or unknown:
        first = missing[0] if missing else sorted(unknown)[0]
        raise ScoringError(
            f"{task.name}: {len(missing)} row(s) lack a prediction and {len(unknown)} prediction(s) belong to no row "
            f"(first: index {first}); remove the partial answers of this cell and run it again"
        )


def _vqa_hits(run: _Run) -> list[float]:
    details = pd.read_csv(run.side_file("_results.tsv"), sep="\t", usecols=["eval_match"], dtype=str)
    matches = [{"match": ast.literal_eval(text)} for text in details["eval_match"]]
    return list(vlmeval_module("vlmeval.dataset.utils.vqa_eval").hit_calculate(matches, run.task.dataset))


def _ocrbench_hits(run: _Run) -> list[float]:
    # The evaluator keeps counts only: it is asked about one row at a time.
    path = run.side_file("_row.pkl")
    return [run.evaluate(run.frame.iloc[[row]], path)["Final Score"] for row in range(len(run.frame))]


def _yes_no_hits(run: _Run) -> list[float]:
    judged = pd.read_csv(run.side_file("_auxmatch.tsv"), sep="\t", usecols=["index", "score"])
    return list(judged.set_index("index")["score"].loc[run.frame["index"]])


def _multiple_choice_hits(run: _Run) -> list[float]:
    judged = pickle.loads(run.side_file("_exact_matching_result.pkl").read_bytes())
    return [judged[index]["hit"] for index in run.frame["index"]]


_ITEM_SCORES: Mapping[Kind, Callable[[_Run], list[float]]] = MappingProxyType(
    {
        Kind.VQA: _vqa_hits,
        Kind.OCRBENCH: _ocrbench_hits,
        Kind.YES_NO_PAIRS: _yes_no_hits,
        Kind.MULTIPLE_CHOICE: _multiple_choice_hits,
    }
)
