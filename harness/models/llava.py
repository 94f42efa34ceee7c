"""LLaVA-1.5: CLIP read one block before its end, without a norm, by a two-layer projector; LLaMA (Vicuna) as LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import nn

from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.native import NativeAdapter, padded_batch
from mqbench.harness.models.pixels import open_rgb, pad_to_square
from mqbench.harness.models.towers import HEAD, llm_tower
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Reader, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "llava"
VISUAL, TEXT = "model.vision_tower", "model.language_model"
PROJECTOR = "model.multi_modal_projector"


def llava_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``LlavaForConditionalGeneration`` or of its config.

    The blocks behind the layer that the projector reads run, but nobody sees their output: they stay as they are.

    Raises:
        ValueError: the config reads several layers.
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    vision = config.vision_config
    used = _blocks_used(config)
    unused = tuple(
        name for index in range(used, vision.num_hidden_layers) for name in _vision_block(vision, index).linears
    )
    return Layout(
        family=FAMILY_NAME,
        text=llm_tower(config.text_config, TEXT, writers=(f"{PROJECTOR}.linear_2",)),
        vision=_vision_tower(vision, used),
        patch_embed=f"{VISUAL}.embeddings.patch_embedding",
        projector=(f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"),
        unquantized=(HEAD, *unused),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
    )


def _blocks_used(config: Any) -> int:
    """Blocks in front of the hidden states that the projector reads; states 0 are the embeddings."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer is {layer}; the layout of '{FAMILY_NAME}' covers one layer only")
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def _vision_tower(config: Any, used: int) -> Tower:
    return Tower(
        part=Part.VISION,
        hidden_size=config.hidden_size,
        norm_kind=NormKind.LAYERNORM,
        entry=(),
        blocks=tuple(_vision_block(config, index) for index in range(used)),
        final_norm=None,
        entry_norm=f"{VISUAL}.pre_layrnorm",
        exits=(Reader(f"{PROJECTOR}.linear_1"),),
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


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
BEFORE, AFTER = f"{SYSTEM}USER: ", " ASSISTANT: "
"""VLMEvalKit's conversation, around the items of a message; an image is a placeholder between two spaces."""


@dataclass(frozen=True)
class LlavaAdapter(NativeAdapter):
    """One registered LLaVA-1.5 (llava-hf checkpoints)."""

    model_type = "llava"

    def model_class(self) -> Any:
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration

    def load_processor(self, path: Path) -> Any:
        from transformers import LlavaProcessor

        return LlavaProcessor.from_pretrained(path, local_files_only=True)

    def layout(self, model: nn.Module) -> Layout:
        return llava_layout(model)

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; rows may hold any number of images.

        An image is padded to a square with the mean colour and resized to 336 px, as VLMEvalKit's wrapper does.

        Args:
            loaded: From ``load``.
            messages: One per row.
            answers: One per row; their tokens follow the prompts, as in decoding.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T); with images also ``pixel_values`` (images, 3, 336, 336).

        Raises:
            DatasetError: an image cannot be read.
        """
        processor = loaded.processor
        prompts = [_prompt_ids(processor, message, self.visual_tokens(processor)) for message in messages]
        items = [item for message in messages for item in message if item["type"] == "image"]
        images = [_square(processor.image_processor, open_rgb(item["value"])) for item in items]
        pixels = None
        if images:
            ready = {"do_resize": False, "do_center_crop": False}
            pixels = processor.image_processor(images, return_tensors="pt", **ready)["pixel_values"]
        return padded_batch(loaded, prompts, answers, pixels)

    def visual_tokens(self, processor: Any, height_px: int = 1, width_px: int = 1, dataset: str | None = None) -> int:
        """Visual tokens of one image: the same for every size."""
        patch_px = processor.patch_size or CLIP_L_336["patch_size"]  # early checkpoints leave it out
        return (_side_px(processor.image_processor) // patch_px) ** 2


def _prompt_ids(processor: Any, message: Message, tokens_per_image: int) -> list[int]:
    """Pieces between images are tokenized on their own, as LLaVA does, and joined by placeholders."""
    pieces = [BEFORE]
    for item in message:
        if item["type"] == "image":
            pieces[-1] += " "
            pieces.append(" ")
        else:
            pieces[-1] += item["value"]
    pieces[-1] += AFTER
    tokenizer = processor.tokenizer
    first, *others = [tokenizer(piece)["input_ids"] for piece in pieces]
    begins = int(first[:1] == [tokenizer.bos_token_id])
    ids = list(first)
    for other in others:
        ids += [processor.image_token_id] * tokens_per_image + other[begins:]
    return ids


def _square(image_processor: Any, image: Image.Image) -> Image.Image:
    red, green, blue = (int(mean * 255) for mean in image_processor.image_mean)
    side = _side_px(image_processor)
    return pad_to_square(image, (red, green, blue)).resize((side, side), Image.Resampling.BICUBIC)


def _side_px(image_processor: Any) -> int:
    return image_processor.crop_size["height"]


def _released_adapter(size: str, paper_name: str | None) -> LlavaAdapter:
    name, repo_id = f"llava-1.5-{size}", f"llava-hf/llava-1.5-{size}-hf"
    how_to_get = (
        f"put {repo_id} (config, tokenizer, processor, safetensors) into MODELS_DIR/{name} and pass --models-dir"
    )
    return LlavaAdapter(name, paper_name, how_to_get, repo_id)


ADAPTERS: tuple[LlavaAdapter, ...] = (_released_adapter("7b", None), _released_adapter("13b", "llava-1.5-13b"))


def _build(config: Any) -> nn.Module:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(config)


def _config(vision: Mapping[str, Any], text: Mapping[str, Any], image_token_id: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_id=image_token_id,
        image_token_index=image_token_id,
    )
    config._attn_implementation = "sdpa"
    return config


TINY_VISION = MappingProxyType(
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
    }
)
TINY_TEXT = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
TINY_IMAGE_ID = 63
CLIP_L_336 = MappingProxyType(
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
)
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VICUNA: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"llava-1.5-7b": (4096, 11008, 32, 32), "llava-1.5-13b": (5120, 13824, 40, 40)}
)
"""LLMs of the released checkpoints (llava-hf); vocabulary with the image token and padding to a multiple of 64."""
VOCABULARY, IMAGE_ID = 32064, 32000


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    counts = (1, 0, 2)
    batch = prompts(counts, 4, TINY_IMAGE_ID, generator)
    return batch | {"pixel_values": random_pixels(model, (sum(counts), 3, 16, 16), generator)}


def _released(name: str) -> Any:
    text = dict(zip(SIZES, VICUNA[name], strict=True)) | {"vocab_size": VOCABULARY}
    return _config(CLIP_L_336, text, IMAGE_ID)


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=llava_layout,
    tiny_config=lambda: _config(TINY_VISION, TINY_TEXT, TINY_IMAGE_ID),
    tiny_inputs=_tiny_inputs,
    configs={name: partial(_released, name) for name in VICUNA},
)
