"""What ``mqbench gate`` can see: simulated false alarms and power. ``python -m mqbench.harness.gate_study`` prints
``results/gate.md``.

A data set is a number of rows that each are lost (score 1 -> 0), won (0 -> 1) or unchanged. The true loss is the
difference between the chances to be lost and to be won; the chance to be won is the noise of a meaningless change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mqbench.harness.gate_stats import WORST_SCORE_LOSS, FloatArray, Interval, Units, group_losses, loss_interval

MAX_DROP = 0.01
CONFIDENCE = 0.95
NUM_ROWS = (100, 1000)
TRUE_LOSSES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05)
GAIN_RATES: Mapping[str, float] = MappingProxyType({"none": 0.0, "2 % of rows": 0.02, "10 % of rows": 0.10})
"""Chance of a row to be won, by name."""

NUM_DATA_SETS = 20_000
NUM_SHAPE_SETS = 2_000
NUM_RESAMPLES = 4_000
NUM_SHAPE_RESAMPLES = 1_000

PAGE = """\
# What `mqbench gate` can see

Made by `python -m mqbench.harness.gate_study`; do not edit. Simulated, {num_data_sets} data sets per
line, fixed seed: `--max-drop {max_drop:g} --confidence {confidence}`, one cell, independent rows, scores 0 or 1.

*Noise* is the share of rows that get better by chance; that share plus the true loss get worse.

## Verdicts, in % of runs

At a true loss of 0, 0.5 and 1 point, *fail* is a false alarm (at most 5 %, which matters at 1 point). Above 1 point,
*fail* is the power, and *pass* is an error (at most 5 %, as at exactly 1 point).

{verdicts}

100 rows rarely show that a model lost less than a point: when no score changed, the loss may still be up to 3.0 points
(299 rows without a change are the fewest that pass). A cell passes at any size when every answer is the same text.

## Why this interval

Errors at a true loss of exactly `--max-drop`, in % of runs; 5 % is allowed on each side. A false pass says "the loss
is below 1 point" where it is not.

{methods}

The plain bootstrap knows only rows that it has seen: where a change is rare it passes models that lose a point.
Pseudo-pairs soften that and do not cure it. The studentized bootstrap is right for many changes and breaks down for
few. The guard adds to each bound one row of the worst kind (lost for the upper bound, won for the lower one): its upper
bound is exact (Clopper-Pearson) where rows only get worse, and it is careful otherwise.

## Other scores

How often the true mean lies outside each bound, in % of {num_shape_sets} data sets; 5 % is allowed. Likelihoods
(perplexity) have no worst value: there the guard is as far from the mean as the farthest window.

{shapes}

