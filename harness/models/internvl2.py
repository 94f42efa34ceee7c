"""InternVL2 under the names of its released checkpoints: InternViT-300M with LayerScale, pixel shuffle, one norm over
the four joined vectors, a two-layer projector, InternLM2 with interleaved queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.internvl import END, MARK, join_items, max_tiles
from mqbench.harness.models.native import NativeAdapter, padded_batch
from mqbench.harness.models.sentencepiece_file import CONFIG_FILE as TOKENIZER_CONFIG
from mqbench.harness.models.sentencepiece_file import MODEL_FILE, SentencePieceTokenizer
from mqbench.harness.models.tiles import load_tiles, num_tiles
from mqbench.harness.models.weights import CONFIG_FILE
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "internvl2"
VISUAL, PROJECTOR = "vision_model", "mlp1"
TEXT, HEAD = "language_model.model", "language_model.output"


def internvl2_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``trees.internvl2.InternVLChatModel`` or of its config."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    return Layout(
        family=FAMILY_NAME,
        text=_text_tower(config.llm_config),
        vision=_vision_tower(config),
        patch_embed=f"{VISUAL}.embeddings.patch_embedding",
        projector=(f"{PROJECTOR}.1", f"{PROJECTOR}.3"),
        unquantized=(HEAD,),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
    )


def _text_tower(config: Any) -> Tower:
    return Tower(
        part=Part.TEXT,
        hidden_size=config.hidden_size,
        norm_kind=NormKind.RMSNORM,
        entry=(f"{TEXT}.tok_embeddings", f"{PROJECTOR}.3"),
        blocks=tuple(_text_block(config, f"{TEXT}.layers.{index}") for index in range(config.num_hidden_layers)),
        final_norm=Norm(f"{TEXT}.norm", (HEAD,)),
    )


def _text_block(config: Any, name: str) -> Block:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // heads
    fused, mlp = f"{name}.attention.wqkv", f"{name}.feed_forward"
    period = (heads // kv_heads + 2) * head_dim  # a group's queries, its key, its value
    attention = Attention(
        fused, (period - head_dim, period), f"{name}.attention.wo", head_dim, heads, kv_heads, value_period=period
    )
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.attention_norm", (fused,)),
        attention=attention,
        mlp_norm=Norm(f"{name}.ffn_norm", (f"{mlp}.w1", f"{mlp}.w3")),
        mlp_out=f"{mlp}.w2",
        mlp_up=f"{mlp}.w3",
    )


def _vision_tower(config: Any) -> Tower:
    vision, embeddings = config.vision_config, f"{VISUAL}.embeddings"
    written = ("patch_embedding", "class_embedding", "position_embedding")
    chunks = round(1 / config.downsample_ratio) ** 2
    return Tower(
        part=Part.VISION,
        hidden_size=vision.hidden_size,
        norm_kind=NormKind.LAYERNORM,
        entry=tuple(f"{embeddings}.{name}" for name in written),
        blocks=tuple(_vision_block(vision, index) for index in range(vision.num_hidden_layers)),
        final_norm=Norm(f"{PROJECTOR}.0", (f"{PROJECTOR}.1",), chunks=chunks, joint=True),
    )


def _vision_block(config: Any, index: int) -> Block:
    name, heads, width = f"{VISUAL}.encoder.layers.{index}", config.num_attention_heads, config.hidden_size
    qkv = f"{name}.attn.qkv"
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.norm1", (qkv,)),
        attention=Attention(qkv, (2 * width, 3 * width), f"{name}.attn.proj", width // heads, heads, heads),
        mlp_norm=Norm(f"{name}.norm2", (f"{name}.mlp.fc1",)),
        mlp_out=f"{name}.mlp.fc2",
        attention_scale=f"{name}.ls1",
        mlp_scale=f"{name}.ls2",
    )


SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
CHAT = f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n{{question}}<|im_end|><|im_start|>assistant\n"
"""The conversation of the models' own ``chat``, which VLMEvalKit calls (template ``internlm2-chat``)."""
START, PLACEHOLDER, STOP = "<img>", "<IMG_CONTEXT>", "</img>"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TileProcessor:
    """What the released processor, which is remote code, knows.

    Attributes:
        tokenizer: InternLM2's with a few more tokens.
        tile_px: Side of a tile.
        tokens_per_tile: Visual tokens.
    """

    tokenizer: SentencePieceTokenizer
    tile_px: int
    tokens_per_tile: int

    def prompt_ids(self, message: Message, tile_counts: Sequence[int]) -> list[int]:
        """Token ids of a prompt, given the number of tiles of each of its images."""
        question, *texts = join_items(message, MARK).split(MARK)
        for count, text in zip(tile_counts, texts, strict=True):
            question += f"{START}{PLACEHOLDER * (self.tokens_per_tile * count)}{STOP}{text}"
        return self.tokenizer(CHAT.format(question=question))["input_ids"]


