"""The text stand-in's loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mqbench.harness.models.standin_text.train import CurvePoint


def plot_loss(curve: Sequence[CurvePoint], path: Path) -> None:
    """Cross entropy per token while training and over held-out text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot([point.step for point in curve], [point.cross_entropy for point in curve], label="training")
    held_out = [(point.step, point.held_out) for point in curve if point.held_out is not None]
    axes.plot(*zip(*held_out, strict=True), "o", markersize=4, label="held out")
    axes.set(xlabel="optimizer step", ylabel="nats per token", ylim=(1, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