Few windows with a long tail on one side are what the perplexity check gets wrong: a pass is then too easy. The table
says how much; take at least 60 windows.
"""

Bounds = Callable[[int, int, int, np.random.Generator], Interval]
"""From rows lost, rows won and all rows to the bounds of the loss per row."""


@dataclass(frozen=True)
class Shape:
    """Losses of a kind.

    Attributes:
        draw: Losses of so many rows.
        mean: Their true mean.
        worst: See ``loss_interval``.
        num_rows: Sizes to simulate.
        group_size: Rows that are drawn, and resampled, together.
    """

    draw: Callable[[np.random.Generator, int], FloatArray]
    mean: float
    worst: float | None
    num_rows: tuple[int, ...]
    group_size: int = 1


PARTIAL_LOSSES = np.array([0.0, 0.25, 0.5, 1.0, -0.25, -0.5, -1.0])
PARTIAL_CHANCES = np.array([0.92, 0.02, 0.02, 0.02, 0.008, 0.008, 0.004])
TWIN_CHANCES = (0.03, 0.02, 0.95)


def _twins(rng: np.random.Generator, num_rows: int) -> FloatArray:
    return np.repeat(rng.choice([1.0, -1.0, 0.0], num_rows // 2, p=TWIN_CHANCES), 2)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "parts of a point (ANLS)": Shape(
            lambda rng, num_rows: rng.choice(PARTIAL_LOSSES, num_rows, p=PARTIAL_CHANCES),
            float(PARTIAL_LOSSES @ PARTIAL_CHANCES),
            WORST_SCORE_LOSS,
            (60, 300),
        ),
        "two rows per image, changed together": Shape(_twins, 0.01, WORST_SCORE_LOSS, (200, 1000), group_size=2),
        "the same, taken as independent": Shape(_twins, 0.01, WORST_SCORE_LOSS, (200, 1000)),
        "likelihoods, normal": Shape(lambda rng, num_rows: rng.standard_normal(num_rows), 0.0, None, (20, 60)),
        "likelihoods, heavy tails (t, 3)": Shape(
            lambda rng, num_rows: rng.standard_t(3, num_rows), 0.0, None, (20, 60)
        ),
        "likelihoods, one tail (exponential)": Shape(
            lambda rng, num_rows: rng.standard_exponential(num_rows), 1.0, None, (20, 60)
        ),
        "likelihoods, one long tail (lognormal)": Shape(
            lambda rng, num_rows: rng.lognormal(0.0, 1.0, num_rows), float(np.exp(0.5)), None, (20, 60)
        ),
    }
)
"""Losses that are not just 0 and 1."""


@dataclass(frozen=True)
class Rates:
    """Shares of the simulated data sets, 0 to 1."""

    failed: float
    passed: float

    @property
    def undecided(self) -> float:
        return 1 - self.failed - self.passed


def guarded(lost: int, won: int, num_rows: int, rng: np.random.Generator) -> Interval:
    """What the gate uses."""
    found = [(loss, count) for loss, count in ((1, lost), (-1, won), (0, num_rows - lost - won)) if count]
    sums, counts = np.array(found, dtype=np.float64).T
    return loss_interval(Units(sums, np.ones_like(sums), counts), CONFIDENCE, WORST_SCORE_LOSS, NUM_RESAMPLES, rng)


def percentile(lost: int, won: int, num_rows: int, rng: np.random.Generator) -> Interval:
    """The plain paired bootstrap: rows drawn with replacement, quantiles of the means."""
    means, _ = _resampled(lost, won, num_rows, rng)
    return Interval(float(np.quantile(means, 1 - CONFIDENCE)), float(np.quantile(means, CONFIDENCE)))


def pseudo_pairs(lost: int, won: int, num_rows: int, rng: np.random.Generator) -> Interval:
    """The plain bootstrap after adding one row lost and one row won, in the manner of Agresti and Min (2005)."""
    return percentile(lost + 1, won + 1, num_rows + 2, rng)


def studentized(lost: int, won: int, num_rows: int, rng: np.random.Generator) -> Interval:
    """Bootstrap-t: quantiles of (mean* - mean) / standard error*; resamples without variance are left out."""
    means, errors = _resampled(lost, won, num_rows, rng)
    mean, (own_error,) = (lost - won) / num_rows, _standard_error(np.array([lost]), np.array([won]), num_rows)
    if not errors.any():
        return Interval(mean, mean)
    ratios = (means - mean)[errors > 0] / errors[errors > 0]
    low, high = np.quantile(ratios, [1 - CONFIDENCE, CONFIDENCE])
    return Interval(mean - float(high) * own_error, mean - float(low) * own_error)


METHODS: Mapping[str, Bounds] = MappingProxyType(
    {
        "plain percentile bootstrap": percentile,
        "with Agresti-Min pseudo-pairs": pseudo_pairs,
        "studentized bootstrap": studentized,
        "guarded (used)": guarded,
    }
)


def simulate(
    bounds: Bounds, num_rows: int, true_loss: float, gain_rate: float, num_data_sets: int = NUM_DATA_SETS, seed: int = 0
) -> Rates:
    """Verdicts on simulated data sets; data sets with the same counts share one interval."""
    rng = np.random.default_rng([seed, num_rows, round(true_loss * 1e6), round(gain_rate * 1e6)])
    chances = [gain_rate + true_loss, gain_rate, 1 - 2 * gain_rate - true_loss]
    drawn, times = np.unique(rng.multinomial(num_rows, chances, num_data_sets)[:, :2], axis=0, return_counts=True)
    failed = passed = 0
    for (lost, won), number in zip(drawn, times, strict=True):
        interval = bounds(int(lost), int(won), num_rows, rng)
        failed += int(number) * (interval.lower > MAX_DROP)
        passed += int(number) * (interval.upper < MAX_DROP)
    return Rates(failed / num_data_sets, passed / num_data_sets)


def outside(shape: Shape, num_rows: int, num_data_sets: int, seed: int = 0) -> tuple[float, float]:
    """How often the true mean is below the lower bound, and above the upper one."""
    rng = np.random.default_rng([seed, num_rows])
    low = high = 0
    for _ in range(num_data_sets):
        units = group_losses(shape.draw(rng, num_rows), np.arange(num_rows) // shape.group_size)
        found = loss_interval(units, CONFIDENCE, shape.worst, NUM_SHAPE_RESAMPLES, rng)
        low, high = low + (shape.mean < found.lower), high + (shape.mean > found.upper)
    return low / num_data_sets, high / num_data_sets


def page(num_data_sets: int = NUM_DATA_SETS) -> str:
    """``results/gate.md``."""
    num_shape_sets = min(NUM_SHAPE_SETS, num_data_sets)
    tables = {"verdicts": _verdict_table(num_data_sets), "methods": _method_table(num_data_sets)}
    tables["shapes"] = _shape_table(num_shape_sets)
    parts = {name: "\n".join(lines) for name, lines in tables.items()}
    return PAGE.format(
        num_data_sets=num_data_sets,
        num_shape_sets=num_shape_sets,
        max_drop=100 * MAX_DROP,
        confidence=CONFIDENCE,
        **parts,
    )


def _verdict_table(num_data_sets: int) -> Sequence[str]:
    head = [
        "| rows | noise | true loss, points | fail | undecided | pass |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for num_rows in NUM_ROWS:
        for name, gain_rate in GAIN_RATES.items():
            for loss in TRUE_LOSSES:
                rates = simulate(guarded, num_rows, loss, gain_rate, num_data_sets)
                shares = " | ".join(_percent(share) for share in (rates.failed, rates.undecided, rates.passed))
                head.append(f"| {num_rows} | {name} | {100 * loss:g} | {shares} |")
    return head


def _method_table(num_data_sets: int) -> Sequence[str]:
    head = ["| interval | rows | noise | false alarm | false pass |", "| --- | ---: | --- | ---: | ---: |"]
    for method, bounds in METHODS.items():
        for num_rows in (100, 200, 1000):
            for name, gain_rate in GAIN_RATES.items():
                rates = simulate(bounds, num_rows, MAX_DROP, gain_rate, num_data_sets)
                head.append(f"| {method} | {num_rows} | {name} | {_percent(rates.failed)} | {_percent(rates.passed)} |")
    return head


def _shape_table(num_data_sets: int) -> Sequence[str]:
    head = ["| losses | rows | below the lower bound | above the upper bound |", "| --- | ---: | ---: | ---: |"]
    for name, shape in SHAPES.items():
        for num_rows in shape.num_rows:
            low, high = outside(shape, num_rows, num_data_sets)
            head.append(f"| {name} | {num_rows} | {_percent(low)} | {_percent(high)} |")
    return head


def _percent(share: float) -> str:
    return f"{100 * abs(share):.1f}"


def _resampled(lost: int, won: int, num_rows: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Means and standard errors of plain resamples, each of shape [NUM_RESAMPLES]."""
    chances = np.array([lost, won, num_rows - lost - won]) / num_rows
    counts = rng.multinomial(num_rows, chances, NUM_RESAMPLES)
    means = (counts[:, 0] - counts[:, 1]) / num_rows
    return means, _standard_error(counts[:, 0], counts[:, 1], num_rows)


def _standard_error(lost: np.ndarray, won: np.ndarray, num_rows: int) -> FloatArray:
    variance = (lost + won) / num_rows - ((lost - won) / num_rows) ** 2
    return np.sqrt(np.maximum(variance, 0) / (num_rows - 1))


if __name__ == "__main__":
    sys.stdout.write(page())
