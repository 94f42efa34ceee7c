"""Tables from records: a declared specification, measured values, deltas to float and the paper's figures.

Rendering never runs a model. A value that was not measured prints as a dash, never as zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mqbench.harness import table_formats
from mqbench.harness.errors import TableError
from mqbench.harness.paper_figures import Line, find_line, paper_lines
from mqbench.harness.record import Record
from mqbench.harness.select import FLOAT_METHOD, check_scopes, select
from mqbench.harness.sweep_records import VARYING, is_sweep, measured_points, ran_out_of_memory, to_compare
from mqbench.harness.table_caption import caption
from mqbench.harness.table_formulas import COMPARISONS, FORMULAS, Figures
from mqbench.harness.table_places import Place, base_model, find_places
from mqbench.harness.table_spec import Column, TableSpec, load_spec, spec_numbers, without_choice

__all__ = ["Entry", "Frame", "Row", "build", "load_spec", "paper_lines", "render", "spec_numbers", "without_choice"]

SCORE = "score"
NO_MEMORY = "OOM"


@dataclass(frozen=True)
class Entry:
    """One place of a table; None where nothing is known. ``delta`` is measured minus float.

    ``text`` is what the paper says in words, or why there is no measured figure.
    """

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


def render(
    records: Iterable[Record],
    spec: TableSpec,
    style: str = "terminal",
    filters: Mapping[str, Any] | None = None,
    width: int = 120,
    *,
    may_be_empty: bool = False,
) -> str:
    """The table as text.

    Args:
        records: In the order written; the newest of each cell counts.
        spec: What to show.
        style: ``terminal``, ``md``, ``tex`` or ``csv``.
        filters: In addition to the specification's, and in place of those of the same name.
        width: Columns of the terminal.
        may_be_empty: Where there is no record at all, show the paper's rows, or none, instead of an error.

    Raises:
        TableError: unknown style, no record to show, or records with different settings.
    """
    if style not in table_formats.FORMATS:
        raise TableError(f"unknown format '{style}'; known: {', '.join(table_formats.FORMATS)}")
    return table_formats.FORMATS[style](build(records, spec, filters or {}, may_be_empty=may_be_empty), width)


def build(
    records: Iterable[Record],
    spec: TableSpec,
    filters: Mapping[str, Any] | None = None,
    *,
    may_be_empty: bool = False,
) -> Frame:
    """Selects, arranges and computes; the arguments are those of ``render``.

    Raises:
        TableError: no record to show where rows come from records, or records with different settings.
    """
    chosen = _chosen(list(records), spec, filters or {})
    floats = {(record.cell.model, record.cell.task): record for record in chosen if _is_float(record)}
    places = find_places(chosen, spec, may_be_empty=may_be_empty)
    if not places and not may_be_empty:
        raise TableError(
            f"no ok record for table {spec.number}; run 'mqbench eval' first, or give its folder with --out"
        )
    in_table = _records_of(places, floats)
    _check_settings(in_table, spec)
    rows = tuple(_row(spec, place, floats) for place in places)
    has_delta = any(entry.delta is not None for row in rows for entry in row.entries)
    return Frame(spec, rows, caption(in_table, spec, has_delta))


def _chosen(records: Sequence[Record], spec: TableSpec, filters: Mapping[str, Any]) -> list[Record]:
    """What may be shown: of the points of sweeps also those that ran out of memory."""
    wanted = {**spec.filters, **filters}
    others = spec.tasks - spec.sweeps
    chosen = select(records, wanted if others else filters, prefer=spec.prefer, tasks=others)
    return chosen + measured_points(records, spec.sweeps, wanted)


def _check_settings(records: Sequence[Record], spec: TableSpec) -> None:
    """Equal settings in the whole table, or, for sweeps, within the rows of one model and device."""
    check_scopes([record for record in records if not is_sweep(record.cell.task)], spec.varying)
    bodies: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if is_sweep(record.cell.task):
            bodies.setdefault((record.cell.model, record.cell.device), []).append(record)
    for body in bodies.values():
        check_scopes(body, spec.varying | VARYING)


def _records_of(places: Sequence[Place], floats: Mapping[tuple[str, str], Record]) -> list[Record]:
    """What the places show, and the float baselines behind their deltas; each once."""
    models = {base_model(place.model) for place in places}
    shown_here = [record for place in places for record in place.records if record is not None]
    baselines = [record for (model, _), record in floats.items() if model in models]
    return list({record.cell.key: record for record in (*shown_here, *baselines)}.values())


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
    entries = []
    for column, line, record in zip(spec.columns, lines, place.records, strict=True):
        if column.is_sweep:
            entries.append(_sweep_entry(column, record, place.fill, paper.get(column.header)))
        else:
            entries.append(_entry(column, figures, line))
    return Row(place.labels, tuple(entries))


def _values(spec: TableSpec, records: Sequence[Record | None]) -> dict[str, float]:
    """The figures of one row by column header, without those that are missing."""
    pairs = [(column, record) for column, record in zip(spec.columns, records, strict=True) if not column.is_sweep]
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


def _sweep_entry(column: Column, record: Record | None, fill: Mapping[str, str], paper: float | None) -> Entry:
    """A figure of one system, or a comparison of two in the same record."""
    if record is None:
        return Entry(paper=paper)
    metric, against = (name.format_map(fill) for name in (column.metric, column.against))
    if column.formula:
        pair = to_compare(record, metric, against)
        return Entry(None if pair is None else COMPARISONS[column.formula](*pair), paper=paper)
    value = record.metrics.get(metric)
    text = NO_MEMORY if value is None and ran_out_of_memory(record, metric) else ""
    return Entry(None if value is None else value * column.scale, paper=paper, text=text)


def _paper_line(spec: TableSpec, place: Place, column: Column) -> Line | None:
    """The paper's row for one place.

    Raises:
        TableError: the specification names a row that the paper's file does not have.
    """
    key = {**place.paper, **column.paper_where}
    line = find_line(spec.paper, key) if column.paper else None
    if line is None and spec.is_listed and column.paper and key:
        raise TableError(f"table {spec.number}: results/paper/{spec.paper} has no row {key}")
    return line


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


def _is_float(record: Record) -> bool:
    return record.cell.recipe.method == FLOAT_METHOD
