"""From VLMEvalKit's result to a benchmark's one headline figure, and the same figure anew from single rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mqbench.harness.datasets.catalog import Kind, Task
from mqbench.harness.datasets.files import TaskData
from mqbench.harness.errors import ScoringError

NO_GROUP = "none"
"""Name of the group of rows whose split or category is empty."""


def flat_metrics(result: Any) -> dict[str, float]:
    """The evaluator's dict or table as one mapping; a table with several rows (splits) names the row too."""
    rows = [result] if isinstance(result, Mapping) else result.to_dict("records")
    named = {
        str(name) if len(rows) == 1 else f"{row['split']}|{name}": float(value)
        for row in rows
        for name, value in row.items()
        if name != "split"
    }
    return {name: value for name, value in named.items() if math.isfinite(value)}  # NaN: a group without rows


def official_headline(task: Task, data: TaskData, result: Any, metrics: Mapping[str, float]) -> float:
    """The one figure of a benchmark in VLMEvalKit's own unit."""
    match task.kind:
        case Kind.VQA:
            return metrics["Overall"]
        case Kind.OCRBENCH:
            return metrics["Final Score"]
        case Kind.YES_NO_PAIRS:
            return metrics["perception"] + metrics["reasoning"]
        case Kind.MULTIPLE_CHOICE:
            splits = data.frame["split"] if "split" in data.frame else [""] * len(data)
            sizes = Counter(text or NO_GROUP for text in splits)
            total = sum(row["Overall"] * sizes[str(row["split"])] for row in result.to_dict("records"))
            return float(total / len(data))


def attainable(task: Task, data: TaskData) -> float:
    """The official headline of perfect answers to exactly these rows."""
    match task.kind:
        case Kind.VQA:
            return 100.0
        case Kind.OCRBENCH:
            return float(len(data))
        case Kind.YES_NO_PAIRS:
            return 200.0 * data.frame["category"].nunique()
        case Kind.MULTIPLE_CHOICE:
            return 1.0


def headline_of_hits(task: Task, data: TaskData, hits: Sequence[float]) -> float:
    """The official headline, computed anew from the scores of single rows."""
    match task.kind:
        case Kind.VQA:
            return 100.0 * float(np.mean(hits))
        case Kind.OCRBENCH:
            return float(np.sum(hits))
        case Kind.MULTIPLE_CHOICE:
            return float(np.mean(hits))
        case Kind.YES_NO_PAIRS:
            rows = data.frame[["category", "image_path"]].assign(hit=list(hits))
            single = rows.groupby("category")["hit"].mean()
            pairs = rows.groupby(["category", "image_path"])["hit"].prod().groupby("category").mean()
            return 100.0 * float((single + pairs).sum())


def check_sum(task: Task, official: float, from_hits: float) -> None:
    if not math.isclose(official, from_hits, rel_tol=1e-6, abs_tol=1e-6):
        raise ScoringError(
            f"{task.name}: VLMEvalKit's score is {official}, its rows' scores give {from_hits}; "
            "install the ms-vlmeval version that pyproject.toml names"
        )


def context_accuracy(data: TaskData, hits: Sequence[float]) -> dict[str, float]:
    """ScienceQA's context classes, which overlap (paper, Table 5): text, image, no context."""
    has_text = [bool(str(row.get("hint", ""))) for row in data.rows()]
    has_image = [bool(row["images"]) for row in data.rows()]
    groups = {
        "TXT": has_text,
        "IMG": has_image,
        "NO": [not (text or image) for text, image in zip(has_text, has_image, strict=True)],
    }
    chosen = {name: [hit for hit, keep in zip(hits, mask, strict=True) if keep] for name, mask in groups.items()}
    return {name: float(np.mean(values)) for name, values in chosen.items() if values}
