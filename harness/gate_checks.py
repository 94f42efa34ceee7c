"""One check of ``mqbench gate`` each: scores, recovery, and ratios of latency and memory."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from mqbench.harness.datasets.catalog import TASKS
from mqbench.harness.datasets.catalog import Kind as TaskForm
from mqbench.harness.errors import GateError
from mqbench.harness.gate_pairs import Pair
from mqbench.harness.gate_stats import (
    WORST_SCORE_LOSS,
    Interval,
    Scores,
    Units,
    enough_resamples,
    group_losses,
    loss_interval,
    median_ratio_interval,
    recovery_interval,
    size_that_tells,
)
from mqbench.harness.gate_verdict import RATIOS, Check, GateOptions, Kind, Verdict
from mqbench.harness.record import Backend, Record
from mqbench.harness.tasks import TaskKind, task_info

PERCENT = 100.0
CLUSTER = "cluster"
"""Name of the array that says which rows belong together: one number per sample, in their order."""


@dataclass(frozen=True)
class Bench:
    """What every check needs: the options, the confidence of one check, and its own random numbers."""

    options: GateOptions
    confidence: float

    @property
    def num_resamples(self) -> int:
        return enough_resamples(self.options.num_resamples, self.confidence)

    def rng(self, *names: str) -> np.random.Generator:
        """Depends on the seed and the names alone: further checks leave a check's interval as it is."""
        return np.random.default_rng([self.options.seed, zlib.crc32("\n".join(names).encode())])


def check_scores(pair: Pair, bench: Bench) -> Check:
    """The paired loss of one cell against ``max_drop``."""
    is_perplexity = task_info(pair.place.task).kind is TaskKind.PERPLEXITY
    kind, unit = (Kind.PERPLEXITY, "%") if is_perplexity else (Kind.ACCURACY, "points")
    blank = _blank(kind, pair, unit, bench.options.max_drop)
    if pair.candidate is None or not pair.candidate.ok or pair.baseline is None or not pair.baseline.ok:
        return _unpaired(blank, pair)
    texts, losses = _paired(pair.baseline, pair.candidate, is_perplexity)
    units = group_losses(losses, _groups(pair.candidate))
    if has_unknown_twins(pair.candidate):
        units = units.with_unknown_twins()
    shown: Callable[[float], float] = _perplexity_increase if is_perplexity else _points
    seen = replace(
        blank,
        value=shown(units.mean),
        baseline=pair.baseline.score,
        candidate=pair.candidate.score,
        num_samples=len(losses),
        num_units=round(float(units.counts.sum())),
        num_changed=texts,
    )
    if not texts and not np.any(losses):
        return replace(seen, verdict=Verdict.PASS, lower=0.0, upper=0.0, reason="every answer is the same")
    return _judged(seen, units, shown, None if is_perplexity else WORST_SCORE_LOSS, bench)


def check_recovery(group: Sequence[Pair], references: Mapping[str, Record], bench: Bench) -> Check:
    """Recovery of one recipe relative to the candidate's own float records."""
    limit = bench.options.min_recovery or 0.0
    variant = next((pair.variant for pair in group if pair.variant), "")
    blank = replace(_blank(Kind.RECOVERY, group[0], "%", limit), task="", variant=variant, differences=())
    lacking = [pair.place.task for pair in group if pair.place.task not in references]
    if lacking:
        reason = f"no ok float record for {', '.join(lacking)} in the candidate; evaluate method 'none' with it"
        return replace(blank, verdict=Verdict.MISSING, reason=reason)
    records = [(pair.either, references[pair.place.task]) for pair in group]
    scores = [_scores_beside(record, other) for record, other in records]
    zero = [record.cell.task for record, other in records if not other.score]
    if zero:
        reason = f"the float score is zero on {', '.join(zero)}: recovery is not defined"
        return replace(blank, verdict=Verdict.MISSING, reason=reason)
    rng = bench.rng("recovery", *group[0].place[:3], variant)
    interval = recovery_interval(scores, bench.confidence, bench.num_resamples, rng).mapped(_points)
    verdict = _verdict(limit - interval.upper, limit - interval.lower, 0.0)
    return replace(
        blank,
        verdict=verdict,
        value=_points(fmean(fmean(both.scores) / fmean(both.references) for both in scores)),
        lower=interval.lower,
        upper=interval.upper,
        candidate=_points(fmean((record.score or 0.0) / (other.score or 1.0) for record, other in records)),
        num_samples=sum(len(record.samples) for record, _ in records),
        reason=f"over {len(records)} benchmark(s)",
    )


def check_ratio(pair: Pair, kind: Kind, bench: Bench) -> Check:
    """Latency or memory of the candidate over the baseline's."""
    metric = RATIOS[kind]
    limit = ratio_limit(kind, bench.options) or 0.0
    baseline, candidate = pair.baseline, pair.candidate
    assert baseline is not None and candidate is not None
    old, new = baseline.metrics[metric], candidate.metrics[metric]
    if old <= 0:
        raise GateError(f"{pair.place}: {metric} of the baseline is {old:g}; measure again")
    blank = _blank(kind, pair, "ratio", limit)
    seen = replace(blank, value=new / old, baseline=old, candidate=new, num_samples=1, num_units=1)
    before, after = baseline.arrays.get(metric, ()), candidate.arrays.get(metric, ())
    if min(len(before), len(after)) < 2:
        verdict = Verdict.FAIL if new / old > limit else Verdict.PASS
        return replace(
            seen, verdict=verdict, reason="one figure on each side: compared as they are, without confidence"
        )
    rng = bench.rng(kind, *pair.place, pair.variant)
    found = median_ratio_interval(before, after, bench.confidence, bench.num_resamples, rng)
    verdict = _verdict(found.lower, found.upper, limit)
    size = min(len(before), len(after))
    return replace(
        seen,
        verdict=verdict,
        value=float(np.median(after) / np.median(before)),
        lower=found.lower,
        upper=found.upper,
        num_samples=size,
        num_units=size,
        reason="ratio of medians",
    )


