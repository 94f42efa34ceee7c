"""``standin-minicpm-v``: SigLIP over a picture in its own aspect ratio, a resampler of 24 queries, Qwen2."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mqbench.harness.models.minicpm_v import minicpm_v_layout
from mqbench.harness.models.slices import PROCESSOR_FILE, TERMINATORS, VISUAL_TOKEN
from mqbench.harness.models.standin import prompts
from mqbench.harness.models.standin.adapters import MINICPM_V
from mqbench.harness.models.standin.architecture import Size, decoder_arguments
from mqbench.harness.models.standin.family import StandIn
from mqbench.harness.models.standin.feed import adapter_feed
from mqbench.harness.models.standin.grid import VisualGrid
from mqbench.harness.models.standin.tokenizer import CHAT_TEMPLATE, ROLE_PHRASES, Dialect
from mqbench.harness.models.trees.minicpm_v import MiniCPMV, MiniCPMVConfig

QUERIES, PATCH_PX = VisualGrid(4, 6), 14
NUM_QUERIES = QUERIES.rows * QUERIES.columns
RULE = {
    "scale_resolution": 140,
    "max_slice_nums": 1,
    "patch_size": PATCH_PX,
    "norm_mean": [0.5] * 3,
    "norm_std": [0.5] * 3,
    "image_feature_size": NUM_QUERIES,
}
"""A picture of 168 x 112 stays as it is, 12 x 8 patches; larger ones (OCRBench's, which VLMEvalKit enlarges) shrink to
the same area."""

POSITIONS_PER_SIDE = 12
START, END = "<|im_start|>", TERMINATORS[0]
IMAGE_HEAD, IMAGE_TAIL = "<image_id>0</image_id><image>", "</image>\n"
DIALECT = Dialect(
    special=(*reversed(TERMINATORS), START, VISUAL_TOKEN),
    phrases=(*ROLE_PHRASES, IMAGE_HEAD, IMAGE_TAIL),
    eos_token=END,
    pad_token=TERMINATORS[1],
    settings={"chat_template": CHAT_TEMPLATE},
)


def _config(tokenizer: PreTrainedTokenizerFast, size: Size) -> MiniCPMVConfig:
    vision: dict[str, Any] = {
        "hidden_size": size.vision_width,
        "intermediate_size": 4 * size.vision_width,
        "num_hidden_layers": size.vision_depth,
        "num_attention_heads": size.vision_heads,
        "image_size": POSITIONS_PER_SIDE * PATCH_PX,
        "patch_size": PATCH_PX,
    }
    return MiniCPMVConfig(
        vision_config=vision,
        **decoder_arguments(tokenizer, size),
        query_num=NUM_QUERIES,
        resampler_head_dim=size.text_width // size.text_heads,
        image_token_id=tokenizer.convert_tokens_to_ids(VISUAL_TOKEN),
    )


def _save_processor(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    (directory / PROCESSOR_FILE).write_text(json.dumps(RULE, indent=1) + "\n", encoding="utf-8")


STANDIN = StandIn(
    name="minicpm-v",
    dialect=DIALECT,
    config=_config,
    model_class=lambda: MiniCPMV,
    layout=minicpm_v_layout,
    save_processor=_save_processor,
    feed=partial(adapter_feed, MINICPM_V, _save_processor, prompts.MINICPM_V),
    style=prompts.MINICPM_V,
    grid=QUERIES,
)
