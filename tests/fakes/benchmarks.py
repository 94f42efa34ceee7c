"""Tiny benchmark files in VLMEvalKit's schema: a few rows and PNGs a task, and a model that knows the answers."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from mqbench.harness.datasets.catalog import MME_PERCEPTION, MME_REASONING, OCRBENCH_CATEGORIES, TASKS, Task
from mqbench.harness.models.adapter import Message

Row = dict[str, str]

LOSSY = ("007", "None", "=1+1", "1e5", "NA", 'a "b"\tc')
"""Answers that spreadsheets and pandas' defaults change."""


def save_image(path: Path, number: int, side: int = 28) -> None:
    """A PNG whose pixels depend on ``number``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (side, side), (number % 256, number // 256 % 256, 7))
    image.putpixel((number % side, 0), (255, 255, 255))
    image.save(path)


def write_tsv(path: Path, rows: Sequence[Row]) -> Path:
    """Writes rows as VLMEvalKit does: tab-separated, every field quoted, columns of all rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_benchmark(folder: Path, task: Task, first_number: int = 0, rows: Sequence[Row] | None = None) -> Path:
    """Writes ``DATASET/DATASET.tsv`` and its images; ``first_number`` keeps images of different files different."""
    rows = make_rows(task, first_number) if rows is None else rows
    home = folder / task.dataset
    for row in rows:
        if row["image_path"] != "[]":
            save_image(home / row["image_path"], int(Path(row["image_path"]).stem))
    return write_tsv(home / f"{task.dataset}.tsv", rows)


def write_all(folder: Path) -> Path:
    """Every benchmark, and calibration files with other images."""
    for position, task in enumerate(TASKS.values()):
        write_benchmark(folder, task, 1000 * position)
        write_benchmark(folder / "calibration", task, 1000 * position + 500)
    return folder


def make_rows(task: Task, first_number: int = 0) -> list[Row]:
    return [{"index": str(number), **row} for number, row in enumerate(_MAKERS[task.name](first_number))]


def _textvqa_rows(first: int) -> list[Row]:
    return [
        {"image_path": f"images/{first + number}.png", "question": f"what is written on sign {number}?",
         "answer": repr([text] * 10)}
        for number, text in enumerate(("stop", *LOSSY))
    ]  # fmt: skip


def _docvqa_rows(first: int) -> list[Row]:
    return [
        {"image_path": f"images/{first + number}.png", "question": "What is the invoice number?",
         "answer": repr([text, f"No. {text}"])}
        for number, text in enumerate(("4711", *LOSSY))
    ]  # fmt: skip


def _ocrbench_rows(first: int) -> list[Row]:
    texts = ("exit", *LOSSY, "x^2", "y+1", "river")
    return [
        {"image_path": f"images/{first + number}.png", "question": "what is written in the image?",
         "answer": repr([text]), "category": category}
        for number, (category, text) in enumerate(zip(OCRBENCH_CATEGORIES, texts, strict=True))
    ]  # fmt: skip


def _mme_rows(first: int) -> list[Row]:
    categories = [name for name in MME_PERCEPTION + MME_REASONING for _ in range(2)]
    return [
        {"image_path": f"{category}/{first + number}.png", "category": category, "answer": answer,
         "question": f"Is this {category} {answer.lower()}thing? Please answer yes or no."}
        for number, category in enumerate(categories)
        for answer in ("Yes", "No")
    ]  # fmt: skip


def _scienceqa_rows(first: int) -> list[Row]:
    rows = []
    for number, category in enumerate(("NAT", "SOC", "LAN") * 3):
        row = {
            "image_path": "[]" if number % 3 == 0 else f"images/{first + number}.png",
            "question": f"Which of these is number {first + number}?",
            "hint": "Numbers are words here." if number % 2 else "",
            "A": "None",
            "B": f"north{number}",
            "C": "007" if number % 2 else "",
            "answer": "ABA"[number % 3],
            "category": category,
            "l2-category": "none of these",
            "split": "test",
        }
        rows.append(row)
    return rows


_MAKERS = {
    "textvqa": _textvqa_rows,
    "docvqa": _docvqa_rows,
    "ocrbench": _ocrbench_rows,
    "mme": _mme_rows,
    "scienceqa": _scienceqa_rows,
}


def with_base64(rows: Sequence[Row], home: Path) -> list[Row]:
    """The same rows with images inside the file; an image met before is given as the index of its first row."""
    seen: dict[str, str] = {}
    packed = []
    for row in rows:
        path = row["image_path"]
        text = seen.get(path) or base64.b64encode((home / path).read_bytes()).decode()
        seen.setdefault(path, row["index"])
        packed.append(row | {"image": text})
    return packed


class FakeAdapter:
    """A model family that looks answers up by prompt and logs every batch.

    Attributes:
        answers: Text of a prompt and its image files -> answer.
        batches: Sizes of the batches generated so far.
        limits: ``max_new_tokens`` of every batch.
        stop_after: Raises ``KeyboardInterrupt`` in place of this batch (as a crash would), or None.
    """

    max_new_tokens: int | None = None

    def __init__(self, answers: Mapping[tuple[str, ...], str], stop_after: int | None = None) -> None:
        self.answers = answers
        self.stop_after = stop_after
        self.batches: list[int] = []
        self.limits: list[int] = []

    def encode(self, loaded: Any, messages: Sequence[Message], answers: Sequence[str] | None = None) -> dict[str, Any]:
        return {"prompts": [prompt_key(message) for message in messages]}

    def generate(self, loaded: Any, batch: Mapping[str, Any], max_new_tokens: int) -> list[str]:
        if self.stop_after == len(self.batches):
            raise KeyboardInterrupt
        self.batches.append(len(batch["prompts"]))
        self.limits.append(max_new_tokens)
        return [self.answers[prompt] for prompt in batch["prompts"]]


def prompt_key(message: Message) -> tuple[str, ...]:
    return tuple(item["value"] for item in message)


def fake_loaded(family: str = "qwen2_vl") -> Any:
    return SimpleNamespace(name="fake", layout=SimpleNamespace(family=family))
