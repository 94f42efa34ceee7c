"""The stand-in's loss curve as a table and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass
class CurvePoint:
    """One row of the loss curve; ``alignment`` is the loss of the first lesson, which has no cross entropy."""

    step: int
    cross_entropy: float
    penalty: float
    exact_match_percent: float | None = None
    alignment: float | None = None


def write_curve(curve: Sequence[CurvePoint], path: Path) -> None:
    """The curve as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(CurvePoint)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in curve)


def plot_loss(curve: Sequence[CurvePoint], path: Path) -> None:
    """Cross entropy per answer token, loss of the first lesson and held-out exact match over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    left.plot([point.step for point in curve], [point.cross_entropy for point in curve], color="C0")
    aligned = [(point.step, point.alignment) for point in curve if point.alignment is not None]
    if aligned:
        left.plot(*zip(*aligned, strict=True), color="C2", label="share of the donor's features not yet learnt")
        left.legend(loc="center right", fontsize=7)
    left.set(xlabel="optimizer step", ylabel="cross entropy per answer token", ylim=(0, None))
    right = left.twinx()
    held_out = [(point.step, point.exact_match_percent) for point in curve if point.exact_match_percent is not None]
    if held_out:
        right.plot(*zip(*held_out, strict=True), "o-", color="C1", markersize=3)
    right.set(ylabel="held-out exact match, %", ylim=(0, 100))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
