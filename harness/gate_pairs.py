"""Which records of two folders ``mqbench gate`` compares, and which it refuses to compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mqbench.harness.errors import GateError, UnknownNameError
from mqbench.harness.record import Record
from mqbench.harness.select import passes, settings_of
from mqbench.harness.store import RECORDS_NAME, RecordStore
from mqbench.harness.tasks import PERPLEXITY, TASK_INFOS, task_info

Settings = Mapping[str, Any]

NEVER_ALLOWED = ("data_sha256", "limit", "prompts_sha256")
"""Settings that must be equal, or there are no pairs of answers to the same question."""

CELL_SETTINGS = (
    "data_sha256",
    "limit",
    "calibration.dataset",
    "calibration.split",
    "calibration.num_samples",
    "calibration.seed",
    "calibration.sha256",
    "recipe.seed",
    "dtype",
    "device",
    "batch_size",
    "backend",
    "weights_sha256",
    "method_version",
)
"""Settings of a cell that must be equal unless allowed, in the order in which a difference is named."""

ENVIRONMENT_SETTINGS = ("prompts_sha256", "vlmeval_version", "attention")
"""What records say beside their cell; compared where both records say it."""

SCORING = "scoring"
"""The same answer has the same score; what ``--allow`` calls it."""

ALLOWABLE = tuple(name for name in (*CELL_SETTINGS, *ENVIRONMENT_SETTINGS, SCORING) if name not in NEVER_ALLOWED)
ALLOWED_ANYWAY = ("method_version",)
"""The candidate is new code."""

SCORE_TOLERANCE = 1e-9


class Place(NamedTuple):
    """What a cell is called in the gate's output."""

    model: str
    recipe: str
    bits: str
    task: str

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


@dataclass(frozen=True)
class Pair:
    """The records of one place; None where a side has none.

    Attributes:
        place: Its names.
        baseline: The older record.
        candidate: The newer one.
        variant: Settings that tell several pairs of one place apart; empty when there is one.
        differences: Those between the two that are allowed, in words.
    """

    place: Place
    baseline: Record | None
    candidate: Record | None
    variant: str = ""
    differences: tuple[str, ...] = ()

    @property
    def either(self) -> Record:
        """The candidate, or the baseline where there is none."""
        record = self.candidate or self.baseline
        assert record is not None
        return record


def load_folder(folder: Path, filters: Mapping[str, Any]) -> list[Record]:
    """The records of a folder that pass ``filters``, in the order written.

    Raises:
        GateError: there is no ``records.jsonl``, or no record is left.
        UnknownNameError: a filter names no setting.
    """
    store = RecordStore(folder)
    if not store.path.is_file():
        raise GateError(f"no {RECORDS_NAME} in '{folder}'; give a folder that 'mqbench eval --out' wrote")
    found = store.load()
    known = {name for record in found for name in settings_of(record)}
    for name in filters:
        if found and name not in known:
            raise UnknownNameError("setting for --where", name, known)
    records = [record for record in found if passes(settings_of(record), filters)]
    if not records:
        raise GateError(f"'{store.path}' has no record that passes the filters; check --where")
    return records


def check_allowed(names: Iterable[str]) -> frozenset[str]:
    """What may differ: the names given and what is allowed anyway.

    Raises:
        GateError: a name can never be allowed.
        UnknownNameError: a name is no setting.
    """
    for name in names:
        if name in NEVER_ALLOWED:
            raise GateError(f"--allow {name} makes no sense: answers to other questions cannot be paired")
        if name not in ALLOWABLE:
            raise UnknownNameError("setting for --allow", name, ALLOWABLE)
    return frozenset((*names, *ALLOWED_ANYWAY))


def place_of(record: Record) -> Place:
    cell = record.cell
    return Place(cell.model, cell.recipe.label, cell.recipe.bits, cell.task)


def pair_records(baseline: Iterable[Record], candidate: Iterable[Record], allowed: frozenset[str]) -> list[Pair]:
    """Every place of either side; the newest record of each setting counts.

    Recipes stand in the order of the baseline, tasks in that of the catalog.

    Raises:
        GateError: the two sides have a place only under different settings, or answers that cannot be paired.
    """
    old, new = _by_place(baseline, allowed), _by_place(candidate, allowed)
    places = _in_order([*old, *new])
    pairs = [pair for place in places for pair in _pairs_of(place, old.get(place, {}), new.get(place, {}))]
    for pair in pairs:
        _check_environment(pair, allowed)
        _check_answers(pair, allowed)
    return [_with_differences(pair, allowed) for pair in pairs]


def compared_settings(record: Record) -> dict[str, Any]:
    """The settings of ``CELL_SETTINGS`` that the record has, and what it says of ``ENVIRONMENT_SETTINGS``."""
    environment, flat = record.environment, settings_of(record)
    packages = environment.get("packages") or {}
    said = {
        "prompts_sha256": record.prompts_sha256 or None,
        "vlmeval_version": packages.get("ms-vlmeval"),
        "attention": environment.get("attention"),
    }
    cell = {name: flat[name] for name in CELL_SETTINGS if name in flat}
    return cell | {name: value for name, value in said.items() if value is not None}


