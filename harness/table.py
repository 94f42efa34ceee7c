"""Tables from records: a declared specification, measured values, deltas to float and the paper's figures.

Rendering never runs a model. A value that was not measured prints as a dash, never as zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mqbench.harness import table_formats
from mqbench.harness.errors import TableError
from mqbench.harness.paper_figures import Line, find_line, paper_lines
from mqbench.harness.record import Record
from mqbench.harness.select import FLOAT_METHOD, check_scopes, passes, select, settings_of, shown, the_only
from mqbench.harness.sources import FOLDER_MARK
from mqbench.harness.table_caption import caption
from mqbench.harness.table_formulas import FORMULAS, Figures
from mqbench.harness.table_spec import MODEL, Column, RowSpec, TableSpec, load_spec, spec_numbers, without_choice

__all__ = ["Entry", "Frame", "Row", "build", "load_spec", "render", "spec_numbers", "without_choice"]

NO_MODEL = "-"
SCORE = "score"
FLOAT_BITS = "float/float"
SETTING_IN_LABEL = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Entry:
    """One place of a table; None where nothing is known. ``delta`` is measured minus float."""

    measured: float | None = None
    delta: float | None = None
    paper: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Row:
    labels: tuple[str, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Frame:
    """A table before it is printed."""

    spec: TableSpec
    rows: tuple[Row, ...]
    caption: str


@dataclass(frozen=True)
class Place:
    """One row before its figures are computed: a record or None per column, and what names the paper's row."""

    labels: tuple[str, ...]
    model: str
    records: tuple[Record | None, ...]
    paper: Mapping[str, str]


def render(
    records: Iterable[Record],
    spec: TableSpec,
    style: str = "terminal",
    filters: Mapping[str, Any] | None = None,
    width: int = 120,
) -> str:
    """The table as text.

    Args:
        records: In the order written; the newest of each cell counts.
        spec: What to show.
        style: ``terminal``, ``md``, ``tex`` or ``csv``.
        filters: In addition to the specification's, and in place of those of the same name.
        width: Columns of the terminal.

    Raises:
        TableError: unknown style, no record to show, or records with different settings.
    """
    if style not in table_formats.FORMATS:
        raise TableError(f"unknown format '{style}'; known: {', '.join(table_formats.FORMATS)}")
    return table_formats.FORMATS[style](build(records, spec, filters or {}), width)


def build(records: Iterable[Record], spec: TableSpec, filters: Mapping[str, Any] | None = None) -> Frame:
    """Selects, arranges and computes.

    Raises:
        TableError: no record to show where rows come from records, or records with different settings.
    """
    wanted = {**spec.filters, **(filters or {})}
    chosen = select(records, wanted, prefer=spec.prefer, tasks=spec.tasks)
    floats = {(record.cell.model, record.cell.task): record for record in chosen if _is_float(record)}
    places = _listed(chosen, spec) if spec.row else _combined(chosen, spec)
    used = {record.cell.key: record for place in places for record in place.records if record is not None}
    models = {place.model for place in places}
    used |= {record.cell.key: record for (model, _), record in floats.items() if model in models}
    shown_records = [record for record in chosen if record.cell.key in used]
    check_scopes(shown_records, spec.varying)
    if not places:
        raise TableError(
            f"no ok record for table {spec.number}; run 'mqbench eval' first, or give its folder with --out"
        )
    rows = tuple(_row(spec, place, floats) for place in places)
    has_delta = any(entry.delta is not None for row in rows for entry in row.entries)
    return Frame(spec, rows, caption(shown_records, spec, has_delta))


def base_model(name: str) -> str:
    """``standin-qwen2-vl`` also for the quantized folder ``standin-qwen2-vl@FOLDER``."""
    return name.partition(FOLDER_MARK)[0]


def _combined(records: Sequence[Record], spec: TableSpec) -> list[Place]:
    """Rows made from settings: every combination that has a record, and the paper's if wanted."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        settings = settings_of(record)
        labels = tuple(shown(settings.get(name, NO_MODEL)) for name in spec.settings)
        groups.setdefault(labels, []).append(record)
    places = []
    for labels, group in groups.items():
        found = tuple(_find(group, column, {}) for column in spec.columns)
        if any(found):
            places.append(Place(labels, group[0].cell.model, found, _paper_key(spec, group[0])))
    return sorted(places + _unmeasured(spec, places), key=lambda place: _sort_key(place.labels, spec))


def _unmeasured(spec: TableSpec, places: Sequence[Place]) -> list[Place]:
    """Rows of the paper that nothing was measured for."""
    known = {tuple(sorted(place.paper.items())) for place in places}
    missing: dict[tuple[str, ...], Place] = {}
    columns = {setting: column for column, setting in spec.paper_key.items()}
    for line in paper_lines(spec.paper) if spec.paper_rows else ():
        key = {column: line[column] for column in spec.paper_key}
        labels = tuple(line[columns[name]] if name in columns else NO_MODEL for name in spec.settings)
        if tuple(sorted(key.items())) not in known:
            missing[labels] = Place(labels, NO_MODEL, (None,) * len(spec.columns), key)
    return list(missing.values())


def _listed(records: Sequence[Record], spec: TableSpec) -> list[Place]:
    """Rows as listed, once for every model that has a record for any of them."""
    places = []
    for model in sorted({record.cell.model for record in records}):
        own = [record for record in records if record.cell.model == model]
        body = [_listed_place(own, row, spec, model) for row in spec.row]
        if any(record for place in body for record in place.records):
            places += body
    return places or [_listed_place([], row, spec, NO_MODEL) for row in spec.row]


def _listed_place(records: Sequence[Record], row: RowSpec, spec: TableSpec, model: str) -> Place:
    found = tuple(_find(records, column, row.conditions) if row.where else None for column in spec.columns)
    record = next(filter(None, found), None)
    settings = {"bits": FLOAT_BITS} if row.where.get("method") == FLOAT_METHOD else {}
    settings |= {name: shown(_first(value)) for name, value in row.where.items()}
    if record is not None:
        settings |= {name: shown(value) for name, value in settings_of(record).items()}
    labels = (model, *(_filled(label, settings, spec) for label in row.labels))
    return Place(labels, model, found, row.paper)


def _find(records: Sequence[Record], column: Column, conditions: Mapping[str, Any]) -> Record | None:
    """The record that belongs where a row and a column meet."""
    if not column.task:
        return None
    wanted = _merged(conditions, column.where)
    fitting = [record for record in records if record.cell.task == column.task]
    return the_only([record for record in fitting if passes(settings_of(record), wanted)])


def _merged(row: Mapping[str, Any], column: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions of both; recipe options of a row and a column add up."""
    both = {**row, **column}
    if "options" in row and "options" in column:
        both["options"] = {**row["options"], **column["options"]}
    return both


