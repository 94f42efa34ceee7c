"""MiniCPM-V 2.6: SigLIP over slices of any aspect ratio, a resampler of 64 queries per slice, Qwen2 as LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.native import NativeAdapter, padded_batch
from mqbench.harness.models.slices import TERMINATORS, VISUAL_TOKEN, SliceProcessor, load_slice_processor, patch_strips
from mqbench.harness.models.towers import llm_tower
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Reader, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "minicpm_v"
VISUAL, RESAMPLER, TEXT, HEAD = "vpm", "resampler", "llm.model", "llm.lm_head"
ATTENTION = f"{RESAMPLER}.attn"


def minicpm_v_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``trees.minicpm_v.MiniCPMV`` or of its config."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    width, head_dim = config.hidden_size, config.resampler_head_dim
    heads = width // head_dim
    text = llm_tower(config, TEXT, writers=(f"{RESAMPLER}.proj",))
    return Layout(
        family=FAMILY_NAME,
        text=replace(text, final_norm=Norm(f"{TEXT}.norm", (HEAD,))),
        vision=_vision_tower(config),
        patch_embed=f"{VISUAL}.embeddings.patch_embedding",
        projector=(
            f"{RESAMPLER}.kv_proj",
            *(f"{ATTENTION}.{name}_proj" for name in ("q", "k", "v", "out")),
            f"{RESAMPLER}.proj",
        ),
        unquantized=(HEAD,),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
        resampler=_resampler_streams(width),
        cross_attentions=(
            Attention(f"{ATTENTION}.v_proj", (0, width), f"{ATTENTION}.out_proj", head_dim, heads, heads),
        ),
    )


def _resampler_streams(width: int) -> tuple[Tower, ...]:
    """Queries up to q_proj; patches behind ln_kv, where positions join them on their way to the keys; answers."""

    def stream(
        entry: tuple[str, ...], final: Norm | None, entry_norm: str | None = None, exits: tuple[Reader, ...] = ()
    ) -> Tower:
        return Tower(Part.PROJECTOR, width, NormKind.LAYERNORM, entry, (), final, entry_norm=entry_norm, exits=exits)

    return (
        stream((f"{RESAMPLER}.query",), Norm(f"{RESAMPLER}.ln_q", (f"{ATTENTION}.q_proj",))),
        stream(
            (f"{RESAMPLER}.row_positions", f"{RESAMPLER}.column_positions"),
            None,
            entry_norm=f"{RESAMPLER}.ln_kv",
            exits=(Reader(f"{ATTENTION}.k_proj"), Reader(f"{ATTENTION}.v_proj")),
        ),
        stream((f"{ATTENTION}.out_proj",), Norm(f"{RESAMPLER}.ln_post", (f"{RESAMPLER}.proj",))),
    )


def _vision_tower(config: Any) -> Tower:
    vision = config.vision_config
    num_blocks = vision.num_hidden_layers - config.drop_vision_last_layer
    return Tower(
        part=Part.VISION,
        hidden_size=vision.hidden_size,
        norm_kind=NormKind.LAYERNORM,
        entry=(f"{VISUAL}.embeddings.patch_embedding", f"{VISUAL}.embeddings.position_embedding"),
        blocks=tuple(_vision_block(vision, index) for index in range(num_blocks)),
        final_norm=Norm(f"{VISUAL}.post_layernorm", (f"{RESAMPLER}.kv_proj",)),
    )


def _vision_block(config: Any, index: int) -> Block:
    name, heads = f"{VISUAL}.encoder.layers.{index}", config.num_attention_heads
    attention = f"{name}.self_attn"
    value = f"{attention}.v_proj"
    shape = (config.hidden_size // heads, heads, heads)
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.layer_norm1", (f"{attention}.q_proj", f"{attention}.k_proj", value)),
        attention=Attention(value, (0, config.hidden_size), f"{attention}.out_proj", *shape),
        mlp_norm=Norm(f"{name}.layer_norm2", (f"{name}.mlp.fc1",)),
        mlp_out=f"{name}.mlp.fc2",
    )


# --- files and inputs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MiniCPMVAdapter(NativeAdapter):
    """One registered MiniCPM-V 2.6."""

    model_type = "minicpmv"

    def model_class(self) -> Any:
        from mqbench.harness.models.trees.minicpm_v import MiniCPMV

        return MiniCPMV

    def load_processor(self, path: Path) -> SliceProcessor:
        return load_slice_processor(path)

    def layout(self, model: nn.Module) -> Layout:
        return minicpm_v_layout(model)

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """As ``NativeAdapter.load``; the placeholder's id and the tokens that end an answer are the tokenizer's."""
        loaded = super().load(path, device, dtype)
        model: Any = loaded.model
        tokenizer = loaded.processor.tokenizer
        model.config.image_token_id = tokenizer.convert_tokens_to_ids(VISUAL_TOKEN)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(TERMINATORS))
        return replace(loaded, layout=minicpm_v_layout(model))

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; rows may hold any number of images.

        Args:
            loaded: From ``load``.
            messages: One per row. An item may name its benchmark under ``"dataset"``: VLMEvalKit enlarges some images.
            answers: One per row; their tokens follow the prompts, as in decoding.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T); with images also ``pixel_values`` (slices, 3, patch,
            longest * patch) and ``tgt_sizes`` (slices, 2), rows and columns of patches.

        Raises:
            DatasetError: an image cannot be read or is too narrow, or a prompt holds a placeholder of its own or is so
                long that it would lose one.
        """
        processor: SliceProcessor = loaded.processor
        images = [processor.images(message) for message in messages]
        rows = [processor.prompt_ids(*row) for row in zip(messages, images, strict=True)]
        batch = dict(padded_batch(loaded, rows, answers, None))
        pictures = [picture for row in images for image in row for picture in image.pictures]
        if pictures:
            device = batch["input_ids"].device
            pixels, sizes = patch_strips(pictures, processor.rule)
            batch |= {"pixel_values": pixels.to(device), "tgt_sizes": sizes.to(device)}
        return batch


