"""``standin-llava``: CLIP over 6 x 6 patches of a padded square, LLaMA with grouped queries."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mqbench.harness.models.llava import AFTER, BEFORE, llava_layout
from mqbench.harness.models.standin import prompts
from mqbench.harness.models.standin.adapters import LLAVA
from mqbench.harness.models.standin.architecture import Size, decoder_arguments
from mqbench.harness.models.standin.family import StandIn
from mqbench.harness.models.standin.feed import adapter_feed
from mqbench.harness.models.standin.grid import VisualGrid
from mqbench.harness.models.standin.render import HEIGHT_PX
from mqbench.harness.models.standin.tokenizer import Dialect

SIDE_PX, PATCH_PX = 168, 28
"""A picture is padded to a square of this side: 36 visual tokens."""

IMAGE_TOKEN = "<image>"
DIALECT = Dialect(
    special=("<pad>", "</s>", IMAGE_TOKEN),
    phrases=(BEFORE, AFTER),
    eos_token="</s>",
    pad_token="<pad>",
)


def _config(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlavaConfig:
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        # The projector reads the states in front of the last block, as in released checkpoints.
        num_hidden_layers=size.vision_depth + 1,
        num_attention_heads=size.vision_heads,
        image_size=SIDE_PX,
        patch_size=PATCH_PX,
        projection_dim=size.vision_width,
    )
    text = LlamaConfig(**decoder_arguments(tokenizer, size))
    ids = {"image_token_id": image_id, "image_token_index": image_id}
    return LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)


def _save_processor(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    side = {"height": SIDE_PX, "width": SIDE_PX}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size=side)
    strategy: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, patch_size=PATCH_PX, image_token=IMAGE_TOKEN, **strategy).save_pretrained(
        directory
    )


STANDIN = StandIn(
    name="llava",
    dialect=DIALECT,
    config=_config,
    model_class=lambda: LlavaForConditionalGeneration,
    layout=llava_layout,
    save_processor=_save_processor,
    feed=partial(adapter_feed, LLAVA, _save_processor, prompts.LLAVA),
    style=prompts.LLAVA,
    grid=VisualGrid(SIDE_PX // PATCH_PX, SIDE_PX // PATCH_PX, margin_px=(SIDE_PX - HEIGHT_PX) // 2),
)
