"""The paper's own figures, as CSV files in ``results/paper``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from mqbench.harness.environment import ROOT
from mqbench.harness.errors import TableError

PAPER = ROOT / "results" / "paper"
PAPER_FLOAT = "bf16"

Line = Mapping[str, str]
"""One row of a CSV file: text by column."""


@cache
def paper_lines(name: str, folder: Path = PAPER) -> tuple[Line, ...]:
    """Rows of one file.

    Raises:
        TableError: there is no such file.
    """
    path = folder / name
    if not path.is_file():
        known = ", ".join(sorted(found.name for found in folder.glob("*.csv")))
        raise TableError(f"no file results/paper/{name}; known: {known}")
    with path.open(encoding="utf-8", newline="") as stream:
        return tuple(csv.DictReader(stream))


def find_line(name: str, key: Mapping[str, str]) -> Line | None:
    """The one row whose columns have these values, or None when there is no file, no key or no such row.

    Raises:
        TableError: the file lacks a column of the key, or several rows fit.
    """
    if not name or not key:
        return None
    lines = paper_lines(name)
    lost = sorted(key.keys() - lines[0].keys())
    if lost:
        raise TableError(f"results/paper/{name} has no column '{lost[0]}'; columns: {', '.join(lines[0])}")
    found = [line for line in lines if all(spelled(line[column]) == spelled(value) for column, value in key.items())]
    if len(found) > 1:
        raise TableError(f"{len(found)} rows of results/paper/{name} fit {dict(key)}; name more columns")
    return found[0] if found else None


def spelled(text: str) -> str:
    """The paper's spelling as ours: ``W4A8`` is ``w4a8``, ``BF16`` is ``float``."""
    lower = text.lower()
    return "float" if lower == PAPER_FLOAT else lower
