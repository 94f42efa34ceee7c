"""One point in a process of its own on a GPU, through the kernel benchmark's worker."""

from __future__ import annotations

from typing import Any, cast

from mqbench.harness.bench.worker import Bench
from mqbench.harness.sweep.measure import Hints, Settings
from mqbench.harness.sweep.outcome import Outcome
from mqbench.harness.sweep.spec import ATTENTION, QUANTIZE, Point

_hints: Hints = {}
"""Of this process: points come in order of their size, and what was too much stays too much."""


def make_worker(settings: Settings) -> Bench:
    """Measures points: on a GPU in a process that is replaced when a system breaks it, elsewhere in this one."""
    return Bench(cast(Any, settings), cast(Any, measure_point))


def measure_point(point: Point, settings: Settings, skip: dict[str, str]) -> Outcome:
    """In this process.

    Raises:
        DeviceLost: a system broke the GPU's context.
    """
    import torch

    if settings.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(settings.device))
    if point.sweep == ATTENTION:
        from mqbench.harness.sweep.attention import measure_attention

        return measure_attention(point, settings, skip)
    if point.sweep == QUANTIZE:
        from mqbench.harness.sweep.quantize import measure_quantize

        return measure_quantize(point, settings, skip)
    from mqbench.harness.sweep.measure import measure_sequences

    return measure_sequences(point, settings, skip, hints=_hints)
