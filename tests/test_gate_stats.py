"""Statistics of the gate: outside references, and error rates and power by simulation with fixed seeds."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mqbench.harness import gate_study
from mqbench.harness.gate_stats import (
    Interval,
    Scores,
    enough_resamples,
    group_losses,
    loss_interval,
    median_ratio_interval,
    recovery_interval,
    size_that_tells,
    two_digits,
)
from mqbench.harness.gate_study import GAIN_RATES, SHAPES, guarded, outside, percentile, simulate

CONFIDENCE = 0.95
LEVEL = 0.05
PAGE = Path(__file__).parents[1] / "results" / "gate.md"


def slack(num_data_sets: int) -> float:
    """Three standard errors of a simulated rate of ``LEVEL``."""
    return 3 * (LEVEL * (1 - LEVEL) / num_data_sets) ** 0.5


def ternary(lost: int, won: int, num_rows: int) -> list[float]:
    return [1.0] * lost + [-1.0] * won + [0.0] * (num_rows - lost - won)


def interval_of(losses: list[float], num_resamples: int = 10_000, worst: float | None = 1.0) -> Interval:
    return loss_interval(group_losses(losses), CONFIDENCE, worst, num_resamples, np.random.default_rng(0))


# --- outside references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "num_rows"), [(0, 20), (0, 1000), (1, 100), (7, 150), (60, 100), (100, 100)])
def test_rows_that_only_get_worse_have_clopper_pearsons_upper_bound(lost: int, num_rows: int) -> None:
    # Both bounds of a two-sided 90 % interval are one-sided 95 % bounds.
    exact = stats.binomtest(lost, num_rows).proportion_ci(2 * CONFIDENCE - 1, method="exact").high
    assert interval_of(ternary(lost, 0, num_rows), 200_000).upper == pytest.approx(exact, rel=0.01)
    assert interval_of(ternary(0, lost, num_rows), 200_000).lower == pytest.approx(-exact, rel=0.01)


def test_many_rows_have_scipys_bootstrap_interval() -> None:
    losses = np.random.default_rng(1).beta(2, 5, 4000) - np.random.default_rng(2).beta(2, 5, 4000)
    outside = stats.bootstrap(
        (losses,),
        np.mean,
        confidence_level=0.9,
        n_resamples=5000,
        method="BCa",
        rng=np.random.default_rng(3),
        batch=100,
    ).confidence_interval
    ours, width = interval_of(list(losses)), outside.high - outside.low
    assert ours.lower == pytest.approx(outside.low, abs=0.06 * width)
    assert ours.upper == pytest.approx(outside.high, abs=0.06 * width)


def test_no_loss_is_seen_where_mcnemars_exact_test_sees_none() -> None:
    found = 0
    for lost in range(0, 26):
        for won in range(0, 26):
            exact = stats.binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0
            if interval_of(ternary(lost, won, 200), 4000).lower > 0:
                found += 1
                assert exact <= LEVEL
    assert found > 140  # of 151 that McNemar's test sees


def test_the_interval_of_nothing_changed_is_not_a_point() -> None:
    assert interval_of(ternary(0, 0, 100)).upper == pytest.approx(1 - LEVEL ** (1 / 100), rel=0.05)
    plain = percentile(0, 0, 100, np.random.default_rng(0))
    assert (plain.lower, plain.upper) == (0, 0)


# --- units ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 4)), min_size=1, max_size=30))
def test_units_keep_the_mean_and_the_rows(rows: list[tuple[float, int]]) -> None:
    losses, groups = [loss for loss, _ in rows], [group for _, group in rows]
    for units in (group_losses(losses), group_losses(losses, groups)):
        assert units.total_size == len(rows)
        assert units.mean == pytest.approx(np.mean(losses), abs=1e-9)
    assert group_losses(losses, groups).counts.sum() == len(set(groups))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.randoms())
def test_the_order_of_rows_changes_nothing(losses: list[float], random: object) -> None:
    shuffled = list(losses)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert interval_of(losses, 1000) == interval_of(shuffled, 1000)


def test_units_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        group_losses([])
    with pytest.raises(ValueError, match="groups of shape"):
        group_losses([0.0, 1.0], [1, 2, 3])


def test_chunks_of_draws_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = interval_of(ternary(5, 2, 100), 4000)
    monkeypatch.setattr("mqbench.harness.gate_stats.MAX_DRAWS_AT_ONCE", 1000)
    parts = interval_of(ternary(5, 2, 100), 4000)
    assert parts.lower == pytest.approx(whole.lower, abs=0.003)
    assert parts.upper == pytest.approx(whole.upper, abs=0.003)


@pytest.mark.parametrize(("asked", "confidence", "expected"), [(10_000, 0.95, 10_000), (1000, 0.999, 20_000)])
def test_resamples_reach_into_the_tail(asked: int, confidence: float, expected: int) -> None:
    assert enough_resamples(asked, confidence) == pytest.approx(expected, abs=1)


# --- error rates and power --------------------------------------------------------------------------------------------

NUM_DATA_SETS = 5000


@pytest.mark.parametrize("gain_rate", GAIN_RATES.values())
@pytest.mark.parametrize("num_rows", [100, 1000])
def test_false_alarms_and_false_passes_at_the_boundary(num_rows: int, gain_rate: float) -> None:
    rates = simulate(guarded, num_rows, gate_study.MAX_DROP, gain_rate, NUM_DATA_SETS, seed=1)
    assert rates.failed <= LEVEL + slack(NUM_DATA_SETS)
    assert rates.passed <= LEVEL + slack(NUM_DATA_SETS)


@pytest.mark.parametrize("gain_rate", GAIN_RATES.values())
@pytest.mark.parametrize("num_rows", [100, 1000])
def test_false_alarms_at_no_loss(num_rows: int, gain_rate: float) -> None:
    rates = simulate(guarded, num_rows, 0.0, gain_rate, NUM_DATA_SETS, seed=1)
    assert rates.failed <= 0.03  # measured: at most 0.02
    if num_rows == 1000:
        assert rates.failed <= 0.012  # measured: at most 0.007


@pytest.mark.parametrize(
    ("num_rows", "true_loss", "gain_rate", "measured"),
    [
        (100, 0.05, 0.0, 0.380),
        (100, 0.05, 0.02, 0.259),
        (100, 0.05, 0.10, 0.144),
        (1000, 0.02, 0.0, 0.700),
        (1000, 0.03, 0.0, 0.995),
        (1000, 0.03, 0.02, 0.751),
        (1000, 0.05, 0.02, 0.996),
        (1000, 0.05, 0.10, 0.798),
    ],
)
def test_power(num_rows: int, true_loss: float, gain_rate: float, measured: float) -> None:
    rates = simulate(guarded, num_rows, true_loss, gain_rate, NUM_DATA_SETS, seed=1)
    assert rates.failed >= measured - 0.03


def test_1000_unchanged_rows_pass_and_the_plain_bootstrap_passes_what_it_must_not() -> None:
    assert simulate(guarded, 1000, 0.0, 0.0, 100).passed == 1
    # Why the guard is there: 100 rows, one point lost on average.
    assert simulate(percentile, 100, gate_study.MAX_DROP, 0.0, NUM_DATA_SETS).passed > 0.3


@pytest.mark.parametrize(
    ("name", "num_data_sets"),
    [
        ("parts of a point (ANLS)", 800),
        ("two rows per image, changed together", 1000),
        ("likelihoods, normal", 600),
        ("likelihoods, heavy tails (t, 3)", 600),
        ("likelihoods, one tail (exponential)", 600),
    ],
)
def test_bounds_of_other_scores(name: str, num_data_sets: int) -> None:
    shape = SHAPES[name]
    for num_rows in shape.num_rows:
        assert max(outside(shape, num_rows, num_data_sets, seed=1)) <= LEVEL + slack(num_data_sets)


def test_rows_of_one_image_taken_as_independent_would_raise_false_alarms() -> None:
    shape = SHAPES["the same, taken as independent"]
    assert max(outside(shape, 1000, 1000, seed=1)) > LEVEL + slack(1000)


def test_pairs_that_are_not_known_are_taken_at_their_worst() -> None:
    rng, num_data_sets, wrong = np.random.default_rng(8), 1000, [0, 0]
    shape = SHAPES["the same, taken as independent"]
    for _ in range(num_data_sets):
        units = group_losses(shape.draw(rng, 1000)).with_unknown_twins()
        assert units.total_size == 1000
        found = loss_interval(units, CONFIDENCE, 1.0, 1000, rng)
        wrong[0] += found.lower > shape.mean
        wrong[1] += found.upper < shape.mean
    assert max(wrong) / num_data_sets <= LEVEL + slack(num_data_sets)


def test_groups_of_unequal_size() -> None:
    rng, num_data_sets, wrong_low, wrong_high = np.random.default_rng(5), 1000, 0, 0
    for _ in range(num_data_sets):
        sizes = rng.integers(1, 9, 120)
        change = rng.choice([1.0, -1.0, 0.0], 120, p=[0.05, 0.03, 0.92])
        losses, groups = np.repeat(change, sizes), np.repeat(np.arange(120), sizes)
        found = loss_interval(group_losses(losses, groups), CONFIDENCE, 1.0, 1000, rng)
        wrong_low, wrong_high = wrong_low + (found.lower > 0.02), wrong_high + (found.upper < 0.02)
    assert max(wrong_low, wrong_high) / num_data_sets <= LEVEL + slack(num_data_sets)


# --- recovery, latency, planning --------------------------------------------------------------------------------------


def test_recovery_is_the_mean_of_ratios_and_covers_it() -> None:
    rng, num_data_sets, wrong = np.random.default_rng(4), 600, [0, 0]
    truth = (0.72 / 0.8 + 0.5 / 0.5) / 2
    for _ in range(num_data_sets):
        first = rng.random(150) < 0.8
        second = rng.random(150) < 0.5
        benchmarks = [Scores(first & (rng.random(150) < 0.9), first), Scores(second, second)]
        found = recovery_interval(benchmarks, CONFIDENCE, 1000, rng)
        wrong[0] += found.lower > truth
        wrong[1] += found.upper < truth
    assert max(wrong) / num_data_sets <= LEVEL + slack(num_data_sets)


def test_recovery_needs_a_float_score() -> None:
    with pytest.raises(ValueError, match="zero"):
        recovery_interval([Scores([0.0, 1.0], [0.0, 0.0])], CONFIDENCE, 1000, np.random.default_rng(0))


def test_recovery_of_groups_is_wider() -> None:
    float_scores, scores = np.ones(200), np.repeat(np.random.default_rng(0).random(100) < 0.9, 2)
    alone, grouped = (
        recovery_interval([Scores(scores, float_scores, groups)], CONFIDENCE, 4000, np.random.default_rng(0))
        for groups in (None, np.arange(200) // 2)
    )
    assert grouped.upper - grouped.lower > 1.2 * (alone.upper - alone.lower)


def test_ratio_of_medians() -> None:
    rng, num_data_sets, wrong = np.random.default_rng(6), 400, [0, 0]
    for _ in range(num_data_sets):
        baseline, candidate = rng.lognormal(0, 0.1, 30), 1.05 * rng.lognormal(0, 0.1, 30)
        found = median_ratio_interval(baseline, candidate, CONFIDENCE, 1000, rng)
        wrong[0] += found.lower > 1.05
        wrong[1] += found.upper < 1.05
    assert max(wrong) / num_data_sets <= LEVEL + slack(num_data_sets)


def test_rows_that_would_tell() -> None:
    def decided(interval: Interval) -> bool:
        return interval.lower > 0.01 or interval.upper < 0.01

    needed = partial(size_that_tells, decided=decided, confidence=CONFIDENCE, worst=1.0)
    # Nothing changed: 299 rows by Clopper and Pearson.
    assert needed(group_losses(ternary(0, 0, 100)), rng=np.random.default_rng(0)) in range(270, 331)
    assert needed(group_losses(ternary(1, 0, 100)), rng=np.random.default_rng(0)) is None
    size = needed(group_losses(ternary(6, 2, 100)), rng=np.random.default_rng(0))
    assert size is not None
    assert decided(interval_of(ternary(size * 6 // 100, size * 2 // 100, size))) or size < 100


@pytest.mark.parametrize(("size", "expected"), [(7.2, 8), (99.5, 100), (299.0, 300), (1234.0, 1300)])
def test_two_digits(size: float, expected: int) -> None:
    assert two_digits(size) == expected


@pytest.mark.parametrize(
    ("num_rows", "name", "true_loss"), [(100, "none", 0.02), (100, "2 % of rows", 0.05), (1000, "none", 0.01)]
)
def test_the_page_says_what_the_simulation_says(num_rows: int, name: str, true_loss: float) -> None:
    rates = simulate(guarded, num_rows, true_loss, GAIN_RATES[name])
    shares = " | ".join(f"{100 * share:.1f}" for share in (rates.failed, rates.undecided, rates.passed))
    assert f"| {num_rows} | {name} | {100 * true_loss:g} | {shares} |" in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_is_whole() -> None:
    now, committed = (_words(text) for text in (gate_study.page(num_data_sets=20), PAGE.read_text(encoding="utf-8")))
    assert now == committed


def _words(page: str) -> list[str]:
    """The page without figures."""
    text = re.sub(r"\d+ data sets", "N data sets", page)
    return [re.sub(r"\d+\.\d \|", "", line) if line.startswith("|") else line for line in text.splitlines()]