def _row(spec: TableSpec, place: Place, floats: Mapping[tuple[str, str], Record]) -> Row:
    lines = [_paper_line(spec, place, column) for column in spec.columns]
    baselines = [floats.get((base_model(place.model), column.task)) for column in spec.columns]
    measured = _values(spec, place.records)
    reference = _values(spec, [None if baseline in place.records else baseline for baseline in baselines])
    paper = {
        column.header: float(line[column.paper])
        for column, line in zip(spec.columns, lines, strict=True)
        if line is not None and column.paper and not column.text and line[column.paper]
    }
    figures = Figures(measured, reference, paper)
    entries = (_entry(column, figures, line) for column, line in zip(spec.columns, lines, strict=True))
    return Row(place.labels, tuple(entries))


def _values(spec: TableSpec, records: Sequence[Record | None]) -> dict[str, float]:
    """The figures of one row by column header, without those that are missing."""
    pairs = zip(spec.columns, records, strict=True)
    values = {column.header: _value(record, column, spec) for column, record in pairs if record is not None}
    return {header: value for header, value in values.items() if value is not None}


def _entry(column: Column, figures: Figures, line: Line | None) -> Entry:
    if column.formula:
        return Entry(FORMULAS[column.formula](figures, column.of))
    if column.text:
        return Entry(text="" if line is None else line[column.paper])
    value, base = figures.measured.get(column.header), figures.reference.get(column.header)
    delta = None if value is None or base is None else value - base
    return Entry(value, delta, figures.paper.get(column.header))


def _paper_line(spec: TableSpec, place: Place, column: Column) -> Line | None:
    """The paper's row for one place.

    Raises:
        TableError: the specification names a row that the paper's file does not have.
    """
    key = {**place.paper, **column.paper_where}
    line = find_line(spec.paper, key) if column.paper else None
    if line is None and spec.row and column.paper and key:
        raise TableError(f"table {spec.number}: results/paper/{spec.paper} has no row {key}")
    return line


def _paper_key(spec: TableSpec, record: Record) -> dict[str, str]:
    settings = {**settings_of(record), MODEL: base_model(record.cell.model)}
    return {column: shown(settings.get(name, "")) for column, name in spec.paper_key.items()}


def _value(record: Record, column: Column, spec: TableSpec) -> float | None:
    """The figure of a record that a column shows, on the printed scale; None where this record lacks the metric.

    Raises:
        TableError: the record has none of the metrics that the table shows of its task.
    """
    name = _metric(column, spec)
    if name == SCORE and record.score is not None:
        return record.score * column.scale
    if name in record.metrics:
        return record.metrics[name] * column.scale
    if not any(_metric(other, spec) in record.metrics for other in spec.columns if other.task == column.task):
        raise TableError(f"{record.cell.label}: no metric '{name}'; it has: {', '.join(sorted(record.metrics))}")
    return None


def _metric(column: Column, spec: TableSpec) -> str:
    return column.metric or spec.value


def _sort_key(labels: tuple[str, ...], spec: TableSpec) -> tuple[tuple[int, str], ...]:
    key = []
    for name, label in zip(spec.rows, labels, strict=True):
        order = list(spec.order.get(name, ()))
        key.append((order.index(label) if label in order else len(order), label))
    return tuple(key)


def _filled(label: str, settings: Mapping[str, str], spec: TableSpec) -> str:
    """``{bits}`` replaced by the setting.

    Raises:
        TableError: there is no such setting.
    """
    lost = [name for name in SETTING_IN_LABEL.findall(label) if name not in settings]
    if lost:
        raise TableError(f"table {spec.number}: label '{label}' names no setting of its row; it has: {', '.join(settings)}")
    return SETTING_IN_LABEL.sub(lambda match: settings[match[1]], label)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _is_float(record: Record) -> bool:
    return record.cell.recipe.method == FLOAT_METHOD
