"""What a table shows, as data: one TOML file per table in ``results/specs``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mqbench.harness.environment import ROOT
from mqbench.harness.errors import TableError
from mqbench.harness.sweep_records import is_sweep
from mqbench.harness.table_formulas import COMPARISONS, FORMULAS

SPECS = ROOT / "results" / "specs"
MODEL = "model"

SETTINGS: Mapping[str, str] = MappingProxyType({"method": "recipe.label", "seed": "recipe.seed"})
"""Row names that stand for a setting of another name; every other row name is the setting's own."""


@dataclass(frozen=True)
class Column:
    """One column: what a task measured, a named formula over the row, or the paper's figure alone.

    Attributes:
        header: As printed.
        task: Task whose score or metric stands here; empty for a formula and for what only the paper has.
        metric: Name of the metric; empty for the table's ``value``. Of sweeps: ``<system>.<figure>``, where
            ``{name}`` is what the row fills in.
        against: Metric of the same record that a comparison sets ``metric`` against.
        where: Settings that the record must have, in addition to the row's.
        formula: A key of ``FORMULAS`` or, with ``against``, of ``COMPARISONS``; empty for a measured column.
        of: Header of the column that the formula reads, for formulas over one column.
        paper: Column of the paper's CSV file; empty when the paper has none.
        paper_where: Columns of the paper's CSV file and their values, in addition to the row's.
        text: The paper's entry is text, printed as it is.
        scale: Factor from the task's scale to the printed one.
        precision: Decimals.
    """

    header: str
    task: str = ""
    metric: str = ""
    against: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    formula: str = ""
    of: str = ""
    paper: str = ""
    paper_where: Mapping[str, str] = field(default_factory=dict)
    text: bool = False
    scale: float = 1.0
    precision: int = 2

    @property
    def values(self) -> tuple[str, ...]:
        """What a place of this column holds, in order."""
        if self.formula or self.is_sweep:
            return ("measured", "paper") if self.paper else ("measured",)
        if self.text:
            return ("text",)
        return ("measured", "delta", "paper") if self.task else ("measured", "paper")

    @property
    def is_sweep(self) -> bool:
        return is_sweep(self.task)


@dataclass(frozen=True)
class RowSpec:
    """One row of the paper: printed once for every model that the table lists.

    Attributes:
        labels: Texts for the table's ``rows`` after the model. ``{bits}`` and other settings are those of the record
            shown; where nothing is measured, those of ``where``.
        where: Setting -> wanted value or list of values. Recipe options are the method's defaults unless named.
            Empty for a row that only the paper has.
        paper: Column of the paper's CSV file -> value, naming one of its rows; empty when the paper has none.
        point: As ``where``, for columns of sweeps, which ``where`` does not concern.
        fill: What ``{name}`` stands for in the metrics of columns of sweeps.
        task: Sweep that those columns read, in place of their own.
        shared: Another table shows the same records: a model with no others is not listed beside one that has some.
    """

    labels: tuple[str, ...]
    where: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, str] = field(default_factory=dict)
    point: Mapping[str, Any] = field(default_factory=dict)
    fill: Mapping[str, str] = field(default_factory=dict)
    task: str = ""
    shared: bool = False

    @property
    def conditions(self) -> Mapping[str, Any]:
        """``where`` with the default options made explicit."""
        names_options = any(name.partition(".")[0] == "options" for name in self.where)
        return self.where if names_options else {**self.where, "options": {}}


