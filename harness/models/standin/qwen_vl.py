"""``standin-qwen-vl``: OpenCLIP's vision tower with interleaved values, a resampler of 36 queries, Qwen."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mqbench.harness.models.qwen_vl import END_OF_TEXT, SYSTEM, TURN_END, TURN_START, qwen_vl_layout
from mqbench.harness.models.standin import prompts
from mqbench.harness.models.standin.adapters import QWEN_VL
from mqbench.harness.models.standin.architecture import Size
from mqbench.harness.models.standin.family import StandIn
from mqbench.harness.models.standin.feed import adapter_feed
from mqbench.harness.models.standin.grid import VisualGrid
from mqbench.harness.models.standin.tokenizer import Dialect
from mqbench.harness.models.trees.qwen_vl import QWenConfig, QWenLMHeadModel

SIDE_PX, PATCH_PX, NUM_QUERIES = 168, 28, 36
"""A picture is stretched to a square of this side; the resampler reads its 36 patches with as many queries."""

ALIGN_STEPS = 1800
"""Behind 600 a third more of the features' variance was unexplained than MiniCPM-V's, whose resampler needs no rows
between the donor's, and the stand-in never learnt to read."""

IMAGE_TOKENS = ("<img>", "</img>", "<imgpad>")
"""The second follows the first: the config names only one of them."""

DIALECT = Dialect(
    special=(END_OF_TEXT, TURN_START, TURN_END, *IMAGE_TOKENS),
    phrases=(SYSTEM, "system", "user", "assistant", "Picture 1: "),
    eos_token=TURN_END,
    pad_token=END_OF_TEXT,
)


def _config(tokenizer: PreTrainedTokenizerFast, size: Size) -> QWenConfig:
    start_id, _, image_id = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    head_dim = size.text_width // size.text_heads
    visual: dict[str, Any] = {
        "heads": size.vision_heads,
        "image_size": SIDE_PX,
        "image_start_id": start_id,
        "layers": size.vision_depth,
        "mlp_ratio": 4.0,
        "output_dim": size.text_width,
        "patch_size": PATCH_PX,
        "width": size.vision_width,
        "n_queries": NUM_QUERIES,
        "head_dim": head_dim,
    }
    return QWenConfig(
        visual=visual,
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=2 * size.text_mlp,
        num_hidden_layers=size.text_depth,
        num_attention_heads=size.text_heads,
        kv_channels=head_dim,
        image_token_id=image_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _save_processor(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Config and tokenizer say it all."""


STANDIN = StandIn(
    name="qwen-vl",
    dialect=DIALECT,
    config=_config,
    model_class=lambda: QWenLMHeadModel,
    layout=qwen_vl_layout,
    save_processor=_save_processor,
    feed=partial(adapter_feed, QWEN_VL, _save_processor, prompts.DATASETS),
    style=prompts.DATASETS,
    grid=VisualGrid(math.isqrt(NUM_QUERIES), math.isqrt(NUM_QUERIES)),
    align_steps=ALIGN_STEPS,
)
