"""What ``mqbench gate`` is asked and what it answers, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from mqbench.harness.errors import RequestError


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"
    MISSING = "missing"
    NEW = "new"


class Kind(StrEnum):
    """What a check looks at."""

    ACCURACY = "accuracy"
    PERPLEXITY = "perplexity"
    RECOVERY = "recovery"
    LATENCY = "latency"
    MEMORY = "memory"


class Outcome(StrEnum):
    """What a verdict that says neither yes nor no does to the exit code."""

    PASS = "pass"
    FAIL = "fail"


class Correction(StrEnum):
    """For many checks at once: each at ``confidence``, or all together at ``confidence``."""

    NONE = "none"
    BONFERRONI = "bonferroni"


@dataclass(frozen=True)
class GateOptions:
    """Limits and statistics.

    Attributes:
        max_drop: Largest loss: percentage points of accuracy, percent of perplexity.
        confidence: Of each bound of an interval, above 0.5 and below 1.
        min_recovery: Smallest recovery, percent of float; None: no such check.
        max_latency_ratio: Candidate over baseline; None: no such check.
        max_memory_ratio: The same for peak memory.
        num_resamples: Bootstrap draws; raised where the confidence needs more.
        seed: Of the draws.
        undecided: Whether an undecided check fails the gate.
        missing: Whether a cell without a candidate fails the gate.
        correction: For the number of checks.
        allow: Settings that may differ, beside the method's version.
    """

    max_drop: float = 1.0
    confidence: float = 0.95
    min_recovery: float | None = None
    max_latency_ratio: float | None = 1.05
    max_memory_ratio: float | None = 1.05
    num_resamples: int = 10_000
    seed: int = 0
    undecided: Outcome = Outcome.PASS
    missing: Outcome = Outcome.FAIL
    correction: Correction = Correction.NONE
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise RequestError(f"--max-drop must be 0 or more, got {self.max_drop}")
        if not 0.5 < self.confidence < 1:
            raise RequestError(f"--confidence must lie between 0.5 and 1, got {self.confidence}")
        if self.num_resamples < 1000:
            raise RequestError(f"--resamples must be at least 1000, got {self.num_resamples}")
        if self.seed < 0:
            raise RequestError(f"--seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True)
class Check:
    """One line of the gate's answer; the JSON form has the same fields.

    Attributes:
        kind: What was looked at.
        model: Model name.
        recipe: Method and options.
        bits: Bit setting.
        task: Benchmark; empty for recovery, which is over all of them.
        variant: Settings that tell several checks of one place apart; mostly empty.
        verdict: The answer.
        fails: Whether it makes the gate fail.
        limit: What the value must not exceed (recovery: not fall below).
        unit: Of value, bounds and limit: ``points``, ``%`` or ``ratio``.
        value: Loss (positive is worse), recovery, or candidate over baseline; None when nothing was compared.
        lower: Bound of the value with the asked confidence; None when there is no interval.
        upper: The other bound.
        baseline: The headline score (latency, memory: the figure) of the baseline.
        candidate: The same of the candidate; recovery: from headline scores, as tables print it.
        num_samples: Rows (windows, measurements) compared.
        num_units: Rows or groups of rows that were resampled together.
        num_changed: Rows with another answer text (windows with another likelihood).
        num_samples_needed: About how many rows would tell; None when decided, or when no number would.
        reason: One sentence for people.
        differences: Allowed differences of the settings.
    """

    kind: Kind
    model: str
    recipe: str
    bits: str
    task: str
    variant: str
    verdict: Verdict
    limit: float
    unit: str
    fails: bool = False
    value: float | None = None
    lower: float | None = None
    upper: float | None = None
    baseline: float | None = None
    candidate: float | None = None
    num_samples: int = 0
    num_units: int = 0
    num_changed: int | None = None
    num_samples_needed: int | None = None
    reason: str = ""
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All checks, what the reader must know about them, and the verdict on the whole."""

    options: GateOptions
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    confidence_per_check: float

    @property
    def ok(self) -> bool:
        return not any(check.fails for check in self.checks)

    def count(self, verdict: Verdict) -> int:
        return sum(check.verdict is verdict for check in self.checks)


RATIOS: Mapping[Kind, str] = MappingProxyType({Kind.LATENCY: "latency_ms", Kind.MEMORY: "peak_memory_bytes"})
"""Metric (and array of raw measurements, where there is one) by kind of ratio."""