@dataclass(frozen=True)
class Points:
    """Rows for a setting of sweeps: its values in the paper, and those that were measured.

    Attributes:
        setting: The setting, for example ``options.image_px``.
        paper: Column of the paper's CSV file that has its values.
        only_paper: No rows for other values than the paper's.
        printed: Value -> what the paper prints for it.
    """

    setting: str
    paper: str
    only_paper: bool = False
    printed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TableSpec:
    """A table as data.

    Attributes:
        number: Of the paper's table.
        title: First words of the caption.
        rows: Heads of the label columns. Without ``row`` each is a setting (``model``, ``bits``, ``method``, ``seed``,
            or any other by its full name) and every combination that has a record is a row.
        columns: Figures, from left to right.
        row: The rows, where the paper's choice of rows is to be shown; ``rows`` then starts with ``model``, and where a
            column is of a sweep, the device follows.
        points: In place of ``row``: a row for each value of a setting of sweeps.
        value: What of a record is shown: ``score`` or the name of a metric.
        filters: Setting -> wanted value or list of values; other records do not count.
        prefer: The same, but a model that has no such record is shown with those that it has.
        varies: Settings that may differ within the table, besides those that rows and columns name.
        order: Row name -> values in printing order; others follow alphabetically.
        paper: CSV file in ``results/paper``; empty when the paper has none.
        paper_key: Column of that file -> setting that it names, for rows made from settings.
        paper_rows: Show rows of the paper that nothing was measured for, too.
        paper_model: Whose figures the paper gives, where its file does not say.
        note: A sentence for the caption.
        group_labels: Leading labels that are printed once for rows that share them; by default the model (and device)
            where rows are listed, all but the last elsewhere.
    """

    number: int
    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    row: tuple[RowSpec, ...] = ()
    points: Points | None = None
    value: str = "score"
    filters: Mapping[str, Any] = field(default_factory=dict)
    prefer: Mapping[str, Any] = field(default_factory=dict)
    varies: tuple[str, ...] = ()
    order: Mapping[str, Sequence[str]] = field(default_factory=dict)
    paper: str = ""
    paper_key: Mapping[str, str] = field(default_factory=dict)
    paper_rows: bool = False
    paper_model: str = ""
    note: str = ""
    group_labels: int | None = None

    @property
    def tasks(self) -> frozenset[str]:
        return frozenset([column.task for column in self.columns] + [row.task for row in self.row]) - {""}

    @property
    def sweeps(self) -> frozenset[str]:
        """Its tasks that are sweeps."""
        return frozenset(filter(is_sweep, self.tasks))

    @property
    def is_listed(self) -> bool:
        """Rows are the paper's, not whatever settings records have."""
        return bool(self.row or self.points)

    @property
    def heads(self) -> tuple[str, ...]:
        """Labels before those of a listed row."""
        return self.rows[: 2 if self.sweeps else 1]

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that name a row made from settings."""
        return tuple(SETTINGS.get(name, name) for name in self.rows)

    @property
    def varying(self) -> frozenset[str]:
        """Settings that may differ between the places of the table."""
        conditions = [row.where for row in self.row] + [column.where for column in self.columns]
        named = {name for where in conditions for name in where}
        return frozenset(named) | frozenset(self.varies) | (frozenset() if self.is_listed else frozenset(self.settings))

    @property
    def num_group_labels(self) -> int:
        """How many leading labels make rows stand together."""
        if self.group_labels is not None:
            return self.group_labels
        return len(self.heads) if self.is_listed else len(self.rows) - 1


STANDARD_COLUMNS: Mapping[str, Column] = MappingProxyType(
    {
        "textvqa": Column("T.VQA", "textvqa", paper="textvqa"),
        "docvqa": Column("D.VQA", "docvqa", paper="docvqa"),
        "ocrbench": Column("OCRBench", "ocrbench", paper="ocrbench", precision=0),
        "mme": Column("MME", "mme", paper="mme", precision=0),
        "recovery": Column("Recovery %", formula="recovery", precision=1),
    }
)
"""Columns that many tables have; a specification names them by a string."""


def spec_numbers(folder: Path = SPECS) -> list[int]:
    """Numbers of all tables that have a specification."""
    return sorted(int(found.stem.removeprefix("table")) for found in folder.glob("table*.toml"))


def load_spec(number: int, folder: Path = SPECS) -> TableSpec:
    """Reads ``tableNN.toml``.

    Raises:
        TableError: there is none, or it names an unknown field, column or formula.
    """
    path = folder / f"table{number:02d}.toml"
    if not path.is_file():
        raise TableError(f"table {number} has no specification; known: {', '.join(map(str, spec_numbers(folder)))}")
    try:
        spec = _parsed(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"{path.name} is not valid TOML: {error}") from error
    except (TypeError, KeyError) as error:
        raise TableError(f"{path.name}: {error}") from error
    problem = _problem(spec)
    if problem:
        raise TableError(f"{path.name}: {problem}")
    return spec


def without_choice(spec: TableSpec) -> TableSpec:
    """The same table over whatever records there are, each recipe a row of its own."""
    return replace(spec, filters={}, prefer={})


def _parsed(data: Mapping[str, Any]) -> TableSpec:
    lists = {item.name: tuple(data[item.name]) for item in fields(TableSpec) if isinstance(data.get(item.name), list)}
    columns = tuple(STANDARD_COLUMNS[item] if isinstance(item, str) else Column(**item) for item in data["columns"])
    row = tuple(RowSpec(**{**item, "labels": tuple(item["labels"])}) for item in data.get("row", ()))
    points = Points(**data["points"]) if "points" in data else None
    return TableSpec(**{**data, **lists, "columns": columns, "row": row, "points": points})


def _problem(spec: TableSpec) -> str:
    """What is wrong with a specification, or nothing."""
    known = FORMULAS.keys() | COMPARISONS.keys()
    unknown = sorted({column.formula for column in spec.columns} - known - {""})
    if unknown:
        return f"unknown formula '{unknown[0]}'; known: {', '.join(sorted(known))}"
    headers = {column.header for column in spec.columns}
    lost = sorted({column.of for column in spec.columns} - headers - {""})
    if lost:
        return f"a formula reads column '{lost[0]}', which the table does not have"
    if spec.is_listed and spec.rows[0] != MODEL:
        return "'rows' must start with 'model' where rows are listed"
    num_labels = len(spec.rows) - len(spec.heads)
    short = [row.labels for row in spec.row if len(row.labels) != num_labels]
    return f"row {list(short[0])} needs {num_labels} label(s)" if short else ""
