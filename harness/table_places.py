"""Which record stands where in a table: rows made from settings, or rows as a specification lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mqbench.harness.errors import TableError
from mqbench.harness.paper_figures import Line, paper_lines, spelled
from mqbench.harness.record import Record
from mqbench.harness.select import FLOAT_METHOD, passes, settings_of, shown, the_only
from mqbench.harness.sources import FOLDER_MARK
from mqbench.harness.sweep_records import UNSPECIFIC, is_clamped, is_sweep
from mqbench.harness.table_spec import MODEL, Column, Points, RowSpec, TableSpec

NO_MODEL = "-"
FLOAT_BITS = "float/float"
SETTING_IN_LABEL = re.compile(r"\{([^{}]+)\}")
CLAMPED = "clamped"
CLAMPED_MARK = f" ({CLAMPED})"


@dataclass(frozen=True)
class Place:
    """One row before its figures are computed: a record or None per column, and what names the paper's row.

    ``fill`` is that of the row's specification.
    """

    labels: tuple[str, ...]
    model: str
    records: tuple[Record | None, ...]
    paper: Mapping[str, str]
    fill: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_clamped(self) -> bool:
        return any(is_clamped(record) for record in self.records if record is not None)


def find_places(records: Sequence[Record], spec: TableSpec, *, may_be_empty: bool = False) -> list[Place]:
    """The rows of a table in printing order, each with its records.

    Args:
        records: Those that may be shown.
        spec: The table.
        may_be_empty: Where nothing fits, the paper's rows.

    Raises:
        TableError: two records fit into one place.
    """
    if spec.is_listed:
        return _listed(records, spec)
    places = _combined(records, spec)
    if spec.paper_rows or (may_be_empty and not places):
        places += _unmeasured(spec, places)
    return sorted(places, key=lambda place: _sort_key(place.labels, spec))


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
        found = tuple(_find(group, column, column.task, {}) for column in spec.columns)
        if any(found):
            places.append(Place(labels, group[0].cell.model, found, _paper_key(spec, group[0])))
    return places


def _unmeasured(spec: TableSpec, places: Sequence[Place]) -> list[Place]:
    """Rows of the paper that nothing was measured for."""
    known = {tuple(sorted(place.paper.items())) for place in places}
    missing: dict[tuple[str, ...], Place] = {}
    columns = {setting: column for column, setting in spec.paper_key.items()}
    for line in paper_lines(spec.paper) if spec.paper_key else ():
        key = {column: line[column] for column in spec.paper_key}
        labels = tuple(_paper_label(line, columns, name) for name in spec.settings)
        if tuple(sorted(key.items())) not in known:
            missing[labels] = Place(labels, NO_MODEL, (None,) * len(spec.columns), key)
    return list(missing.values())


def _paper_label(line: Line, columns: Mapping[str, str], setting: str) -> str:
    """What the paper's row says of a setting, in our spelling; a dash where it says nothing."""
    if setting == "bits" and {"recipe.vision", "recipe.text"} <= columns.keys():
        return "/".join(spelled(line[columns[part]]) for part in ("recipe.vision", "recipe.text"))
    return line[columns[setting]] if setting in columns else NO_MODEL


def _listed(records: Sequence[Record], spec: TableSpec) -> list[Place]:
    """Rows as listed, once for every model, and device of its sweeps, that has a record for any of them.

    Where some model has records for rows of this table's own, models with records for shared rows alone are left out.
    A quantized folder stands with the float records of the model that it was made of.
    """
    bodies: list[tuple[list[Place], bool]] = []
    for model in sorted({record.cell.model for record in records}):
        for device in _devices(records, model):
            known = [record for record in records if _belongs(record, model, device)]
            rows = _rows(known, spec)
            body = _body(known, rows, spec, model, device)
            filled = [row.shared for row, place in zip(rows, body, strict=True) if _has_record(place, model)]
            if filled:
                bodies.append((body, not all(filled)))
    some_own = any(own for _, own in bodies)
    places = [place for body, own in bodies if own or not some_own for place in body]
    return places or _body([], _rows([], spec), spec)


def _rows(records: Sequence[Record], spec: TableSpec) -> Sequence[RowSpec]:
    return spec.row if spec.points is None else _point_rows(records, spec, spec.points)


def _has_record(place: Place, model: str) -> bool:
    return any(record is not None and record.cell.model == model for record in place.records)


