"""Statistics of ``mqbench gate``: paired resampling with a guard for small samples. Pure functions over numpy arrays.

The interval is a paired Bayesian bootstrap (Rubin 1981, "The Bayesian Bootstrap"): each resample gives the units (rows,
or groups of rows that share an image) random weights from a flat Dirichlet distribution. It is degenerate where nothing
changed, and too narrow where little did. So each bound sees one unit more, with the worst score there can be on its
side: a row lost for the upper bound of the loss, a row won for the lower one. Where rows only get worse, the upper
bound is exactly that of Clopper and Pearson (1934); for any bounded score both are the bound of Learned-Miller and
Thomas (2019, "A New Confidence Interval for the Mean of a Bounded Random Variable"). ``results/gate.md`` compares this
guard with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Decide = Callable[["Interval"], bool]
"""Whether an interval tells enough."""

WORST_SCORE_LOSS = 1.0
"""Scores of benchmark rows lie in 0..1, so that no row can lose more."""

MAX_DRAWS_AT_ONCE = 2_000_000
MIN_TAIL_DRAWS = 20
PLANNING_RESAMPLES = 2_000
MAX_PLANNED_SIZE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """Two one-sided bounds, each with the asked confidence."""

    lower: float
    upper: float

    def mapped(self, function: Callable[[float], float]) -> Interval:
        """Both bounds through an increasing function."""
        return Interval(function(self.lower), function(self.upper))


@dataclass(frozen=True)
class Units:
    """What is resampled: ``counts[i]`` units, each with the summed value ``sums[i]`` over ``sizes[i]`` rows.

    Equal units are kept once, since the weights of ``k`` equal units add up to one Gamma(k) variable.

    Attributes:
        sums: Shape [units].
        sizes: Shape [units], above 0.
        counts: Shape [units], above 0; not whole numbers when scaled.
        beside: Shape [units], sums of a second value of the same rows; None without one.
    """

    sums: FloatArray
    sizes: FloatArray
    counts: FloatArray
    beside: FloatArray | None = None

    @property
    def total_size(self) -> float:
        return float(self.counts @ self.sizes)

    @property
    def mean(self) -> float:
        """Loss per row."""
        return float(self.counts @ self.sums) / self.total_size

    @property
    def mean_size(self) -> float:
        return self.total_size / float(self.counts.sum())

    @property
    def spread(self) -> float:
        """Largest distance of a unit's loss per row from the mean."""
        return float(np.abs(self.sums / self.sizes - self.mean).max())

    def scaled(self, factor: float) -> Units:
        """As many times the units, with the same losses."""
        return replace(self, counts=self.counts * factor)

    def with_unknown_twins(self) -> Units:
        """For rows that come in pairs when nobody knows which: as if both rows of a pair always changed alike."""
        beside = None if self.beside is None else 2 * self.beside
        return Units(2 * self.sums, 2 * self.sizes, self.counts / 2, beside)


@dataclass(frozen=True)
class Scores:
    """One benchmark under one recipe.

    Attributes:
        scores: Shape [rows], in 0..1.
        references: The float model's scores of the same rows.
        groups: See ``group_losses``.
        unknown_twins: See ``Units.with_unknown_twins``.
    """

    scores: Sequence[float]
    references: Sequence[float]
    groups: Sequence[float] | None = None
    unknown_twins: bool = False

    @property
    def units(self) -> Units:
        units = group_losses(self.scores, self.groups, beside=self.references)
        return units.with_unknown_twins() if self.unknown_twins else units


