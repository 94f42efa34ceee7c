"""The stand-in's loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mqbench.harness.models.standin.train import CurvePoint


def plot_loss(curve: Sequence[CurvePoint], path: Path) -> None:
    """Cross entropy per answer token and held-out exact match over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    left.plot([point.step for point in curve], [point.cross_entropy for point in curve], color="C0")
    left.set(xlabel="optimizer step", ylabel="cross entropy per answer token", ylim=(0, None))
    right = left.twinx()
    held_out = [(point.step, point.exact_match_percent) for point in curve if point.exact_match_percent is not None]
    right.plot(*zip(*held_out, strict=True), "o-", color="C1", markersize=3)
    right.set(ylabel="held-out exact match, %", ylim=(0, 100))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
