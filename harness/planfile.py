"""Plan files: many requests in one TOML file, run as one plan.

::

    [[run]]
    name = "Table 7"
    models = ["all"]
    methods = ["mquant"]
    bits = ["w4a8/w4a8"]
    tasks = ["textvqa", "docvqa"]
    options = { rms = false }       # as --set; "mquant.rms" = false names one method
    calib_samples = 256

Every key but ``name`` is one of ``mqbench eval``'s; what is left out has its default. Device, folders and batch size
are the command's own, the same for all runs. Tasks that read no weights (``model_size``, ``visual_tokens``) take the
names of blueprints as ``models``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mqbench.harness.errors import RequestError
from mqbench.harness.request import Request
from mqbench.harness.sources import ALL
from mqbench.harness.tasks import TaskKind, find_infos

LISTS = ("models", "methods", "tasks", "bits")
SINGLE: Mapping[str, type] = {
    "limit": int,
    "seed": int,
    "calib_samples": int,
    "calib_split": str,
    "backend": str,
    "options": dict,
}


@dataclass(frozen=True)
class BlueprintRun:
    """Figures of blueprints to compute: no model runs.

    Attributes:
        models: Blueprint names, or None for all.
        tasks: Names of blueprint tasks.
    """

    models: tuple[str, ...] | None
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class PlanFile:
    """A plan file, read and checked as far as names go."""

    requests: tuple[Request, ...]
    blueprints: tuple[BlueprintRun, ...]


def read_plan_file(path: Path, base: Request) -> PlanFile:
    """Reads a plan file.

    Args:
        path: A TOML file.
        base: Supplies device, folders, batch size and number of workers.

    Raises:
        RequestError: the file cannot be read, holds no run, or a run has an unknown key or a value of the wrong kind.
        UnknownNameError: a task is unknown.
    """
    requests, blueprints = [], []
    for number, entry in enumerate(_entries(path), start=1):
        where = f"{path.name}, run {number} ({entry.get('name', 'without a name')})"
        fields = {key: _value(key, value, where) for key, value in entry.items() if key != "name"}
        infos = find_infos(fields.get("tasks", (ALL,)))
        if any(info.kind is TaskKind.BLUEPRINT for info in infos):
            blueprints.append(_blueprint_run(fields, where))
        else:
            requests.append(replace(base, **fields))
    return PlanFile(tuple(requests), tuple(blueprints))


def _entries(path: Path) -> Sequence[dict[str, Any]]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"plan '{path}' cannot be read ({error}); give a TOML file of [[run]] entries") from None
    runs = data.pop("run", [])
    if data or not isinstance(runs, list) or not runs:
        raise RequestError(f"plan '{path}' must hold [[run]] entries alone; found: {', '.join(data) or 'none'}")
    return runs


def _value(key: str, value: Any, where: str) -> Any:
    if key in LISTS:
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise RequestError(f"{where}: '{key}' must be a list of names, got {value!r}")
        return tuple(value)
    if key not in SINGLE:
        raise RequestError(f"{where}: unknown key '{key}'; known: name, {', '.join((*LISTS, *SINGLE))}")
    if not isinstance(value, SINGLE[key]) or isinstance(value, bool):
        raise RequestError(f"{where}: '{key}' must be of type {SINGLE[key].__name__}, got {value!r}")
    return value


def _blueprint_run(fields: Mapping[str, Any], where: str) -> BlueprintRun:
    infos = find_infos(fields["tasks"])
    wrong = [info.name for info in infos if info.kind is not TaskKind.BLUEPRINT]
    extra = sorted(fields.keys() - {"models", "tasks"})
    if wrong or extra:
        raise RequestError(f"{where}: tasks that read no weights stand in a run of their own, without {wrong + extra}")
    models = fields.get("models", (ALL,))
    return BlueprintRun(None if ALL in models else models, tuple(info.name for info in infos))
