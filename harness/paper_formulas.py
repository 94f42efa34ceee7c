"""Formulas between printed numbers, on intervals: a printed number stands for every value that rounds to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType


@dataclass(frozen=True)
class Interval:
    """All values between ``low`` and ``high``; ``nominal`` is what the printed numbers themselves give."""

    low: float
    nominal: float
    high: float

    def meets(self, other: Interval, slack: float = 1e-9) -> bool:
        """Some value lies in both; ``slack`` is for binary rounding of decimal fractions only."""
        return self.low <= other.high + slack and other.low <= self.high + slack


@dataclass(frozen=True)
class Formula:
    """A named formula, monotonic in each input where the inputs are positive.

    Attributes:
        text: How people write it; ``{0}``, ``{1}``, ... are the inputs.
        compute: From inputs and weights (ones, unless a rule gives some).
        arity: Number of inputs; None for any.
        plausible: An author may have used it in place of another, by mistake or by habit.
    """

    text: str
    compute: Callable[[Sequence[float], Sequence[float]], float]
    arity: int | None = 2
    plausible: bool = True


FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "value": Formula("{0}", lambda x, w: x[0], 1, plausible=False),
        "difference": Formula("{0} - {1}", lambda x, w: x[0] - x[1]),
        "gain_percent": Formula("100 ({0} / {1} - 1)", lambda x, w: 100 * (x[0] / x[1] - 1)),
        "reduction_percent": Formula("100 (1 - {1} / {0})", lambda x, w: 100 * (1 - x[1] / x[0])),
        "ratio_percent": Formula("100 {0} / {1}", lambda x, w: 100 * x[0] / x[1]),
        "sum": Formula("sum({all})", lambda x, w: sum(x), None),
        "mean": Formula("mean({all})", lambda x, w: sum(x) / len(x), None),
        "weighted_mean": Formula(
            "weighted mean({all})", lambda x, w: sum(a * b for a, b in zip(x, w, strict=True)) / sum(w), None
        ),
        "largest": Formula("max({all})", lambda x, w: max(x), None, plausible=False),
        "smallest": Formula("min({all})", lambda x, w: min(x), None, plausible=False),
    }
)
"""What a rule may name. Add one here, and every rule can use it and every check tries it as an alternative."""


def decimals_of(text: str) -> int:
    """Decimals of a printed number: 2 for ``+1.50``."""
    return max(0, -int(Decimal(text).as_tuple().exponent))


def printed_interval(text: str, *, exact: bool = False) -> Interval:
    """Every value that rounds to a printed number; the number alone where it is a count."""
    value = float(text)
    half = 0.0 if exact else 0.5 * 10.0 ** -decimals_of(text)
    return Interval(value - half, value, value + half)


def truncated_interval(text: str) -> Interval:
    """Every value that gives a printed number when digits are cut off instead of rounded."""
    value, unit = float(text), 10.0 ** -decimals_of(text)
    return Interval(value - unit, value, value) if text.startswith("-") else Interval(value, value, value + unit)


def evaluate(formula: Formula, inputs: Sequence[Interval], weights: Sequence[float] = ()) -> Interval:
    """The values that a formula can take: monotonic, so the extremes lie at corners."""
    ones = tuple(weights) or (1.0,) * len(inputs)
    corners = itertools.product(*((item.low, item.high) for item in inputs))
    values = [formula.compute(corner, ones) for corner in corners]
    return Interval(min(values), formula.compute([item.nominal for item in inputs], ones), max(values))


def formula_text(formula: Formula, names: Sequence[str]) -> str:
    return formula.text.format(*names, all=", ".join(names))
