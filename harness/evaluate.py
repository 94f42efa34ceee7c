"""Prompts, answers and scores of a benchmark: the only module that imports vlmeval.

vlmeval is imported when it is first needed, once per process (15 to 60 s), and leaves the process as it was: see
``_vlmeval_state``. Prompts and scores are VLMEvalKit's own, with exact matching in place of a judge model; the loop
that generates answers is ours, since VLMEvalKit's runs one prompt at a time.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import json
import logging
import os
import pickle
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from mqbench.harness.datasets.calibration import Calibration
from mqbench.harness.datasets.catalog import OPTION_COLUMNS, Kind, Task
from mqbench.harness.datasets.files import TaskData, reference_answer
from mqbench.harness.datasets.headline import (
    NO_GROUP,
    attainable,
    check_sum,
    context_accuracy,
    flat_metrics,
    headline_of_hits,
    official_headline,
)
from mqbench.harness.datasets.images import cache_folder
from mqbench.harness.errors import OutputError, ScoringError
from mqbench.harness.models.adapter import LoadedModel, Message, ModelAdapter
from mqbench.harness.process_state import environment_kept, libraries_kept, logging_kept


@dataclass(frozen=True)
class PromptWrapper:
    """The class with which VLMEvalKit's wrapper of a model family replaces a dataset's own prompt.

    Attributes:
        module: Where it is.
        name: Of the class.
        settings: What its constructor, which would load the model, sets beside fixed texts, and its prompts read.
    """

    module: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


INTERNVL = PromptWrapper(
    "vlmeval.vlm.internvl.internvl_chat",
    "InternVLChat",
    MappingProxyType({"_use_custom_prompt": True, "use_mpo_prompt": False, "use_cot": False}),
)
PROMPT_WRAPPERS: Mapping[str, PromptWrapper] = MappingProxyType(
    {
        "qwen2_vl": PromptWrapper(
            "vlmeval.vlm.qwen2_vl.prompt", "Qwen2VLPromptMixin", MappingProxyType({"_use_custom_prompt": True})
        ),
        "cogvlm2": PromptWrapper("vlmeval.vlm.cogvlm", "CogVlm"),
        "llava": PromptWrapper("vlmeval.vlm.llava.llava", "LLaVA"),
        "internvl": INTERNVL,
        "internvl2": INTERNVL,
        "minicpm_v": PromptWrapper("vlmeval.vlm.minicpm_v", "MiniCPM_V_2_6"),
    }
)
"""By family; one that is not listed gets the datasets' own prompts (VLMEvalKit's settings of Qwen2.5-VL)."""

PIXELS_PER_TOKEN = 28 * 28
CHARACTERS_PER_TOKEN = 4

Share = Callable[[list[list[int]]], list[list[int]]]
"""Chooses some of all batches."""

OnProgress = Callable[[Mapping[str, str]], None]
"""Called after every batch with its new predictions by row index."""


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


def build_messages(task: Task, data: TaskData, family: str) -> list[Message]:
    """The prompt of every row, as VLMEvalKit's wrapper of a model family sends it; no image for text-only rows.

    Every item also names the benchmark under ``dataset``: VLMEvalKit's wrappers choose pixel limits by it.
    """
    dataset = _build_dataset(task, data)
    build = dataset.build_prompt
    wrapper = _prompt_wrapper(family)
    if wrapper is not None and wrapper.use_custom_prompt(task.dataset):
        wrapper.set_dump_image(dataset.dump_image)
        build = functools.partial(wrapper.build_prompt, dataset=task.dataset)
    prompts = (build(dataset.data.iloc[row]) for row in range(len(data)))
    return [[{**item, "dataset": task.dataset} for item in prompt] for prompt in prompts]


def prompts_sha256(task: Task, data: TaskData, family: str) -> str:
    """Hash of every prompt's texts in order: a new template shows. The images are part of the data's own hash."""
    digest = hashlib.sha256()
    for message in build_messages(task, data, family):
        texts = [item["value"] if item["type"] == "text" else f"<{item['type']}>" for item in message]
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()


def calibration_prompts(calibration: Calibration, family: str) -> list[tuple[Message, str]]:
    """Every calibration sample as (prompt, reference answer), grouped by benchmark."""
    samples: list[tuple[Message, str]] = []
    for part in calibration.parts:
        answers = (reference_answer(part.task, row) for row in part.rows())
        samples.extend(zip(build_messages(part.task, part, family), answers, strict=True))
    return samples


def evaluate_task(
    loaded: LoadedModel,
    adapter: ModelAdapter,
    task: Task,
    data: TaskData,
    batch_size: int,
    on_progress: OnProgress | None = None,
    done: Mapping[str, str] | None = None,
    share: Share = list,
) -> dict[str, str]:
    """Greedy answers of a model to every row.

    Batches depend on the rows and ``batch_size`` alone, never on ``done``: a batch that was not finished before a crash
    is run again as a whole, so that an interrupted run gives the same answers as an uninterrupted one.

    Args:
        loaded: The model.
        adapter: Its family's way to encode and generate.
        task: The benchmark.
        data: Its rows.
        batch_size: Prompts per forward pass.
        on_progress: Told about every finished batch.
        done: Predictions of an earlier run with the same settings, by row index.
        share: Of all batches, those to run here.

    Returns:
        Row index -> answer, in the order of the rows; rows of batches that run elsewhere are left out.
    """
    messages = build_messages(task, data, loaded.layout.family)
    indices = data.indices
    kept = done or {}
    predictions = {index: kept[index] for index in indices if index in kept}
    limit = min(task.max_new_tokens, getattr(adapter, "max_new_tokens", None) or task.max_new_tokens)
    for batch in share(make_batches(messages, batch_size)):
        if all(indices[row] in predictions for row in batch):
            continue
        with torch.no_grad():
            encoded = adapter.encode(loaded, [messages[row] for row in batch])
            answers = adapter.generate(loaded, encoded, limit)
        new = {indices[row]: answer for row, answer in zip(batch, answers, strict=True)}
        predictions |= new
        if on_progress is not None:
            on_progress(new)
    return {index: predictions[index] for index in indices if index in predictions}


def make_batches(messages: Sequence[Message], batch_size: int) -> list[list[int]]:
    """Positions of prompts in batches of similar length, longest first; the same for the same prompts.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(messages)), key=lambda row: (-_num_tokens_estimate(messages[row]), row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


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
    dataset = _build_dataset(task, data)
    frame = dataset.data.assign(prediction=[predictions[index] for index in data.indices])
    if task.kind is Kind.YES_NO_PAIRS:  # the evaluator pairs questions by this column; base64 files repeat images
        frame = frame.assign(image_path=data.frame["image_path"])
    with _scratch_folder(work_dir) as folder, _vlmeval_state(), _silent_serial_scorer():
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


# --- VLMEvalKit's objects -------------------------------------------------------------------------------------------


_GROUP_COLUMNS = ("split", "category", "l2-category")


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


@functools.cache
def _vlmeval(name: str) -> Any:
    """A module of vlmeval; the first call imports the whole package."""
    with _vlmeval_state():
        return importlib.import_module(name)


@contextlib.contextmanager
def _vlmeval_state() -> Iterator[None]:
    """Lets vlmeval work in its own process-wide state and restores ours afterwards.

    Its import switches off TLS verification and autograd, reseeds torch, configures the root logger, reports a missing
    ``.env`` as an error, lifts Pillow's size limit and adds environment variables and search paths. It creates
    ``~/LMUData`` unless ``LMUData`` names a folder, and lets ``PRED_FORMAT`` and others decide how scores are kept.
    """
    with environment_kept(), logging_kept(), libraries_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        os.environ |= {"LMUData": str(cache_folder("vlmeval")), "PRED_FORMAT": "tsv"}
        for name in ("EVAL_FORMAT", "VERBOSE"):
            os.environ.pop(name, None)
        yield


@contextlib.contextmanager
def _silent_serial_scorer() -> Iterator[None]:
    """Keeps progress bars off the screen, and scorers from forking 16 processes of a process that holds a model."""
    module = _vlmeval("vlmeval.dataset.image_vqa")
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


def _build_dataset(task: Task, data: TaskData) -> Any:
    """VLMEvalKit's dataset object over our rows: fresh each time, since runs change it. Its index is the row number."""
    parent = getattr(_vlmeval("vlmeval.dataset"), task.dataset_class)
    image_root = str(cache_folder("vlmeval"))
    frame = _vlmeval_frame(data)

    def load_data(self: Any, dataset: str) -> pd.DataFrame:
        self.img_root = image_root
        return frame

    with _vlmeval_state():
        return type(parent.__name__, (parent,), {"load_data": load_data})(task.dataset)


def _vlmeval_frame(data: TaskData) -> pd.DataFrame:
    frame = data.frame.drop(columns="images")
    for column in (*OPTION_COLUMNS, "hint"):
        if column in frame:  # only NaN counts as absent
            frame[column] = [text or np.nan for text in frame[column]]
    for column in _GROUP_COLUMNS:
        if column in frame:  # and NaN breaks the evaluators' sums by group
            frame[column] = [text or NO_GROUP for text in frame[column]]
    return frame.assign(index=range(len(frame)), image_path=[list(paths) for paths in data.frame["images"]])


def _prompt_wrapper(family: str) -> Any | None:
    wrapper = PROMPT_WRAPPERS.get(family)
    if wrapper is None:
        return None
    wrapper_class = getattr(_vlmeval(wrapper.module), wrapper.name)
    made = object.__new__(wrapper_class)
    vars(made).update({**_texts_of_constructor(wrapper_class), **wrapper.settings})
    return made


def _texts_of_constructor(wrapper_class: type) -> dict[str, str]:
    """The fixed texts that a constructor sets, by attribute: instructions that ``build_prompt`` puts around questions.

    Read from its source, since running it would load the model.
    """
    source = textwrap.dedent(inspect.getsource(wrapper_class.__init__))  # type: ignore[misc]
    assignments = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign))
    return {
        node.targets[0].attr: node.value.value
        for node in assignments
        if isinstance(node.targets[0], ast.Attribute)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def _num_tokens_estimate(message: Message) -> int:
    total = 0
    for item in message:
        if item["type"] == "image":
            with Image.open(item["value"]) as image:
                total += image.width * image.height // PIXELS_PER_TOKEN
        else:
            total += len(item["value"]) // CHARACTERS_PER_TOKEN
    return total


# --- scores ---------------------------------------------------------------------------------------------------------


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
    return list(_vlmeval("vlmeval.dataset.utils.vqa_eval").hit_calculate(matches, run.task.dataset))


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
