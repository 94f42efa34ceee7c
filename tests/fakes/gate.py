"""Records with chosen answers, and folders of them, for tests of the gate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes.records import make_cell, make_record
from mqbench.harness.record import Record, Sample, canonical_json

NUM_ROWS = 400


def samples(scores: Sequence[float], texts: Sequence[str] | None = None) -> tuple[Sample, ...]:
    """Rows 0, 1, ...; by default a wrong answer reads otherwise than a right one."""
    words = texts or [f"answer {score:g}" for score in scores]
    return tuple(Sample(str(row), word, score) for row, (word, score) in enumerate(zip(words, scores, strict=True)))


def right(num_right: int, num_rows: int = NUM_ROWS) -> tuple[Sample, ...]:
    """The first rows right, the others wrong."""
    return samples([1.0] * num_right + [0.0] * (num_rows - num_right))


def record(task: str = "textvqa", num_right: int = 320, method: str = "mquant", **changes: Any) -> Record:
    """An ok record; ``changes`` are fields of the record or of its cell."""
    names = set(Record.__dataclass_fields__) - {"cell"}
    settings = {name: value for name, value in changes.items() if name in names}
    cell = make_cell(task, method, **{name: value for name, value in changes.items() if name not in names})
    rows = settings.pop("samples", right(num_right))
    score = 100 * sum(sample.score or 0 for sample in rows) / max(1, len(rows))
    return make_record(cell, **{"score": score, "samples": rows, "environment": {}, **settings})


def windows(losses: Sequence[float], method: str = "mquant") -> Record:
    """A perplexity record: one mean negative log likelihood per window."""
    rows = tuple(Sample(str(number), "", float(loss)) for number, loss in enumerate(losses))
    return replace(record("wikitext2", method=method, samples=rows), score=2.0)


def write_folder(folder: Path, records: Iterable[Record]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(canonical_json(item.to_json()) + "\n" for item in records)
    (folder / "records.jsonl").write_text(text, encoding="utf-8")
    return folder