def _by_place(records: Iterable[Record], allowed: frozenset[str]) -> dict[Place, dict[str, Record]]:
    """Records by place and by the settings that must be equal. The newest wins, except a failure over its cell's ok."""
    places: dict[Place, dict[str, Record]] = {}
    for record in records:
        found = places.setdefault(place_of(record), {})
        settings = compared_settings(record)
        key = repr([settings.get(name) for name in CELL_SETTINGS if name not in allowed])
        older = found.get(key)
        if record.ok or older is None or not older.ok or older.cell.key != record.cell.key:
            found[key] = record
    return places


def _in_order(places: Sequence[Place]) -> list[Place]:
    recipes = list(dict.fromkeys(place[:3] for place in places))
    tasks = list(TASK_INFOS)
    return sorted(set(places), key=lambda place: (recipes.index(place[:3]), tasks.index(task_info(place.task).name)))


def _pairs_of(place: Place, old: Mapping[str, Record], new: Mapping[str, Record]) -> list[Pair]:
    only_old, only_new = ([record for key, record in a.items() if key not in b] for a, b in ((old, new), (new, old)))
    if only_old and only_new:
        raise _refusal(place, only_old, only_new)
    both = [Pair(place, old[key], new[key]) for key in old if key in new]
    missing = [Pair(place, record, None) for record in only_old]
    return _named_apart([*both, *missing, *(Pair(place, None, record) for record in only_new)])


def _named_apart(pairs: Sequence[Pair]) -> list[Pair]:
    settings = [compared_settings(pair.either) for pair in pairs]
    varying = [name for name in CELL_SETTINGS if len({repr(row.get(name)) for row in settings}) > 1]
    readable = [name for name in varying if not name.endswith("sha256")] or varying
    texts = (", ".join(f"{name}={_shown(row.get(name))}" for name in readable) for row in settings)
    return [replace(pair, variant=text) for pair, text in zip(pairs, texts, strict=True)]


def _refusal(place: Place, old: Sequence[Record], new: Sequence[Record]) -> GateError:
    """Names the first difference between the two records that differ least."""
    found = [_differences(before, after, CELL_SETTINGS) for before in old for after in new]
    name, before, after = min(found, key=lambda differences: len(differences))[0]
    return _differ(place, name, before, after)


def _differ(place: Place, name: str, before: Any, after: Any) -> GateError:
    remedy = "evaluate both alike, or choose records with --where"
    if name in ALLOWABLE:
        remedy += f" (--allow {name} if this is what you test)"
    shown = f"baseline {_shown(before)}, candidate {_shown(after)}"
    return GateError(f"{place}: records differ in {name} ({shown}) and cannot be compared; {remedy}")


def _differences(old: Record, new: Record, names: Iterable[str]) -> list[tuple[str, Any, Any]]:
    before, after = compared_settings(old), compared_settings(new)
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def _check_environment(pair: Pair, allowed: frozenset[str]) -> None:
    if pair.baseline is None or pair.candidate is None:
        return
    for name, before, after in _differences(pair.baseline, pair.candidate, ENVIRONMENT_SETTINGS):
        if name not in allowed and before is not None and after is not None:
            raise _differ(pair.place, name, before, after)


def _check_answers(pair: Pair, allowed: frozenset[str]) -> None:
    """The same rows on both sides, each with a score, and equal scores for equal answers."""
    if pair.baseline is None or pair.candidate is None or not (pair.baseline.ok and pair.candidate.ok):
        return
    old, new = ({sample.index: sample for sample in record.samples} for record in (pair.baseline, pair.candidate))
    if len(old) < len(pair.baseline.samples) or len(new) < len(pair.candidate.samples):
        raise GateError(f"{pair.place}: a row index stands twice; was records.jsonl edited?")
    if old.keys() != new.keys():
        index = sorted(old.keys() ^ new.keys())[0]
        raise GateError(f"{pair.place}: row {index} is in one of the two records only; evaluate both alike")
    for index, before in old.items():
        after = new[index]
        if before.score is None or after.score is None:
            raise GateError(f"{pair.place}: row {index} has no score of its own; evaluate again with this version")
        same_text = before.prediction == after.prediction and pair.place.task != PERPLEXITY
        if same_text and SCORING not in allowed and not _close(before.score, after.score):
            raise _differ(pair.place, f"{SCORING}", f"{before.score:g} for row {index}", f"{after.score:g}")


def _close(before: float, after: float) -> bool:
    return math.isclose(before, after, abs_tol=SCORE_TOLERANCE)


def _with_differences(pair: Pair, allowed: frozenset[str]) -> Pair:
    if pair.baseline is None or pair.candidate is None:
        return pair
    found = _differences(pair.baseline, pair.candidate, [*CELL_SETTINGS, *ENVIRONMENT_SETTINGS])
    texts = (f"{name} {_shown(before)} -> {_shown(after)}" for name, before, after in found if name in allowed)
    return replace(pair, differences=tuple(texts))


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 40 else f"{text[:12]}..."