ADAPTERS = (
    MiniCPMVAdapter(
        "minicpm-v-2.6",
        "minicpm-v-2.6",
        "put openbmb/MiniCPM-V-2_6 (config, tokenizer, preprocessor_config.json, safetensors) into "
        "MODELS_DIR/minicpm-v-2.6 and pass --models-dir",
        "openbmb/MiniCPM-V-2_6",
    ),
)


# --- proofs without weights ------------------------------------------------------------------------------------------


def _build(config: Any) -> nn.Module:
    from mqbench.harness.models.trees.minicpm_v import MiniCPMV

    return MiniCPMV(config)


def _config(sizes: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
    from mqbench.harness.models.trees.minicpm_v import MiniCPMVConfig

    config = MiniCPMVConfig(**sizes, vision_config=dict(vision))
    config._attn_implementation = "sdpa"
    return config


TINY_IMAGE_ID, TINY_START_ID, TINY_END_ID = 63, 62, 61
TINY_VISION = MappingProxyType(
    {
        "hidden_size": 24,
        "intermediate_size": 188,  # like 4304: a multiple of four without a known Hadamard matrix
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 20,
        "patch_size": 4,
    }
)
TINY_QUERIES = 4
TINY: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "query_num": TINY_QUERIES,
        "resampler_head_dim": 8,
        "image_token_id": TINY_IMAGE_ID,
    }
)
TINY_GRIDS = ((2, 3), (3, 4), (7, 1))
"""Rows and columns of patches of the tiny inputs' slices."""

SIGLIP_400M_980 = MappingProxyType(
    {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 980,
        "patch_size": 14,
    }
)
RELEASED = MappingProxyType(
    {
        "minicpm-v-2.6": {
            "vocab_size": 151666,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        }
    }
)


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    around = ((TINY_START_ID,), (TINY_END_ID,))
    batch = prompts((1, 0, 2), TINY_QUERIES, TINY_IMAGE_ID, generator, around)
    longest, side = max(rows * columns for rows, columns in TINY_GRIDS), TINY_VISION["patch_size"]
    return batch | {
        "pixel_values": random_pixels(model, (len(TINY_GRIDS), 3, side, longest * side), generator),
        "tgt_sizes": torch.tensor(TINY_GRIDS),
    }


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=minicpm_v_layout,
    tiny_config=lambda: _config(TINY, TINY_VISION),
    tiny_inputs=_tiny_inputs,
    configs={name: partial(_config, sizes, SIGLIP_400M_980) for name, sizes in RELEASED.items()},
)
