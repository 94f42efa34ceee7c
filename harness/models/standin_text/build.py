"""From a finished training run to the shipped folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mqbench.harness.errors import MissingWeightsError
from mqbench.harness.models.standin_text.architecture import build_config, build_model
from mqbench.harness.models.standin_text.harden import Hardness, harden
from mqbench.harness.models.standin_text.tokenizer import build_tokenizer
from mqbench.harness.models.standin_text.train import make_rows

MEASURED_ROWS = 16
CURVE_FILES = ("loss.csv", "loss.png")

MODEL_CARD = """\
**A synthetic stand-in, trained by mqbench on generated text: its perplexity is no evidence about real checkpoints.**

A `LlamaForCausalLM` of {million_parameters:.2f} million parameters, trained on an endless encyclopedia that a grammar
writes (`mqbench.harness.models.standin_text.corpus`). It exists so that perplexity can be measured on a machine without
weights, data or a GPU. The shipped WikiText-2 files are of the same grammar, from other random streams; nothing in them
was written by a person.

It is made as hard to quantize as real models are, without a change of what it computes: outlier channels behind every
norm, value heads of different ranges, large channels at down_proj's input, and down_proj columns whose signs point one
way. `loss.csv` and `loss.png` show the training: nats per token, also over held-out text.

What it has not learnt in so short a training: to repeat a name that stands earlier in the text (a new name costs 8.9
nats, the same name again 8.9). Damage to long-range attention, as by a coarse key/value cache, may show little here.

Made by `mqbench standin-text train` and `mqbench standin-text build`.

```
{settings}
```
"""


@dataclass(frozen=True)
class TrainedRun:
    """A training run: the model as it was trained, its tokenizer and settings."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    settings: dict[str, Any]


def load_run(run: Path) -> TrainedRun:
    """Loads the last checkpoint of a training run.

    Raises:
        MissingWeightsError: the run has no checkpoint.
    """
    checkpoint = run / "checkpoint.pt"
    if not checkpoint.exists():
        raise MissingWeightsError(f"{checkpoint} does not exist; run `mqbench standin-text train --out {run}` first")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    tokenizer = build_tokenizer()
    model = build_model(build_config(tokenizer), seed=0)
    model.load_state_dict(saved["model"])
    return TrainedRun(model.eval(), tokenizer, saved["settings"] | {"finished_steps": saved["step"]})


def harden_and_export(run: Path, out: Path, hardness: Hardness) -> None:
    """Loads a training run, hardens it and writes a Hugging Face folder in float16.

    Raises:
        MissingWeightsError: the run has no checkpoint.
    """
    trained = load_run(run)
    harden(trained.model, hardness, make_rows(trained.tokenizer, "harden", MEASURED_ROWS))
    settings = {"training": trained.settings, "hardness": asdict(hardness)}
    export(trained.model, trained.tokenizer, out, json.dumps(settings, indent=1))
    for name in CURVE_FILES:
        if (run / name).is_file():
            shutil.copy(run / name, out / name)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path, settings: str) -> None:
    """Saves the model in float16 with its tokenizer and model card.

    Args:
        model: Trained and hardened.
        tokenizer: From ``build_tokenizer``.
        directory: Created when missing.
        settings: Text for the model card.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    half = model.to(torch.float16)
    half.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    half.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    card = MODEL_CARD.format(million_parameters=parameters / 1e6, settings=settings)
    (directory / "README.md").write_text(card, encoding="utf-8")
