"""Writes the shipped mini benchmarks and their calibration splits: TSV in VLMEvalKit's schema beside PNG files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from random import Random

from mqbench.harness.models.standin import tasks
from mqbench.harness.models.standin.tasks import Example
from mqbench.harness.models.standin.train import MAX_DIFFICULTY

NO_IMAGE = "[]"
"""VLMEvalKit's image_path of a text-only row."""


@dataclass(frozen=True)
class Benchmark:
    """One shipped benchmark.

    Attributes:
        name: VLMEvalKit's official name.
        num_items: Rows of the evaluated file; the calibration file has ``CALIBRATION_ITEMS``.
        examples: Endless examples of one random generator, in row order.
        fields: The columns behind index, image_path, question and answer.
        answer: The answer column of one example.
    """

    name: str
    num_items: int
    examples: Callable[[Random], Iterator[Example]]
    fields: Callable[[Example], dict[str, str]]
    answer: Callable[[Example], str]


CALIBRATION_ITEMS = 256


def _forever(make: Callable[[Random], Example]) -> Callable[[Random], Iterator[Example]]:
    def examples(rng: Random) -> Iterator[Example]:
        while True:
            yield make(rng)

    return examples


def _ocrbench(rng: Random) -> Iterator[Example]:
    for category in cycle(tasks.OCRBENCH):
        yield tasks.ocrbench(rng, MAX_DIFFICULTY, category)


def _mme(rng: Random) -> Iterator[Example]:
    for category in cycle(tasks.MME):
        yield from tasks.mme_pair(rng, MAX_DIFFICULTY, category)


def _scienceqa(rng: Random) -> Iterator[Example]:
    for subject, context in cycle(product(tasks.SUBJECTS, tasks.CONTEXTS)):
        yield tasks.scienceqa(rng, MAX_DIFFICULTY, subject, context)


def _scienceqa_fields(example: Example) -> dict[str, str]:
    options = dict(zip("ABCD", (*example.options, "", "", ""), strict=False))
    return {
        "hint": example.hint,
        **options,
        "category": example.subject,
        "l2-category": example.category,
        "split": "test",
    }


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "TextVQA_VAL",
        150,
        _forever(lambda rng: tasks.textvqa(rng, MAX_DIFFICULTY)),
        lambda example: {},
        lambda example: str([example.answer] * 10),
    ),
    Benchmark(
        "DocVQA_VAL",
        150,
        _forever(lambda rng: tasks.docvqa(rng, MAX_DIFFICULTY)),
        lambda example: {},
        lambda example: str([example.answer]),
    ),
    Benchmark(
        "OCRBench",
        150,
        _ocrbench,
        lambda example: {"category": example.category},
        lambda example: str([example.answer]),
    ),
    Benchmark("MME", 168, _mme, lambda example: {"category": example.category}, lambda example: example.answer),
    Benchmark("ScienceQA_TEST", 180, _scienceqa, _scienceqa_fields, lambda example: example.answer),
)


def write_benchmarks(directory: Path, seed: int = 0) -> dict[Path, int]:
    """Writes every benchmark and its calibration split; returns the rows of each TSV file.

    Args:
        directory: Receives ``NAME/NAME.tsv`` and ``calibration/NAME/NAME.tsv``, each with ``images/``.
        seed: The evaluated and the calibration split have generators of their own, both apart from training's.
    """
    written = {}
    for benchmark in BENCHMARKS:
        splits = {directory / folder: made for folder, made in split_examples(benchmark, seed).items()}
        for folder, examples in splits.items():
            path = folder / benchmark.name / f"{benchmark.name}.tsv"
            _write_split(benchmark, examples, path)
            written[path] = len(examples)
    return written


def split_examples(benchmark: Benchmark, seed: int = 0) -> dict[str, list[Example]]:
    """The rows to evaluate, under ``""``, and to calibrate on, under ``"calibration"``: nothing occurs twice."""
    seen: set[tuple[bytes | None, str]] = set()
    return {
        "": list(islice(_unseen(benchmark, "benchmark", seed, seen), benchmark.num_items)),
        "calibration": list(islice(_unseen(benchmark, "calibration", seed, seen), CALIBRATION_ITEMS)),
    }


def _unseen(benchmark: Benchmark, split: str, seed: int, seen: set[tuple[bytes | None, str]]) -> Iterator[Example]:
    """The split's examples without repeats, of each other or of a split made before."""
    for example in benchmark.examples(Random(f"{split}-{benchmark.name}-{seed}")):
        if _content(example) not in seen:
            seen.add(_content(example))
            yield example


def _content(example: Example) -> tuple[bytes | None, str]:
    """What a model sees of an example."""
    return (example.image.tobytes() if example.image else None, example.prompt)


def _write_split(benchmark: Benchmark, examples: Sequence[Example], path: Path) -> None:
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    names: dict[int, str] = {}
    for index, example in enumerate(examples):
        image_path = NO_IMAGE
        if example.image is not None:
            # Both questions of an MME pair share one picture, and pair by its path.
            image_path = names.setdefault(id(example.image), f"images/{index}.png")
            if image_path == f"images/{index}.png":
                example.image.save(images / f"{index}.png", optimize=True)
        head = {"index": str(index), "image_path": image_path, "question": example.question}
        rows.append(head | benchmark.fields(example) | {"answer": benchmark.answer(example)})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
