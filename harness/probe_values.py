"""Figures of probes: medians, and series rounded so that they stay small in a record."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

SIGNIFICANT_DIGITS = 6


def rounded(values: Iterable[float]) -> list[float]:
    """To 6 significant digits, without a negative zero."""
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") + 0.0 for value in values]


def median(values: Iterable[float]) -> float:
    """The middle value; the mean of the middle two of an even number."""
    return float(statistics.median(values))


def shown_blocks(num_blocks: int) -> Sequence[int]:
    """First, middle and last block: those whose distributions are stored whole."""
    return sorted({0, num_blocks // 2, num_blocks - 1})
