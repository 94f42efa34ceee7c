"""What must follow from what in the paper's tables and text, as data: ``rules.toml`` and ``claims.csv``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqbench.harness.errors import TableError
from mqbench.harness.paper_figures import PAPER, Line, paper_lines
from mqbench.harness.paper_formulas import FORMULAS

RULES = "rules.toml"
CLAIMS = "claims.csv"
SAME = "."
SUFFIXES = ("_printed", "_delta", "_speedup_percent", "_improve_percent")


@dataclass(frozen=True)
class Rule:
    """One column, or one number of the text, and the formula behind it.

    Attributes:
        table: Number of the table that the inputs stand in.
        formula: A key of ``FORMULAS``.
        inputs: Columns; ``COLUMN@NAME=VALUE&...`` takes the row with those values, ``.`` the value of the row at hand.
        printed: Column of the printed numbers; empty for a claim.
        value: The printed number of a claim.
        relation: What the printed number claims of the computed one: ``=``, ``<``, ``>``, ``<=`` or ``>=``, read as
            "printed relation computed" for columns and "computed relation printed" for claims.
        files: CSV files, joined over the columns that they share; by default the table's own.
        where: Column -> value of the rows that count; empty for all.
        aggregate: ``max`` or ``min`` over the rows, for claims.
        exact: Inputs that are counts.
        weights: One per input, for weighted formulas.
        key: Columns that name a row; by default the first.
        section: Where the text says it.
        claim: What it says, in our words.
        note: Where a number that is not the paper's comes from.
    """

    table: int
    formula: str
    inputs: tuple[str, ...]
    printed: str = ""
    value: str = ""
    relation: str = "="
    files: tuple[str, ...] = ()
    where: Mapping[str, str] = field(default_factory=dict)
    aggregate: str = ""
    exact: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    key: tuple[str, ...] = ()
    section: str = ""
    claim: str = ""
    note: str = ""

    @property
    def lines(self) -> list[Line]:
        """All rows of the rule's files."""
        return joined(self.files or (f"table{self.table:02d}.csv",))

    def place(self, line: Line) -> str:
        """How people find a row."""
        return ", ".join(f"{name} {line[name]}" for name in self.key or (next(iter(line)),))


def load_rules(folder: Path = PAPER) -> list[Rule]:
    """All rules over columns, then all claims of the text.

    Raises:
        TableError: a rule names an unknown field or formula.
    """
    data = tomllib.loads((folder / RULES).read_text(encoding="utf-8"))
    try:
        rules = [rule for entry in data["rule"] for rule in _column_rules(entry)]
        rules += [_claim(line) for line in paper_lines(CLAIMS, folder)]
    except (TypeError, KeyError, ValueError) as error:
        raise TableError(f"results/paper: a rule or claim is wrong: {error}") from error
    unknown = sorted({rule.formula for rule in rules} - FORMULAS.keys())
    if unknown:
        raise TableError(f"results/paper: unknown formula '{unknown[0]}'; known: {', '.join(FORMULAS)}")
    return rules


def joined(names: tuple[str, ...]) -> list[Line]:
    """Rows of several files put together where the columns that they share are equal; rows without partner drop out."""
    rows: list[Line] = list(paper_lines(names[0]))
    for name in names[1:]:
        others = paper_lines(name)
        shared = [column for column in rows[0] if column in others[0]]
        rows = [{**row, **other} for row in rows for other in others if all(row[c] == other[c] for c in shared)]
    return rows


def _column_rules(entry: Mapping[str, Any]) -> list[Rule]:
    """One rule per printed column; ``{column}`` in inputs is its name without what follows the quantity."""
    printed = entry["printed"] if isinstance(entry["printed"], list) else [entry["printed"]]
    lists = {name: tuple(value) for name, value in entry.items() if isinstance(value, list)}
    rules = []
    for name in printed:
        inputs = tuple(text.replace("{column}", _stem(name)) for text in entry["inputs"])
        rules.append(Rule(**{**entry, **lists, "printed": name, "inputs": inputs}))
    return rules


def _stem(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _claim(line: Line) -> Rule:
    return Rule(
        table=int(line["table"]),
        formula=line["formula"],
        inputs=tuple(line["inputs"].split(";")),
        value=line["printed"],
        relation=line["relation"],
        where=parse_row(line["rows"], ";"),
        aggregate=line["aggregate"],
        exact=COUNTS,
        section=line["section"],
        claim=line["claim"],
    )


def parse_row(text: str, separator: str = "&") -> dict[str, str]:
    """``"model=a&method=b"`` as a mapping."""
    pairs = (part.partition("=") for part in text.split(separator) if part)
    return {name: value for name, _, value in pairs}


COUNTS = ("blocks", "blocks_meeting_eq9")
"""Columns of counts: exact, never rounded."""
