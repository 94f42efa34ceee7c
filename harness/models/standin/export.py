"""Writes the stand-in as an ordinary Hugging Face folder: weights, tokenizer, processor, chat template, model card."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from mqbench.harness.models.standin.architecture import MERGE, PATCH_PX
from mqbench.harness.models.standin.tokenizer import CHAT_TEMPLATE

TOKEN_PX = (PATCH_PX * MERGE) ** 2
MIN_PIXELS, MAX_PIXELS = 4 * TOKEN_PX, 64 * TOKEN_PX
"""The stand-in's own limits: an image is 4 to 64 visual tokens (the shipped ones 24)."""

MODEL_CARD = """\
**A synthetic stand-in, trained by mqbench on generated pictures: its scores are no evidence about real checkpoints.**

A `Qwen2VLForConditionalGeneration` of {million_parameters:.2f} million parameters that reads short strings, colours,
shapes and small forms from 168x112 pictures and answers in the prompt formats of TextVQA, DocVQA, OCRBench, MME and
ScienceQA. It exists so that the whole bench runs on a machine without weights, data or a GPU.

It is made as hard to quantize as real models are. Trained in: large column means of the vision fc2 (Eq. 9 of the MQuant
paper) and MLP channels that specialise by modality. Function-preserving, applied after training: outlier channels
behind every norm, and a modality gap at down_proj's input. `results/standin.md` shows what each does.

Made by `mqbench standin train`. The settings below are those of the end of the run; `results/standin/history.md` tells
what was changed while the shipped weights were trained.

```
{settings}
```
"""


def export(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, directory: Path, settings: str
) -> None:
    """Saves the model in float16 with all that is needed to load it.

    Args:
        model: Trained and hardened.
        tokenizer: From ``build_tokenizer``.
        directory: Created when missing.
        settings: Text for the model card: the training settings and the hardness.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    half = model.to(torch.float16)
    half.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    half.save_pretrained(directory)
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    common = {
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": size,
    }
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        video_processor=Qwen2VLVideoProcessor(**common),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(directory)
    card = MODEL_CARD.format(million_parameters=parameters / 1e6, settings=settings)
    (directory / "README.md").write_text(card, encoding="utf-8")
