"""Derived columns of tables: named formulas over the figures of one row, or over two metrics of one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Scores = Mapping[str, float]
"""Figures of one row by column header."""


@dataclass(frozen=True)
class Figures:
    """What a formula may read: measured, the same model in floating point, and the paper's."""

    measured: Scores
    reference: Scores = field(default_factory=dict)
    paper: Scores = field(default_factory=dict)


def recovery(scores: Scores, reference: Scores) -> float | None:
    """Mean over the benchmarks of score / float score, in percent.

    None when the row lacks a benchmark that the float baseline has, or a float score is zero.
    """
    if not reference or not reference.keys() <= scores.keys() or not all(reference.values()):
        return None
    return 100 * sum(scores[name] / value for name, value in reference.items()) / len(reference)


def relative_change(value: float | None, reference: float | None) -> float | None:
    """(value - reference) / reference, in percent; None when one is missing or the reference is zero."""
    return None if value is None or not reference else 100 * (value - reference) / reference


FORMULAS: Mapping[str, Callable[[Figures, str], float | None]] = MappingProxyType(
    {
        "recovery": lambda figures, of: recovery(figures.measured, figures.reference),
        "change_from_float_percent": lambda figures, of: relative_change(
            figures.measured.get(of), figures.reference.get(of)
        ),
        "change_from_paper_percent": lambda figures, of: relative_change(
            figures.measured.get(of), figures.paper.get(of)
        ),
    }
)
"""Derived columns by name: from the row's figures and the header of the column that the formula is ``of``."""

COMPARISONS: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {
        "gain_percent": lambda new, old: 100 * (old / new - 1),
        "times": lambda value, unit: value / unit,
    }
)
"""Derived columns by name, from two metrics of one record: ``metric``, and the one that it is set ``against``.

``gain_percent`` is the paper's formula for speedups and for memory: 100 % is half of the time, or of the memory.
"""
