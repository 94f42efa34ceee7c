"""The benchmarks, as data: adding one of VLMEvalKit's is one more ``Task`` below.

Nothing here imports vlmeval: names of its classes are strings that ``vlmeval_kit`` resolves when needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from mqbench.harness.errors import UnknownNameError

OPTION_COLUMNS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Columns that VLMEvalKit reads as answer options when they exist and are not empty."""


class Kind(StrEnum):
    """How VLMEvalKit scores a benchmark, and what that asks of its rows.

    VQA: a list of reference answers a row; the mean of per-row scores.
    OCRBENCH: a list of reference answers a row; one point when the prediction contains one of them.
    YES_NO_PAIRS: two yes/no questions an image; per category accuracy plus accuracy over whole pairs.
    MULTIPLE_CHOICE: options in columns A, B, ...; the share of right letters.
    """

    VQA = "vqa"
    OCRBENCH = "ocrbench"
    YES_NO_PAIRS = "yes_no_pairs"
    MULTIPLE_CHOICE = "multiple_choice"


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: As users type it.
        title: Head of its column in tables.
        dataset: VLMEvalKit's name of it: prompts, evaluator and file name (``DATASET.tsv``) key on it.
        dataset_class: The class in ``vlmeval.dataset``.
        kind: How it is scored.
        paper_column: Its column in ``results/paper/table03.csv``, or None when the paper's Table 3 lacks it.
        max_score: Headline score of a model without a mistake. The headline is VLMEvalKit's own figure times
            ``max_score`` over what is attainable on the rows evaluated. So OCRBench is points per 1000 items and MME
            is of 2800 also on a subset, and both equal the official figure on the official file.
        unit: What the headline counts, for captions.
        columns: Columns that its file must have besides ``index``, ``question``, ``answer`` and an image column.
        categories: Allowed values of ``category``; empty when anything goes.
        min_answers: Fewest reference answers with which a row can be answered fully right.
        max_new_tokens: Longest answer in tokens (2048: what VLMEvalKit gives Qwen2-VL). A model may set a lower limit.
    """

    name: str
    title: str
    dataset: str
    dataset_class: str
    kind: Kind
    paper_column: str | None
    max_score: float
    unit: str
    columns: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    min_answers: int = 1
    max_new_tokens: int = 2048

    @property
    def has_answer_list(self) -> bool:
        """The ``answer`` column holds a list of strings in Python's spelling."""
        return self.kind in (Kind.VQA, Kind.OCRBENCH)


OCRBENCH_CATEGORIES = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)

MME_PERCEPTION = (
    "OCR",
    "artwork",
    "celebrity",
    "color",
    "count",
    "existence",
    "landmark",
    "position",
    "posters",
    "scene",
)

MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                name="textvqa",
                title="TextVQA",
                dataset="TextVQA_VAL",
                dataset_class="ImageVQADataset",
                kind=Kind.VQA,
                paper_column="textvqa",
                max_score=100.0,
                unit="VQA accuracy, %",
                min_answers=4,
            ),
            Task(
                name="docvqa",
                title="DocVQA",
                dataset="DocVQA_VAL",
                dataset_class="ImageVQADataset",
                kind=Kind.VQA,
                paper_column="docvqa",
                max_score=100.0,
                unit="ANLS, %",
            ),
            Task(
                name="ocrbench",
                title="OCRBench",
                dataset="OCRBench",
                dataset_class="OCRBench",
                kind=Kind.OCRBENCH,
                paper_column="ocrbench",
                max_score=1000.0,
                unit="right answers per 1000 items",
                columns=("category",),
                categories=OCRBENCH_CATEGORIES,
            ),
            Task(
                name="mme",
                title="MME",
                dataset="MME",
                dataset_class="ImageYORNDataset",
                kind=Kind.YES_NO_PAIRS,
                paper_column="mme",
                max_score=2800.0,
                unit="perception + reasoning, of 2800",
                columns=("category", "image_path"),
                categories=MME_PERCEPTION + MME_REASONING,
            ),
            Task(
                name="scienceqa",
                title="ScienceQA",
                dataset="ScienceQA_TEST",
                dataset_class="ImageMCQDataset",
                kind=Kind.MULTIPLE_CHOICE,
                paper_column=None,
                max_score=100.0,
                unit="accuracy, %",
                columns=("category", "A", "B"),
            ),
        )
    }
)
"""Every benchmark by name, in the order of the paper's columns."""


def find_task(name: str) -> Task:
    """Looks a benchmark up by our name or by VLMEvalKit's, in any case.

    Raises:
        UnknownNameError: no benchmark is called so.
    """
    wanted = name.strip().lower()
    for task in TASKS.values():
        if wanted in (task.name, task.dataset.lower()):
            return task
    raise UnknownNameError("task", name, TASKS)


def find_tasks(names: Iterable[str]) -> tuple[Task, ...]:
    """Looks several up, each once, in the catalog's order; ``all`` stands for every one.

    Raises:
        UnknownNameError: a name is not in the catalog.
    """
    listed = tuple(names)
    if any(name.strip().lower() == "all" for name in listed):
        return tuple(TASKS.values())
    wanted = {find_task(name).name for name in listed}
    return tuple(task for task in TASKS.values() if task.name in wanted)