def _devices(records: Sequence[Record], model: str) -> list[str]:
    """Where the model's sweeps ran; figures of different devices never stand in one row."""
    cells = [record.cell for record in records]
    return sorted({cell.device for cell in cells if cell.model == model and is_sweep(cell.task)}) or [NO_MODEL]


def _belongs(record: Record, model: str, device: str) -> bool:
    if is_sweep(record.cell.task):
        return record.cell.model == model and record.cell.device == device
    return record.cell.model == model or _is_baseline(record, model)


def _body(
    records: Sequence[Record], rows: Sequence[RowSpec], spec: TableSpec, model: str = NO_MODEL, device: str = NO_MODEL
) -> list[Place]:
    """The listed rows for one model and device."""
    return [_listed_place(records, row, spec, (model, device)) for row in rows]


def _point_rows(records: Sequence[Record], spec: TableSpec, points: Points) -> list[RowSpec]:
    """A row for each value that was measured, and for each of the paper's that was not; in order of the values."""
    paper = [line[points.paper] for line in paper_lines(spec.paper)]
    measured = {shown(value) for value in _values(records, points.setting)}
    printed = {value: points.printed.get(value, value) for value in measured}
    shown_values = {value for value, text in printed.items() if text in paper or not points.only_paper}
    values = shown_values | (set(paper) - set(printed.values()))
    return [_point_row(value, printed.get(value, value), points, paper) for value in sorted(values, key=float)]


def _values(records: Sequence[Record], setting: str) -> set[Any]:
    sweeps = (settings_of(record) for record in records if is_sweep(record.cell.task))
    return {settings[setting] for settings in sweeps if setting in settings}


def _point_row(value: str, printed: str, points: Points, paper: Sequence[str]) -> RowSpec:
    where = {points.setting: json.loads(value)}
    key = {points.paper: printed} if printed in paper else {}
    return RowSpec((f"{value}{{{CLAMPED}}}",), point=where, paper=key)


def _is_baseline(record: Record, model: str) -> bool:
    return record.cell.recipe.method == FLOAT_METHOD and record.cell.model == base_model(model)


def _listed_place(records: Sequence[Record], row: RowSpec, spec: TableSpec, heads: tuple[str, str]) -> Place:
    found = tuple(_find_listed(records, row, column) for column in spec.columns)
    place = Place((), heads[0], found, row.paper, row.fill)
    record = next((record for record in found if record is not None and not is_sweep(record.cell.task)), None)
    settings = {"bits": FLOAT_BITS} if row.where.get("method") == FLOAT_METHOD else {}
    settings |= {name: shown(_first(value)) for name, value in row.where.items()}
    settings |= {CLAMPED: CLAMPED_MARK if place.is_clamped else ""}
    if record is not None:
        settings |= {name: shown(value) for name, value in settings_of(record).items()}
    labels = (*heads[: len(spec.heads)], *(_filled(label, settings, spec) for label in row.labels))
    return replace(place, labels=labels)


def _find_listed(records: Sequence[Record], row: RowSpec, column: Column) -> Record | None:
    """As ``_find``, by what the row says to a column of its kind."""
    if column.is_sweep:
        return _find(records, column, row.task or column.task, row.point)
    return _find(records, column, column.task, row.conditions) if row.where else None


def _find(records: Sequence[Record], column: Column, task: str, conditions: Mapping[str, Any]) -> Record | None:
    """The record that belongs where a row and a column meet."""
    if not task:
        return None
    wanted = _merged(conditions, column.where)
    fitting = [record for record in records if record.cell.task == task]
    passing = [record for record in fitting if passes(settings_of(record), wanted)]
    return the_only(passing, UNSPECIFIC if column.is_sweep else ())


def _merged(row: Mapping[str, Any], column: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions of both; recipe options of a row and a column add up."""
    both = {**row, **column}
    if "options" in row and "options" in column:
        both["options"] = {**row["options"], **column["options"]}
    return both


def _paper_key(spec: TableSpec, record: Record) -> dict[str, str]:
    settings = {**settings_of(record), MODEL: base_model(record.cell.model)}
    return {column: shown(settings.get(name, "")) for column, name in spec.paper_key.items()}


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
        known = ", ".join(sorted(settings))
        raise TableError(f"table {spec.number}: label '{label}' names no setting of its row; it has: {known}")
    return SETTING_IN_LABEL.sub(lambda match: settings[match[1]], label)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value
