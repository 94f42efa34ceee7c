"""From a finished training run to the shipped folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from mqbench.harness.errors import MissingWeightsError
from mqbench.harness.models.standin import tasks
from mqbench.harness.models.standin.architecture import Size
from mqbench.harness.models.standin.curve import CurvePoint, plot_loss, write_curve
from mqbench.harness.models.standin.export import export
from mqbench.harness.models.standin.family import Feed, StandIn, find_standin, text_channels_of
from mqbench.harness.models.standin.harden import Hardness, harden
from mqbench.harness.models.standin.objective import TrainBatch
from mqbench.harness.models.standin.train import MAX_DIFFICULTY, mixed_examples, saved_settings
from mqbench.harness.quant.layout import Layout

MEASURED_EXAMPLES = 512


def measured_batches(feed: Feed, seed: int = 0) -> list[TrainBatch]:
    """Fresh examples of every kind on which text ranges are measured; no other split holds them."""
    rng = Random(f"harden-{seed}")
    pictured = mixed_examples(rng, MEASURED_EXAMPLES)
    written = [tasks.scienceqa(rng, MAX_DIFFICULTY, context=context) for context in ("TXT", "NO") for _ in range(64)]
    groups = [pictured[start : start + 64] for start in range(0, len(pictured), 64)]
    return [feed.collate(group) for group in (*groups, written)]


@dataclass(frozen=True)
class TrainedRun:
    """A training run: the model as it was trained, its family, tokenizer, settings and loss curve."""

    model: Any
    standin: StandIn
    tokenizer: PreTrainedTokenizerFast
    settings: dict[str, Any]
    curve: list[dict[str, Any]]

    @property
    def layout(self) -> Layout:
        return self.standin.layout(self.model)

    def feed(self) -> Feed:
        """How examples reach the model."""
        return self.standin.feed(self.model, self.tokenizer)

    def harden(self, hardness: Hardness, measured: Sequence[TrainBatch] | None = None) -> None:
        """Hardens the model in place; text ranges are measured on ``measured``, or on ``measured_batches``."""
        feed, layout = self.feed(), self.layout
        batches = measured_batches(feed) if measured is None else measured
        harden(self.model, layout, hardness, feed, batches, text_channels_of(self.model, layout))


def load_run(run: Path) -> TrainedRun:
    """Loads the last checkpoint of a training run.

    Raises:
        MissingWeightsError: the run has no checkpoint.
    """
    checkpoint = run / "checkpoint.pt"
    if not checkpoint.exists():
        raise MissingWeightsError(
            f"{checkpoint} does not exist; run `mqbench standin train --out {run}` (and the --family) first"
        )
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    settings = saved_settings(saved)
    standin = find_standin(settings["family"])
    tokenizer = standin.build_tokenizer()
    model = standin.build_model(standin.build_config(tokenizer, Size(**saved.get("size", {}))), seed=0)
    model.load_state_dict(saved["model"])
    return TrainedRun(model, standin, tokenizer, settings | {"finished_steps": saved["step"]}, saved["curve"])


def harden_and_export(run: Path, out: Path | None, hardness: Hardness) -> Path:
    """Loads a training run, hardens it and writes a Hugging Face folder.

    Args:
        run: Of the training.
        out: The folder; None for the model's name beside the run.
        hardness: Which ingredients, how strong.

    Returns:
        The folder.

    Raises:
        MissingWeightsError: the run has no checkpoint.
    """
    trained = load_run(run)
    folder = out or run.parent / trained.standin.model_name
    trained.harden(hardness)
    settings = {"training": trained.settings, "hardness": asdict(hardness)}
    export(trained.standin, trained.model, trained.tokenizer, folder, settings)
    curve = [CurvePoint(**row) for row in trained.curve]
    write_curve(curve, folder / "loss.csv")
    plot_loss(curve, folder / "loss.png")
    return folder
