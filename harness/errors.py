"""Errors that a user can act on: each message names what is wrong and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MQBenchError(Exception):
    """A mistake in the request or its data; the CLI prints it on one line and exits with code 2."""


class UnknownNameError(MQBenchError):
    """A model, method, task or bit setting that is not registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str | None = None) -> None:
        names = sorted(known)
        close = get_close_matches(name, names, n=1)
        nearest = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} '{name}'; {hint or nearest}")


class MissingWeightsError(MQBenchError):
    """A registered model whose weights were not found on this machine."""


class DatasetError(MQBenchError):
    """A benchmark file that lacks columns, holds a broken image or repeats an index."""


class CalibrationError(MQBenchError):
    """A calibration set that is empty or overlaps with what is evaluated."""


class ScoringError(MQBenchError):
    """Predictions that do not fit the rows to score, or scores of rows that do not add up to the benchmark's."""


class NonFiniteError(MQBenchError):
    """NaN or Inf in a weight or an activation; the message names the layer."""


class OutputError(MQBenchError):
    """An output folder or file that cannot be written."""


class LayoutError(MQBenchError):
    """A layout that does not describe the model it is applied to."""


class RecordError(MQBenchError):
    """A stored record that is damaged, edited by hand or written by a newer version."""


class PluginError(MQBenchError):
    """A registered model or method whose package cannot be imported or does not offer what it must."""


class TableError(MQBenchError):
    """Records that cannot stand in one table, or a table that is not described."""


class FigureError(MQBenchError):
    """A figure that is not described, or whose records are missing."""


class GateError(MQBenchError):
    """Records that ``mqbench gate`` cannot compare."""


class RequestError(MQBenchError):
    """Options that make no sense, alone or together, or that this machine cannot serve."""
