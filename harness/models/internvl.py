"""InternVL (2.5, 3 and their native transformers classes): InternViT with LayerScale, pixel shuffle, one norm over the
four joined vectors, a two-layer projector; Qwen2, InternLM2 (as LLaMA) or LLaMA as LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.native import NativeAdapter, padded_batch
from mqbench.harness.models.tiles import load_tiles, num_tiles
from mqbench.harness.models.towers import HEAD, llm_tower
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "internvl"
VISUAL, TEXT = "model.vision_tower", "model.language_model"
PROJECTOR = "model.multi_modal_projector"


def internvl_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of an ``InternVLForConditionalGeneration`` or of its config.

    Raises:
        ValueError: the vision tower normalizes queries and keys, or behind its last block (InternViT-6B).
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    return Layout(
        family=FAMILY_NAME,
        text=llm_tower(config.text_config, TEXT, writers=(f"{PROJECTOR}.linear_2",)),
        vision=_vision_tower(config),
        patch_embed=f"{VISUAL}.embeddings.patch_embeddings.projection",
        projector=(f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"),
        unquantized=(HEAD,),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
    )


def _vision_tower(config: Any) -> Tower:
    vision = config.vision_config
    if vision.norm_type != "layer_norm" or not vision.use_mean_pooling:
        raise ValueError(f"the layout of '{FAMILY_NAME}' covers InternViT-300M, not this vision tower (InternViT-6B)")
    chunks = round(1 / config.downsample_ratio) ** 2
    embeddings = f"{VISUAL}.embeddings"
    entry = [f"{embeddings}.patch_embeddings.projection", f"{embeddings}.cls_token"]
    if vision.use_absolute_position_embeddings:
        entry.append(f"{embeddings}.position_embeddings")
    return Tower(
        part=Part.VISION,
        hidden_size=vision.hidden_size,
        norm_kind=NormKind.LAYERNORM,
        entry=tuple(entry),
        blocks=tuple(_vision_block(vision, index) for index in range(vision.num_hidden_layers)),
        final_norm=Norm(f"{PROJECTOR}.layer_norm", (f"{PROJECTOR}.linear_1",), chunks=chunks, joint=True),
    )


def _vision_block(config: Any, index: int) -> Block:
    name, heads = f"{VISUAL}.encoder.layer.{index}", config.num_attention_heads
    attention = f"{name}.attention"
    value = f"{attention}.v_proj"
    shape = (config.hidden_size // heads, heads, heads)
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.layernorm_before", (f"{attention}.q_proj", f"{attention}.k_proj", value)),
        attention=Attention(value, (0, config.hidden_size), f"{attention}.projection_layer", *shape),
        mlp_norm=Norm(f"{name}.layernorm_after", (f"{name}.mlp.fc1",)),
        mlp_out=f"{name}.mlp.fc2",
        attention_scale=f"{name}.lambda_1",
        mlp_scale=f"{name}.lambda_2",
    )


MAX_TILES = 6
MAX_TILES_BY_DATASET: Mapping[str, int] = MappingProxyType(
    {"ChartQA_TEST": 12, "DocVQA_VAL": 18, "DocVQA_TEST": 18, "InfoVQA_VAL": 24, "InfoVQA_TEST": 24, "OCRBench": 24}
)
MAX_TILES_OF_ROW = 64
"""VLMEvalKit's limits: per image, and for all images of a prompt."""

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
CHAT = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{{question}}<|im_end|>\n<|im_start|>assistant\n"
"""The conversation of the models' own ``chat``, which VLMEvalKit calls (template ``internvl2_5``)."""
END = "<|im_end|>"
MARK = "\0"
"""Stands for an image until its tokens do; no question holds it."""


@dataclass(frozen=True)
class InternVLAdapter(NativeAdapter):
    """One registered InternVL3 (-hf checkpoints)."""

    model_type = "internvl"

    def model_class(self) -> Any:
        from transformers import InternVLForConditionalGeneration

        return InternVLForConditionalGeneration

    def load_processor(self, path: Path) -> Any:
        from transformers import InternVLProcessor

        return InternVLProcessor.from_pretrained(path, local_files_only=True)

    def layout(self, model: nn.Module) -> Layout:
        return internvl_layout(model)

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """As ``NativeAdapter.load``; answers end where the conversation's turn does."""
        loaded = super().load(path, device, dtype)
        model: Any = loaded.model
        model.generation_config.eos_token_id = loaded.processor.tokenizer.convert_tokens_to_ids(END)
        return loaded

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; rows may hold any number of images.

        Images are cut into tiles as VLMEvalKit's wrapper does.

        Args:
            loaded: From ``load``.
            messages: One per row. An item may name its benchmark under ``"dataset"``, for VLMEvalKit's tile limits.
            answers: One per row; their tokens follow the prompts, as in decoding.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T); with images also ``pixel_values`` (tiles, 3, 448, 448).

        Raises:
            DatasetError: an image cannot be read.
        """
        processor = loaded.processor
        tiles = [self._tiles_of_row(processor.image_processor, message) for message in messages]
        prompts = [_prompt_ids(processor, *row) for row in zip(messages, tiles, strict=True)]
        flat = [tile for row in tiles for image in row for tile in image]
        pixels = None
        if flat:
            ready = {"do_resize": False, "crop_to_patches": False}
            pixels = processor.image_processor(flat, return_tensors="pt", **ready)["pixel_values"]
        return padded_batch(loaded, prompts, answers, pixels)

    def visual_tokens(self, processor: Any, height_px: int, width_px: int, dataset: str | None = None) -> int:
        """Visual tokens of one image of that size, alone in its prompt."""
        tiles = num_tiles(height_px, width_px, _tile_px(processor.image_processor), self.max_tiles(dataset, 1))
        return tiles * processor.image_seq_length

    def max_tiles(self, dataset: str | None, num_images: int) -> int:
        """Most tiles of one image, given its benchmark and how many images its prompt has; VLMEvalKit's limits."""
        return max_tiles(dataset, num_images)

    def _tiles_of_row(self, image_processor: Any, message: Message) -> list[list[Any]]:
        images = [item for item in message if item["type"] == "image"]
        side = _tile_px(image_processor)
        return [load_tiles(item["value"], side, self.max_tiles(item.get("dataset"), len(images))) for item in images]


