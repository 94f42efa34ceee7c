"""``standin-internvl``: InternViT over one square tile, pixel shuffle, Qwen2."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mqbench.harness.models.internvl import SYSTEM, internvl_layout
from mqbench.harness.models.standin import prompts
from mqbench.harness.models.standin.adapters import INTERNVL
from mqbench.harness.models.standin.architecture import Size, decoder_arguments
from mqbench.harness.models.standin.family import StandIn
from mqbench.harness.models.standin.feed import adapter_feed
from mqbench.harness.models.standin.grid import VisualGrid
from mqbench.harness.models.standin.tokenizer import Dialect

TILE_PX, PATCH_PX, MERGE = 168, 14, 2
TOKENS_PER_TILE = (TILE_PX // PATCH_PX // MERGE) ** 2
"""A picture is stretched to one tile of 36 visual tokens."""

IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
DIALECT = Dialect(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMES.values()),
    phrases=(f"system\n{SYSTEM}", "user\n", "assistant\n"),
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    settings={"extra_special_tokens": NAMES},
)


def _config(tokenizer: PreTrainedTokenizerFast, size: Size) -> InternVLConfig:
    image_id = tokenizer.convert_tokens_to_ids(NAMES["context_image_token"])
    vision = InternVLVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_depth,
        num_attention_heads=size.vision_heads,
        attention_bias=True,
        use_mean_pooling=True,
        use_qk_norm=False,
        image_size=(TILE_PX, TILE_PX),
        patch_size=(PATCH_PX, PATCH_PX),
        # Released towers start at 0.1, which nearly silences the branches of so shallow a one.
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(**decoder_arguments(tokenizer, size))
    ids = {"image_token_id": image_id, "image_seq_length": TOKENS_PER_TILE}
    return InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)


def _save_processor(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    size: dict[str, Any] = {"size": {"height": TILE_PX, "width": TILE_PX}, "max_patches": 1, **IMAGENET}
    images, videos = GotOcr2ImageProcessor(**size), InternVLVideoProcessor(size=size["size"], **IMAGENET)
    InternVLProcessor(images, tokenizer, videos, image_seq_length=TOKENS_PER_TILE).save_pretrained(directory)


STANDIN = StandIn(
    name="internvl",
    dialect=DIALECT,
    config=_config,
    model_class=lambda: InternVLForConditionalGeneration,
    layout=internvl_layout,
    save_processor=_save_processor,
    feed=partial(adapter_feed, INTERNVL, _save_processor, prompts.INTERNVL),
    style=prompts.INTERNVL,
    grid=VisualGrid(TILE_PX // PATCH_PX // MERGE, TILE_PX // PATCH_PX // MERGE),
)