def has_ratio(pair: Pair, kind: Kind, options: GateOptions) -> bool:
    """Whether both records are ok, have the figure, and computed with integer kernels: a simulation has no speed."""
    sides = (pair.baseline, pair.candidate)
    return ratio_limit(kind, options) is not None and all(
        record is not None and record.ok and record.backend is not Backend.SIMULATED and RATIOS[kind] in record.metrics
        for record in sides
    )


def ratio_limit(kind: Kind, options: GateOptions) -> float | None:
    return options.max_latency_ratio if kind is Kind.LATENCY else options.max_memory_ratio


def has_clusters(record: Record) -> bool:
    return len(record.arrays.get(CLUSTER, ())) == len(record.samples) > 0


def has_unknown_twins(record: Record) -> bool:
    """Whether two rows share each image by the benchmark's design, and the record does not say which."""
    task = record.cell.task
    return task in TASKS and TASKS[task].kind is TaskForm.YES_NO_PAIRS and not has_clusters(record)


def _judged(seen: Check, units: Units, shown: Callable[[float], float], worst: float | None, bench: Bench) -> Check:
    """The verdict on losses that are not all zero by equal answers."""
    place = (seen.model, seen.recipe, seen.bits, seen.task, seen.variant)
    rng = bench.rng("scores", *place)
    limit = bench.options.max_drop
    found = loss_interval(units, bench.confidence, worst, bench.num_resamples, rng).mapped(shown)
    verdict = _verdict(found.lower, found.upper, limit)
    judged = replace(seen, verdict=verdict, lower=found.lower, upper=found.upper)
    if verdict is not Verdict.UNDECIDED:
        return judged

    def decided(interval: Interval) -> bool:
        bounds = interval.mapped(shown)
        return _verdict(bounds.lower, bounds.upper, limit) is not Verdict.UNDECIDED

    needed = size_that_tells(units, decided, bench.confidence, worst, rng)
    reason = f"about {needed} rows would tell" if needed else "no number of rows would tell: the loss is at the limit"
    return replace(judged, num_samples_needed=needed, reason=reason)


def _verdict(lower: float, upper: float, limit: float) -> Verdict:
    """Of a value that must not exceed ``limit``."""
    return Verdict.FAIL if lower > limit else Verdict.PASS if upper < limit else Verdict.UNDECIDED


def _unpaired(blank: Check, pair: Pair) -> Check:
    """The verdict where one side has no scores."""
    baseline, candidate = pair.baseline, pair.candidate
    if candidate is None:
        return replace(blank, verdict=Verdict.MISSING, reason="the candidate has no record of this cell")
    if not candidate.ok:
        return replace(blank, verdict=Verdict.FAIL, reason=f"the candidate's cell failed: {candidate.reason}")
    why = "the baseline has no record of this cell" if baseline is None else "the baseline's cell failed"
    return replace(
        blank, verdict=Verdict.NEW, candidate=candidate.score, num_samples=len(candidate.samples), reason=why
    )


def _blank(kind: Kind, pair: Pair, unit: str, limit: float) -> Check:
    return Check(
        kind=kind,
        **pair.place._asdict(),
        variant=pair.variant,
        verdict=Verdict.UNDECIDED,
        limit=limit,
        unit=unit,
        differences=pair.differences,
    )


def _paired(baseline: Record, candidate: Record, is_perplexity: bool) -> tuple[int, list[float]]:
    """Number of changed answers, and the loss of each row in the candidate's order."""
    old = {sample.index: sample for sample in baseline.samples}
    pairs = [(old[sample.index], sample) for sample in candidate.samples]
    sign = -1.0 if is_perplexity else 1.0
    losses = [sign * ((before.score or 0.0) - (after.score or 0.0)) for before, after in pairs]
    if is_perplexity:
        return sum(loss != 0 for loss in losses), losses
    return sum(before.prediction != after.prediction for before, after in pairs), losses


def _groups(record: Record) -> Sequence[float] | None:
    return record.arrays[CLUSTER] if has_clusters(record) else None


def _scores_beside(record: Record, reference: Record) -> Scores:
    """The scores of the same rows under a recipe and in floating point."""
    found = {sample.index: sample.score for sample in reference.samples}
    if found.keys() != {sample.index for sample in record.samples}:
        raise GateError(f"{record.cell.label}: the float record has other rows; evaluate both alike")
    rows = [(sample.score or 0.0, found[sample.index] or 0.0) for sample in record.samples]
    return Scores([mine for mine, _ in rows], [other for _, other in rows], _groups(record), has_unknown_twins(record))


def _points(share: float) -> float:
    return PERCENT * share


def _perplexity_increase(nats: float) -> float:
    """Relative increase in percent: perplexity is exp(mean negative log likelihood)."""
    return PERCENT * math.expm1(nats)