def join_items(message: Message, image: str) -> str:
    """The text of a message in VLMEvalKit's form: one image stands in front, several are listed and numbered.

    Args:
        message: Its texts and images.
        image: What stands for an image.
    """
    texts = [item["value"] for item in message if item["type"] == "text"]
    count = len(message) - len(texts)
    if count == 1:
        return "\n".join([image, *texts])
    marks = [f"<Image-{number}>" for number in range(1, count + 1)]
    rest = iter(marks)
    text = "".join(item["value"] if item["type"] == "text" else next(rest) for item in message)
    listed = "".join(f"Image-{number}: {image}\n" for number in range(1, count + 1))
    # Marks in one go say nothing that the list does not; between texts they tell which image is meant.
    return listed + (text.replace("".join(marks), "") if marks else text)


def _prompt_ids(processor: Any, message: Message, images: Sequence[Sequence[Any]]) -> list[int]:
    before, *after = join_items(message, MARK).split(MARK)
    question = before
    for image, text in zip(images, after, strict=True):
        placeholders = processor.image_token * (processor.image_seq_length * len(image))
        question += f"{processor.start_image_token}{placeholders}{processor.end_image_token}{text}"
    return processor.tokenizer(CHAT.format(question=question))["input_ids"]


def max_tiles(dataset: str | None, num_images: int) -> int:
    """VLMEvalKit's limit of one image's tiles, given its benchmark and how many images its prompt has."""
    return max(1, min(MAX_TILES_BY_DATASET.get(dataset or "", MAX_TILES), MAX_TILES_OF_ROW // num_images))


def _tile_px(image_processor: Any) -> int:
    return image_processor.size["height"]


def _released(size: str) -> InternVLAdapter:
    name, repo_id = f"internvl3-{size.lower()}", f"OpenGVLab/InternVL3-{size}-hf"
    how_to_get = (
        f"put {repo_id} (config, tokenizer, processor, safetensors) into MODELS_DIR/{name} and pass --models-dir"
    )
    return InternVLAdapter(name, None, how_to_get, repo_id)


ADAPTERS: tuple[InternVLAdapter, ...] = (_released("1B"), _released("2B"), _released("8B"))


def _build(config: Any) -> nn.Module:
    from transformers import InternVLForConditionalGeneration

    return InternVLForConditionalGeneration(config)


def _config(vision: Mapping[str, Any], text: Mapping[str, Any], image_token_id: int) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, use_mean_pooling=True, use_qk_norm=False),
        text_config=Qwen2Config(**text),
        image_token_id=image_token_id,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    return config


TINY_VISION = MappingProxyType(
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": (32, 32),
        "patch_size": (8, 8),
    }
)
TINY_TEXT = MappingProxyType(
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
    }
)
TINY_IMAGE_ID = 63
INTERNVIT_300M = MappingProxyType(
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "attention_bias": True,
        "image_size": (448, 448),
        "patch_size": (14, 14),
    }
)
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
QWEN2: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "internvl3-1b": (896, 4864, 24, 14, 2),
        "internvl3-2b": (1536, 8960, 28, 12, 2),
        "internvl3-8b": (3584, 18944, 28, 28, 4),
    }
)
"""LLMs of the released checkpoints with InternViT-300M; embeddings and head are separate at every size."""
VOCABULARY = 151674
IMAGE_ID = 151667


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    counts = (1, 0, 2)
    batch = prompts(counts, 4, TINY_IMAGE_ID, generator)
    return batch | {"pixel_values": random_pixels(model, (sum(counts), 3, 32, 32), generator)}


def _released_config(name: str) -> Any:
    text = dict(zip(SIZES, QWEN2[name], strict=True)) | {"vocab_size": VOCABULARY}
    return _config(INTERNVIT_300M, text, IMAGE_ID)


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=internvl_layout,
    tiny_config=lambda: _config(TINY_VISION, TINY_TEXT, TINY_IMAGE_ID),
    tiny_inputs=_tiny_inputs,
    configs={name: partial(_released_config, name) for name in QWEN2},
)
