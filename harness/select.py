"""Which records may stand in one table: the newest of each cell, with equal settings unless the table varies them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mqbench.harness.errors import TableError
from mqbench.harness.record import Record

Settings = dict[str, Any]

FLOAT_METHOD = "none"
OPTIONS = "options"
ANY = "any"
QUANTIZATION_SETTINGS = ("backend", "recipe.seed", "calibration", OPTIONS)
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
    """The record's settings by the names that filters use.

    ``limit``, ``method``, ``bits``, ``recipe.seed``, ``recipe.label``, ``calibration.split``, ``options`` (all of them;
    ``{}`` is the method's default recipe), ``options.rms``, ...
    """
    recipe = record.cell.recipe
    flat: Settings = {}
    for name, value in record.cell.to_json().items():
        nested = value if isinstance(value, Mapping) and name in {"recipe", "calibration"} else None
        flat |= {name: value} if nested is None else {f"{name}.{inner}": item for inner, item in nested.items()}
    flat |= {OPTIONS: dict(recipe.options)} | {f"{OPTIONS}.{name}": value for name, value in recipe.options.items()}
    flat |= {"method": recipe.method, "bits": recipe.bits, "recipe.label": recipe.label, "backend": str(record.backend)}
    if recipe.method == FLOAT_METHOD:
        return {name: value for name, value in flat.items() if not name.startswith(QUANTIZATION_SETTINGS)}
    return flat


def select(
    records: Iterable[Record],
    filters: Mapping[str, Any],
    *,
    prefer: Mapping[str, Any] | None = None,
    tasks: Collection[str] | None = None,
) -> list[Record]:
    """The newest ok record of each cell that passes ``filters``.

    Args:
        records: In the order written.
        filters: Setting -> wanted value or list of values; the value ``any`` passes all.
        prefer: The same, one after the other, but each counts only for models that have a quantized record that passes.
        tasks: Other tasks do not count; all count when None.

    Raises:
        TableError: a filter names no setting.
    """
    newest = {record.cell.key: record for record in records if record.ok}
    _check_filter_names(newest.values(), filters)
    chosen = [record for record in newest.values() if passes(settings_of(record), filters)]
    chosen = [record for record in chosen if tasks is None or record.cell.task in tasks]
    for name, wanted in (prefer or {}).items():
        chosen = chosen if name in filters else _preferred(chosen, {name: wanted})
    return chosen


def the_only(records: Sequence[Record], unspecific: Collection[str] = ()) -> Record | None:
    """The record of one place of a table; None when there is none.

    Args:
        records: Those that fit.
        unspecific: Settings that differ wherever others do, and are the last to be named.

    Raises:
        TableError: several; names a setting in which they differ, those of ``SCOPES`` first.
    """
    for other in records[1:]:
        one, two = settings_of(records[0]), settings_of(other)
        check_scopes((records[0], other), unspecific)
        for name in sorted(one.keys() | two.keys(), key=lambda name: (name in unspecific, name)):
            if one.get(name) != two.get(name):
                raise _mixed(name, [shown(one.get(name)), shown(two.get(name))], (records[0].cell.label,))
    return records[0] if records else None


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


def passes(settings: Settings, filters: Mapping[str, Any]) -> bool:
    """Whether settings have the wanted values. The float baseline passes what only quantized models have."""
    return all(_matches(settings, name, wanted) for name, wanted in filters.items())


def _matches(settings: Settings, name: str, wanted: Any) -> bool:
    if wanted == ANY:
        return True
    if name not in settings and name.startswith(QUANTIZATION_SETTINGS):
        uncalibrated = name.startswith("calibration.") and settings.get("calibration", "") is None
        if uncalibrated or settings["method"] == FLOAT_METHOD:
            return True  # The float baseline belongs to every table, and so does what needs no calibration.
    options = wanted if isinstance(wanted, list) else [wanted]
    return settings.get(name) in options


def _preferred(records: Sequence[Record], wanted: Mapping[str, Any]) -> list[Record]:
    """Drops what does not pass, except for models of which no quantized record passes."""
    good = {record.cell.key for record in records if passes(settings_of(record), wanted)}
    models = {
        record.cell.model for record in records if record.cell.key in good and record.cell.recipe.method != FLOAT_METHOD
    }
    return [record for record in records if record.cell.key in good or record.cell.model not in models]


def _check_filter_names(records: Collection[Record], filters: Mapping[str, Any]) -> None:
    known = {name for record in records for name in settings_of(record)}
    if all(record.cell.recipe.method == FLOAT_METHOD for record in records):
        known |= {name for name in filters if name.startswith(QUANTIZATION_SETTINGS)}
    unknown = sorted(filters.keys() - known)
    if known and unknown:
        raise TableError(f"no record has a setting '{unknown[0]}'; settings: {', '.join(sorted(known))}")


def check_scopes(records: Iterable[Record], varying: Collection[str] = ()) -> None:
    """Refuses records that a table must not mix; settings in ``varying`` may differ.

    Raises:
        TableError: names the setting, its values and the filter that chooses one.
    """
    rows = [settings_of(record) for record in records]
    for name, scope in SCOPES.items():
        values: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for row in rows:
            if name in row and name not in varying:
                values[tuple(row[part] for part in scope)].add(shown(row[name]))
        for where, found in values.items():
            if len(found) > 1:
                raise _mixed(name, sorted(found), where)


def shown(value: Any) -> str:
    """A setting's value as people and filters write it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _mixed(name: str, values: Sequence[str], where: Sequence[str]) -> TableError:
    place = f" for {' '.join(where)}" if where else ""
    return TableError(
        f"records differ in {name}{place} ({' | '.join(values)}) and cannot share a table; "
        f"choose one with --where {name}={values[-1]}"
    )
