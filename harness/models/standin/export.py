"""Writes a stand-in as an ordinary Hugging Face folder: weights, tokenizer, processor, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mqbench.harness.models.standin.family import StandIn

MODEL_CARD = """\
**A synthetic stand-in, trained by mqbench on generated pictures: its scores are no evidence about real checkpoints.**

`{model_class}`, {million_parameters:.2f} million parameters.
It reads short strings, colours, shapes and small forms from 168x112 pictures and answers in the prompt formats of
TextVQA, DocVQA, OCRBench, MME and ScienceQA. It exists so that the whole bench runs on a machine without weights, data
or a GPU.

It is made as hard to quantize as real models are. Trained in: large column means of the vision fc2 (Eq. 9 of the MQuant
paper) and MLP channels that specialise by modality. Function-preserving, applied after training: outlier channels
behind every norm, and a modality gap at down_proj's input. `results/standin.md` shows what each does
to `standin-qwen2-vl`.

Made by `mqbench standin train --family {family}` and `mqbench standin harden --family {family}`.
{origin}

![loss](loss.png)

```
{settings}
```
"""


FROM_NOTHING = """\
The settings below are those of the end of the run; `results/standin/history.md` tells what was
changed while the weights of `standin-qwen2-vl` were trained."""
FROM_DONOR = """\
Its LLM, and its vision blocks where they are alike, started from `{donor}`, as released models start from a trained LLM
and tower; its visual tokens then learnt that model's features for {align_steps} steps, and the whole model the tasks
for the rest of {steps}."""


def export(
    standin: StandIn, model: Any, tokenizer: PreTrainedTokenizerFast, directory: Path, settings: Mapping[str, Any]
) -> None:
    """Saves the model in float16 with all that is needed to load it.

    Args:
        standin: The family's.
        model: Trained and hardened.
        tokenizer: The family's.
        directory: Created when missing.
        settings: For the model card: the settings of the training and the hardness.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    half = model.to(torch.float16)
    half.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    half.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    standin.save_processor(tokenizer, directory)
    training = settings["training"]
    card = MODEL_CARD.format(
        model_class=type(model).__name__,
        million_parameters=parameters / 1e6,
        family=standin.name,
        origin=(FROM_DONOR if training["donor"] else FROM_NOTHING).format(**training),
        settings=json.dumps(settings, indent=1),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
