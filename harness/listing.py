"""``mqbench models``, ``methods`` and ``tasks``: what is known, and what is ready."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mqbench.harness import discover
from mqbench.harness.errors import MQBenchError, PluginError
from mqbench.harness.quant.options import Option

PIPE_WIDTH = 200
"""Columns of a table that goes to a file or another program."""


def list_models(models_dir: Path | None) -> None:
    """Every registered model with its row in the paper and what to do when its weights are missing."""
    registry = discover.all_models()
    table = Table("model", "in the paper as", "state")
    for name, adapter in registry.found.items():
        ready = adapter.find_weights(models_dir) is not None
        table.add_row(name, adapter.paper_name or "-", "ready" if ready else f"weights missing: {adapter.how_to_get}")
    _print(table, registry.broken)


def list_methods() -> None:
    """Every registered method with its aliases."""
    registry = discover.all_methods()
    table = Table("method", "also", "version", "what it does")
    for name, method in registry.found.items():
        table.add_row(name, ", ".join(method.aliases) or "-", discover.method_version(method), method.summary)
    _print(table, registry.broken)


def list_options(name: str) -> None:
    """The recipe options of one method: default, values and what they do.

    Raises:
        UnknownNameError: no such method.
    """
    method = discover.find_method(name)
    options: tuple[Option, ...] | None = getattr(method, "options", None)
    if options is None:
        print(f"method '{method.name}' does not say which options it has; it takes any")
        return
    table = Table("option", "default", "values", "what it does")
    for option in options:
        table.add_row(option.name, option.default_text, option.values, option.help)
    _print(table, ())


def list_tasks(data_dir: Path | None) -> None:
    """Every benchmark; its file is read and checked."""
    from mqbench.harness.datasets.catalog import TASKS

    table = Table("task", "VLMEvalKit's name", "score", "rows", "state")
    for task in TASKS.values():
        rows, state = _task_state(task.name, data_dir)
        table.add_row(task.name, task.dataset, task.unit, rows, state)
    _print(table, ())


def _task_state(name: str, data_dir: Path | None) -> tuple[str, str]:
    from mqbench.harness.datasets.catalog import find_task
    from mqbench.harness.datasets.files import load_task

    try:
        return str(len(load_task(find_task(name), data_dir))), "ready"
    except MQBenchError as error:
        return "-", str(error)


def _print(table: Table, broken: Sequence[PluginError]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    console.print(table, markup=False)
    warn_of_broken(broken)


def warn_of_broken(broken: Sequence[PluginError]) -> None:
    """One line per broken plug-in."""
    for error in broken:
        Console(stderr=True).print(f"warning: {error}", markup=False, highlight=False, soft_wrap=True)
