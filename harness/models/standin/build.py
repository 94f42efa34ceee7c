"""From a finished training run to the shipped folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from mqbench.harness.errors import MissingWeightsError
from mqbench.harness.models.standin import tasks
from mqbench.harness.models.standin.architecture import build_config, build_model
from mqbench.harness.models.standin.export import export
from mqbench.harness.models.standin.harden import Hardness, harden
from mqbench.harness.models.standin.objective import TrainBatch
from mqbench.harness.models.standin.tokenizer import build_tokenizer
from mqbench.harness.models.standin.train import MAX_DIFFICULTY, MIXTURE, collate

MEASURED_EXAMPLES = 512


def measured_batches(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> list[TrainBatch]:
    """Fresh examples of every kind on which text ranges are measured; no other split holds them."""
    rng = Random(f"harden-{seed}")
    makers, weights = zip(*MIXTURE, strict=True)
    pictured = [maker(rng, MAX_DIFFICULTY) for maker in rng.choices(makers, weights, k=MEASURED_EXAMPLES)]
    written = [tasks.scienceqa(rng, MAX_DIFFICULTY, context=context) for context in ("TXT", "NO") for _ in range(64)]
    return [collate(pictured[start : start + 64], tokenizer) for start in range(0, len(pictured), 64)] + [
        collate(written, tokenizer)
    ]


@dataclass(frozen=True)
class TrainedRun:
    """A training run: the model as it was trained, its tokenizer, settings and loss curve."""

    model: Qwen2VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    settings: dict[str, Any]
    curve: list[dict[str, Any]]


def load_run(run: Path) -> TrainedRun:
    """Loads the last checkpoint of a training run.

    Raises:
        MissingWeightsError: the run has no checkpoint.
    """
    checkpoint = run / "checkpoint.pt"
    if not checkpoint.exists():
        raise MissingWeightsError(f"{checkpoint} does not exist; run `mqbench standin train --out {run}` first")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    tokenizer = build_tokenizer()
    model = build_model(build_config(tokenizer), seed=0)
    model.load_state_dict(saved["model"])
    return TrainedRun(model, tokenizer, saved["settings"] | {"finished_steps": saved["step"]}, saved["curve"])


def text_channels_of(model: Qwen2VLForConditionalGeneration) -> int:
    """How many of down_proj's input channels training gives to text."""
    return model.config.text_config.intermediate_size // 3


def harden_and_export(run: Path, out: Path, hardness: Hardness) -> None:
    """Loads a training run, hardens it and writes a Hugging Face folder.

    Raises:
        MissingWeightsError: the run has no checkpoint.
    """
    trained = load_run(run)
    harden(trained.model, hardness, measured_batches(trained.tokenizer), text_channels_of(trained.model))
    settings = {"training": trained.settings, "hardness": asdict(hardness)}
    export(trained.model, trained.tokenizer, out, json.dumps(settings, indent=1))
