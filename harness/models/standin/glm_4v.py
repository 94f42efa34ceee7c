"""``standin-glm-4v``: a vision tower that normalizes behind its branches, a 2 x 2 convolution, a gated adapter,
ChatGLM."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mqbench.harness.models.glm_4v import AFTER, BEFORE, END, glm_4v_layout
from mqbench.harness.models.one_image import SHORT_ANSWER
from mqbench.harness.models.standin import prompts
from mqbench.harness.models.standin.adapters import GLM_4V
from mqbench.harness.models.standin.architecture import Size
from mqbench.harness.models.standin.family import StandIn
from mqbench.harness.models.standin.feed import adapter_feed
from mqbench.harness.models.standin.grid import VisualGrid
from mqbench.harness.models.standin.tokenizer import Dialect
from mqbench.harness.models.trees.glm_4v import ChatGLMConfig, ChatGLMForConditionalGeneration

SIDE_PX, PATCH_PX = 168, 14
"""A picture is stretched to a square of this side: 36 visual tokens."""

IMAGE_TOKENS = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
DIALECT = Dialect(
    special=(END, *BEFORE, AFTER, *IMAGE_TOKENS),
    phrases=(SHORT_ANSWER,),
    eos_token=END,
    pad_token=END,
)


def _config(tokenizer: PreTrainedTokenizerFast, size: Size) -> ChatGLMConfig:
    start_id, image_id, stop_id, end_id = tokenizer.convert_tokens_to_ids([*IMAGE_TOKENS, END])
    vision: dict[str, Any] = {
        "hidden_size": size.vision_width,
        "intermediate_size": 4 * size.vision_width,
        "num_hidden_layers": size.vision_depth,
        "num_heads": size.vision_heads,
        "image_size": SIDE_PX,
        "patch_size": PATCH_PX,
        "num_positions": (SIDE_PX // PATCH_PX) ** 2 + 1,
        # The released 8 fits its trained features; here visual tokens start as large as text tokens.
        "scaling_factor": 1.0,
    }
    return ChatGLMConfig(
        vision_config=vision,
        num_layers=size.text_depth,
        padded_vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        ffn_hidden_size=size.text_mlp,
        kv_channels=size.text_width // size.text_heads,
        num_attention_heads=size.text_heads,
        multi_query_group_num=size.text_kv_heads,
        layernorm_epsilon=1e-6,
        boi_token_id=start_id,
        eoi_token_id=stop_id,
        image_token_id=image_id,
        pad_token_id=end_id,
        eos_token_id=end_id,
    )


def _save_processor(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Config and tokenizer say it all."""


STANDIN = StandIn(
    name="glm-4v",
    dialect=DIALECT,
    config=_config,
    model_class=lambda: ChatGLMForConditionalGeneration,
    layout=glm_4v_layout,
    save_processor=_save_processor,
    feed=partial(adapter_feed, GLM_4V, _save_processor, prompts.DATASETS, answer_start=GLM_4V.answer_text("")),
    style=prompts.DATASETS,
    grid=VisualGrid(SIDE_PX // PATCH_PX // 2, SIDE_PX // PATCH_PX // 2),
)
