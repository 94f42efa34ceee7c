"""Attention alone (paper, Table 9): the kernel benchmark's own measurement, as a sweep's outcome."""

from __future__ import annotations

from collections.abc import Mapping

from mqbench.harness.bench.measure import measure
from mqbench.harness.bench.spec import Case
from mqbench.harness.sweep.figures import TOTAL
from mqbench.harness.sweep.measure import Settings
from mqbench.harness.sweep.outcome import OK, Outcome, summary
from mqbench.harness.sweep.spec import AttentionWork, Point

TASK, NAME = "kernel_attention", "llm"
SAMPLE_MS = 2.0
"""A sample repeats a call for about so long."""

LEFT_OUT = "left out"


def measure_attention(point: Point, settings: Settings, skip: Mapping[str, str]) -> Outcome:
    """Every contender is checked against the truth, timed in turns and checked again.

    Raises:
        WrongResult: the baseline could not be timed.
        DeviceLost: a contender broke the GPU's context.
    """
    work = point.work
    assert isinstance(work, AttentionWork)
    shape = {"heads": work.heads, "head_dim": work.head_dim}
    case = Case(TASK, settings.model.name, NAME, work.tokens, shape)
    unwanted = {name: LEFT_OUT for name in contenders() if name not in point.systems}
    found = measure(case, settings.device, point.repeats, SAMPLE_MS, {**unwanted, **skip})
    metrics: dict[str, float] = {"tokens": float(work.tokens), "interleaved": 1.0}
    arrays: dict[str, tuple[float, ...]] = {}
    for name, timed in found.timed.items():
        samples = {TOTAL: timed.times_ms}
        arrays[f"{name}.{TOTAL}"] = timed.times_ms
        metrics |= summary(name, samples) | {f"{name}.ratio": timed.ratio, f"{name}.error": timed.check.error}
    notes = {name: OK for name in found.timed} | {n: text for n, text in found.notes.items() if text != LEFT_OUT}
    scores = {name: metrics[f"{name}.{TOTAL}"] for name in point.systems if name in found.timed}
    return Outcome(metrics, arrays, notes, scores, {"l2": "cold: inputs rotate through copies larger than the cache"})


def contenders() -> tuple[str, ...]:
    """Names that the attention benchmark knows."""
    from mqbench.harness.bench.attention import BACKENDS, VARIANTS

    return ("causal", *BACKENDS, *VARIANTS)