def group_losses(losses: ArrayLike, groups: ArrayLike | None = None, beside: ArrayLike | None = None) -> Units:
    """Rows as units.

    Args:
        losses: Shape [rows]; baseline minus candidate, so that positive is worse.
        groups: Shape [rows]; rows with the same number are resampled together. By default each row is alone.
        beside: Shape [rows]; a second value of each row.

    Raises:
        ValueError: there is no row, or the shapes differ.
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"losses must be a list with at least one row, got shape {values.shape}")
    columns = [values, np.ones_like(values)]
    columns += [] if beside is None else [np.asarray(beside, dtype=np.float64)]
    if groups is not None:
        _, position = np.unique(np.asarray(groups), return_inverse=True)
        if position.shape != values.shape:
            raise ValueError(f"{values.size} losses, but groups of shape {position.shape}")
        columns = [np.bincount(position, weights=column).astype(np.float64) for column in columns]
    # Sums of the same rows in another order differ in the last bit.
    rows, counts = np.unique(np.stack(columns, axis=1).round(12), axis=0, return_counts=True)
    return Units(rows[:, 0], rows[:, 1], counts.astype(np.float64), None if beside is None else rows[:, 2])


def loss_interval(
    units: Units, confidence: float, worst: float | None, num_resamples: int, rng: np.random.Generator
) -> Interval:
    """Bounds of the expected loss per row.

    Args:
        units: The paired losses.
        confidence: Of each bound, 0.5 to 1.
        worst: Largest possible loss and gain per row. None when there is none (log likelihoods): the unit that each
            bound adds then lies as far from the mean as the farthest one seen, which is no proof, but enough in
            simulations unless few values are far from all others.
        num_resamples: Draws; see ``enough_resamples``.
        rng: Source of the draws.
    """
    low, high = (-worst, worst) if worst is not None else (units.mean - units.spread, units.mean + units.spread)
    lower, upper = [], []
    for number in _chunks(num_resamples, len(units.counts)):
        weights = rng.standard_gamma(units.counts, size=(number, len(units.counts)))
        extra = rng.standard_exponential(number) * units.mean_size
        sums, sizes = weights @ units.sums, weights @ units.sizes + extra
        lower.append((sums + low * extra) / sizes)
        upper.append((sums + high * extra) / sizes)
    return _tails(np.concatenate(lower), np.concatenate(upper), confidence)


def recovery_interval(
    benchmarks: Sequence[Scores], confidence: float, num_resamples: int, rng: np.random.Generator
) -> Interval:
    """Bounds of the mean over benchmarks of (mean score / mean float score).

    Each benchmark gets one row more: lost by the candidate for the lower bound, won from nothing for the upper one.

    Args:
        benchmarks: Each of them.
        confidence: Of each bound.
        num_resamples: Draws.
        rng: Source of the draws.

    Raises:
        ValueError: a float mean is zero.
    """
    lower, upper = np.zeros(num_resamples), np.zeros(num_resamples)
    for benchmark in benchmarks:
        mine = benchmark.units
        if mine.beside is None or not mine.beside.any():
            raise ValueError("the float score of a benchmark is zero")
        weights = rng.standard_gamma(mine.counts, size=(num_resamples, len(mine.counts)))
        extra = rng.standard_exponential(num_resamples) * mine.mean_size
        measured, reference = weights @ mine.sums, weights @ mine.beside
        lower += measured / (reference + extra)
        upper += (measured + extra) / reference
    return _tails(lower / len(benchmarks), upper / len(benchmarks), confidence)


def median_ratio_interval(
    baseline: ArrayLike, candidate: ArrayLike, confidence: float, num_resamples: int, rng: np.random.Generator
) -> Interval:
    """Bounds of median(candidate) / median(baseline) of unpaired measurements: percentile bootstrap, both resampled."""
    medians = []
    for values in (np.asarray(candidate, dtype=np.float64), np.asarray(baseline, dtype=np.float64)):
        chunks = [
            np.median(values[rng.integers(0, values.size, (number, values.size))], axis=1)
            for number in _chunks(num_resamples, values.size)
        ]
        medians.append(np.concatenate(chunks))
    ratios = medians[0] / medians[1]
    return _tails(ratios, ratios, confidence)


def size_that_tells(
    units: Units, decided: Decide, confidence: float, worst: float | None, rng: np.random.Generator
) -> int | None:
    """About how many rows would give a decision if all further rows behaved like those seen; two digits count.

    Returns:
        None where more than ``MAX_PLANNED_SIZE`` would be needed: the loss seen lies at the limit.
    """

    def tells(factor: float) -> bool:
        return decided(loss_interval(units.scaled(factor), confidence, worst, resamples, rng))

    resamples = enough_resamples(PLANNING_RESAMPLES, confidence)
    factor = 1.0
    while not tells(factor):
        factor *= 2
        if factor * units.total_size > MAX_PLANNED_SIZE:
            return None
    low, high = factor / 2, factor
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if tells(middle) else (middle, high)
    return two_digits(high * units.total_size)


def two_digits(size: float) -> int:
    """Rounded up to two significant digits."""
    unit = 10 ** max(0, math.floor(math.log10(size)) - 1)
    return math.ceil(size / unit) * unit


def enough_resamples(asked: int, confidence: float) -> int:
    """At least as many draws as leave ``MIN_TAIL_DRAWS`` beyond each bound."""
    return max(asked, math.ceil(MIN_TAIL_DRAWS / (1 - confidence)))


def _tails(lower: FloatArray, upper: FloatArray, confidence: float) -> Interval:
    return Interval(float(np.quantile(lower, 1 - confidence)), float(np.quantile(upper, confidence)))


def _chunks(total: int, width: int) -> list[int]:
    """``total`` draws in parts that fit into memory."""
    step = max(1, MAX_DRAWS_AT_ONCE // max(1, width))
    return [min(step, total - start) for start in range(0, total, step)]
