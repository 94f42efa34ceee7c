"""Qwen2.5-VL: Qwen2-VL with RMSNorms, gated MLPs (with biases) and windows of attention in its vision tower.

The windows only order the patches and mask attention: no linear notices them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.family import Family
from mqbench.harness.models.native import check_model_type
from mqbench.harness.models.qwen2_vl import (
    ATTENTION,
    IMAGE_ID,
    MERGER,
    TEXT,
    TINY_IMAGE_ID,
    TINY_TEXT,
    TINY_VIDEO_ID,
    TINY_VISION_END_ID,
    TINY_VISION_START_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    VISUAL,
    Qwen2VLAdapter,
    released_text,
    text_tower,
    tiny_inputs,
    visual_ids,
)
from mqbench.harness.models.towers import HEAD
from mqbench.harness.models.weights import check_complete, check_finite_weights, from_pretrained
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Tower

FAMILY_NAME = "qwen2_5_vl"


def qwen2_5_vl_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``Qwen2_5_VLForConditionalGeneration`` or of its config."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    vision = _vision_tower(config.vision_config)
    return Layout(
        family=FAMILY_NAME,
        text=text_tower(config.text_config),
        vision=vision,
        patch_embed=vision.entry[0],
        projector=(f"{MERGER}.mlp.0", f"{MERGER}.mlp.2"),
        unquantized=(HEAD,),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
    )


def _vision_tower(config: Any) -> Tower:
    return Tower(
        part=Part.VISION,
        hidden_size=config.hidden_size,
        norm_kind=NormKind.RMSNORM,
        entry=(f"{VISUAL}.patch_embed.proj",),
        blocks=tuple(_vision_block(f"{VISUAL}.blocks.{index}", config) for index in range(config.depth)),
        final_norm=Norm(f"{MERGER}.ln_q", (f"{MERGER}.mlp.0",), chunks=config.spatial_merge_size**2),
    )


def _vision_block(name: str, config: Any) -> Block:
    width, heads, qkv, mlp = config.hidden_size, config.num_heads, f"{name}.attn.qkv", f"{name}.mlp"
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.norm1", (qkv,)),
        attention=Attention(qkv, (2 * width, 3 * width), f"{name}.attn.proj", width // heads, heads, heads),
        mlp_norm=Norm(f"{name}.norm2", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
        mlp_out=f"{mlp}.down_proj",
        mlp_up=f"{mlp}.up_proj",
    )


@dataclass(frozen=True)
class Qwen25VLAdapter(Qwen2VLAdapter):
    """One registered Qwen2.5-VL: inputs, pixel limits and decoding are Qwen2-VL's."""

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """Loads weights and processor from local files.

        Raises:
            MissingWeightsError: the folder holds another family, lacks a file or a weight, or a file cannot be read.
            NonFiniteError: a weight is NaN or Inf.
        """
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

        check_complete(path, self.how_to_get)
        check_model_type(path, FAMILY_NAME, self.how_to_get)
        model = from_pretrained(Qwen2_5_VLForConditionalGeneration, path, dtype, ATTENTION, self.how_to_get)
        check_finite_weights(model)
        processor = Qwen2_5_VLProcessor.from_pretrained(path, local_files_only=True)
        layout = qwen2_5_vl_layout(model)
        layout.check(model)
        return LoadedModel(self.name, model.to(device).eval().requires_grad_(False), processor, layout)


def _released(size: str) -> Qwen25VLAdapter:
    name, repo_id = f"qwen2.5-vl-{size.lower()}", f"Qwen/Qwen2.5-VL-{size}-Instruct"
    how_to_get = (
        f"put {repo_id} (config, tokenizer, processor, safetensors) into MODELS_DIR/{name} and pass --models-dir"
    )
    return Qwen25VLAdapter(name, None, how_to_get, repo_id)


ADAPTERS: tuple[Qwen25VLAdapter, ...] = (_released("3B"), _released("7B"), _released("72B"))

TINY_VISION: Mapping[str, Any] = MappingProxyType(
    {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
    }
)
TINY_GRID = (8, 8)
"""Patches of an image: four windows of two by two visual tokens."""
RELEASED: Mapping[str, tuple[int, tuple[int, ...]]] = MappingProxyType(
    {
        "qwen2.5-vl-3b": (3420, (2048, 11008, 36, 16, 2, 151936)),
        "qwen2.5-vl-7b": (3420, (3584, 18944, 28, 28, 4, 152064)),
        "qwen2.5-vl-72b": (3456, (8192, 29568, 80, 64, 8, 152064)),
    }
)
"""Width of the vision MLP and the LLM of the released checkpoints' config.json."""
TIED = frozenset({"qwen2.5-vl-3b"})


def _build(config: Any) -> nn.Module:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(config)


def _tiny_config() -> Any:
    from transformers import Qwen2_5_VLConfig

    ids = visual_ids(TINY_VISION_START_ID, TINY_VISION_END_ID, TINY_IMAGE_ID, TINY_VIDEO_ID)
    config = Qwen2_5_VLConfig(vision_config=dict(TINY_VISION), text_config=dict(TINY_TEXT), **ids)
    config._attn_implementation = ATTENTION
    return config


def _released_config(name: str) -> Any:
    from transformers import Qwen2_5_VLConfig

    mlp_width, sizes = RELEASED[name]
    text = released_text(sizes)
    vision = {"hidden_size": 1280, "intermediate_size": mlp_width, "out_hidden_size": text["hidden_size"]}
    ids = visual_ids(VISION_START_ID, VISION_END_ID, IMAGE_ID, VIDEO_ID)
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=name in TIED, **ids)


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=qwen2_5_vl_layout,
    tiny_config=_tiny_config,
    tiny_inputs=partial(tiny_inputs, grid=TINY_GRID),
    configs={name: partial(_released_config, name) for name in RELEASED},
)