class InternVL2Adapter(NativeAdapter):
    """InternVL2 with InternLM2. Its tokenizer, remote code elsewhere, is read from its file."""

    model_type = "internvl_chat"
    needed = ((CONFIG_FILE,), (MODEL_FILE,), (TOKENIZER_CONFIG,))

    def model_class(self) -> Any:
        from mqbench.harness.models.trees.internvl2 import InternVLChatModel

        return InternVLChatModel

    def load_processor(self, path: Path) -> TileProcessor:
        config = self.model_class().config_class.from_pretrained(path, local_files_only=True)
        tile_px = config.vision_config.image_size
        side = round(tile_px // config.vision_config.patch_size * config.downsample_ratio)
        return TileProcessor(SentencePieceTokenizer(path, self.how_to_get), tile_px, side**2)

    def layout(self, model: nn.Module) -> Layout:
        return internvl2_layout(model)

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """As ``NativeAdapter.load``; the placeholder's id and the token that ends an answer are the tokenizer's."""
        loaded = super().load(path, device, dtype)
        model: Any = loaded.model
        model.config.image_token_id = loaded.processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        model.generation_config.eos_token_id = loaded.processor.tokenizer.convert_tokens_to_ids(END)
        return replace(loaded, layout=internvl2_layout(model))

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; rows may hold any number of images.

        Images are cut into tiles as VLMEvalKit's wrapper does.

        Args:
            loaded: From ``load``.
            messages: One per row. An item may name its benchmark under ``"dataset"``, for VLMEvalKit's tile limits.
            answers: One per row; their tokens follow the prompts, as in decoding.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T); with images also ``pixel_values`` (tiles, 3, side, side).

        Raises:
            DatasetError: an image cannot be read.
        """
        processor: TileProcessor = loaded.processor
        images = [_tiles_of_row(processor, message) for message in messages]
        rows = [
            processor.prompt_ids(message, [len(tiles) for tiles in row])
            for message, row in zip(messages, images, strict=True)
        ]
        pixels = [_normalized(tile) for row in images for tiles in row for tile in tiles]
        return padded_batch(loaded, rows, answers, torch.stack(pixels) if pixels else None)

    def visual_tokens(self, processor: Any, height_px: int, width_px: int, dataset: str | None = None) -> int:
        """Visual tokens of one image of that size, alone in its prompt."""
        return num_tiles(height_px, width_px, processor.tile_px, max_tiles(dataset, 1)) * processor.tokens_per_tile


def _tiles_of_row(processor: TileProcessor, message: Message) -> list[list[Image.Image]]:
    items = [item for item in message if item["type"] == "image"]
    limits = [max_tiles(item.get("dataset"), len(items)) for item in items]
    return [load_tiles(item["value"], processor.tile_px, limit) for item, limit in zip(items, limits, strict=True)]


def _normalized(tile: Image.Image) -> Tensor:
    """(3, side, side) float32."""
    pixels = torch.from_numpy(np.array(tile, dtype=np.float32)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


ADAPTERS: tuple[InternVL2Adapter, ...] = (
    InternVL2Adapter(
        "internvl2-8b",
        "internvl2-8b",
        "put OpenGVLab/InternVL2-8B (config, tokenizer.model, tokenizer_config.json, safetensors) into "
        "MODELS_DIR/internvl2-8b and pass --models-dir",
        "OpenGVLab/InternVL2-8B",
    ),
)


# --- proofs without weights ------------------------------------------------------------------------------------------


def _build(config: Any) -> nn.Module:
    from mqbench.harness.models.trees.internvl2 import InternVLChatModel

    return InternVLChatModel(config)


def _config(vision: Mapping[str, Any], llm: Mapping[str, Any], **fields: Any) -> Any:
    from mqbench.harness.models.trees.internvl2 import InternVLChatConfig

    config = InternVLChatConfig(vision_config=dict(vision), llm_config=dict(llm), **fields)
    config._attn_implementation = "sdpa"
    return config


TINY_VISION = MappingProxyType(
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
)
TINY_LLM = MappingProxyType(
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
TINY_IMAGE_ID, TINY_START_ID, TINY_END_ID = 63, 62, 61
INTERNVIT_300M = MappingProxyType(
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
)
INTERNLM2_7B = MappingProxyType(
    {
        "vocab_size": 92553,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "pad_token_id": 2,
    }
)


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    counts = (1, 0, 2)
    batch = prompts(counts, 4, TINY_IMAGE_ID, generator, ((TINY_START_ID,), (TINY_END_ID,)))
    return batch | {"pixel_values": random_pixels(model, (sum(counts), 3, 32, 32), generator)}


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=internvl2_layout,
    tiny_config=partial(_config, TINY_VISION, TINY_LLM, image_token_id=TINY_IMAGE_ID),
    tiny_inputs=_tiny_inputs,
    configs={"internvl2-8b": partial(_config, INTERNVIT_300M, INTERNLM2_7B)},
)
