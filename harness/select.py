"""Which records may stand in one table: the newest of each cell, with equal settings."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mqbench.harness.errors import TableError
from mqbench.harness.record import Record

Settings = dict[str, Any]

FLOAT_METHOD = "none"
QUANTIZATION_SETTINGS = ("backend", "recipe.seed", "calibration")
"""Settings that the float baseline does not have."""

SCOPES: Mapping[str, tuple[str, ...]] = {
    "limit": (),
    "device": (),
    "dtype": (),
    "batch_size": (),
    "backend": (),
    "recipe.seed": ("model",),
    "calibration.split": ("model",),
    "calibration.num_samples": ("model",),
    "calibration.seed": ("model",),
    "data_sha256": ("task",),
    "weights_sha256": ("model",),
    "method_version": ("method",),
}
"""Settings that must be equal within a scope: the whole table, or all records with the same task, model or method."""


def settings_of(record: Record) -> Settings:
    """The record's settings by the names that filters use (``limit``, ``recipe.seed``, ``calibration.split``, ...)."""
    flat: Settings = {}
    for name, value in record.cell.to_json().items():
        nested = value if isinstance(value, Mapping) and name in {"recipe", "calibration"} else None
        flat |= {name: value} if nested is None else {f"{name}.{inner}": item for inner, item in nested.items()}
    flat |= {"method": record.cell.recipe.method, "bits": record.cell.recipe.bits, "backend": str(record.backend)}
    if record.cell.recipe.method == FLOAT_METHOD:
        return {name: value for name, value in flat.items() if not name.startswith(QUANTIZATION_SETTINGS)}
    return flat


def select(records: Iterable[Record], filters: Mapping[str, Any]) -> list[Record]:
    """The newest ok record of each cell that passes ``filters``.

    Args:
        records: In the order written.
        filters: Setting -> wanted value or list of values.

    Raises:
        TableError: a filter names no setting, or what is left mixes settings that a table must not mix.
    """
    newest = {record.cell.key: record for record in records if record.ok}
    chosen = [record for record in newest.values() if _passes(settings_of(record), filters)]
    _check_filter_names(newest.values(), filters)
    _check_scopes(chosen)
    _check_positions(chosen)
    return chosen


def parse_filters(words: Sequence[str]) -> dict[str, Any]:
    """``["limit=8", "recipe.seed=0"]`` as a mapping; values are JSON where they parse, ``none`` is null.

    Raises:
        TableError: a word has no ``=``.
    """
    filters = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise TableError(f"'{word}' is no filter; write NAME=VALUE, for example limit=none")
        filters[name] = _parse_value(value)
    return filters


def _parse_value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _passes(settings: Settings, filters: Mapping[str, Any]) -> bool:
    return all(_matches(settings, name, wanted) for name, wanted in filters.items())


def _matches(settings: Settings, name: str, wanted: Any) -> bool:
    if name not in settings and name.startswith(QUANTIZATION_SETTINGS):
        return True  # The float baseline belongs to every table.
    options = wanted if isinstance(wanted, list) else [wanted]
    return settings.get(name) in options


def _check_filter_names(records: Iterable[Record], filters: Mapping[str, Any]) -> None:
    known = {name for record in records for name in settings_of(record)}
    unknown = sorted(filters.keys() - known)
    if known and unknown:
        raise TableError(f"no record has a setting '{unknown[0]}'; settings: {', '.join(sorted(known))}")


def _check_scopes(records: Sequence[Record]) -> None:
    rows = [settings_of(record) for record in records]
    for name, scope in SCOPES.items():
        values: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for row in rows:
            if name in row:
                values[tuple(row[part] for part in scope)].add(_shown(row[name]))
        for where, found in values.items():
            if len(found) > 1:
                raise _mixed(name, sorted(found), where)


def _check_positions(records: Sequence[Record]) -> None:
    """No two cells may claim the same place; names the first setting in which they differ."""
    places: dict[tuple[str, str, str, str], Settings] = {}
    for record in records:
        recipe, row = record.cell.recipe, settings_of(record)
        place = (record.cell.model, recipe.bits, recipe.method, record.cell.task)
        other = places.setdefault(place, row)
        for name in sorted(row.keys() | other.keys()):
            if row.get(name) != other.get(name):
                raise _mixed(name, [_shown(other.get(name)), _shown(row.get(name))], place)


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _mixed(name: str, values: Sequence[str], where: Sequence[str]) -> TableError:
    place = f" for {' '.join(where)}" if where else ""
    return TableError(
        f"records differ in {name}{place} ({' | '.join(values)}) and cannot share a table; "
        f"choose one with --where {name}={values[-1]}"
    )
