"""Qwen2-VL: its layout (vision LayerNorm blocks, 2x2 merger, RMSNorm LLM), its inputs and its registered models."""

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
from mqbench.harness.models.decoding import greedy_answers, left_padded
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.native import check_model_type
from mqbench.harness.models.pixels import PixelLimits, fit_size, load_image
from mqbench.harness.models.towers import llm_tower
from mqbench.harness.models.weights import check_complete, check_finite_weights, find_folder, from_pretrained
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "qwen2_vl"
VISUAL = "model.visual"
TEXT = "model.language_model"
MERGER = f"{VISUAL}.merger"

ATTENTION = "sdpa"
"""Pinned: the attention backend changes scores, and AIFS needs one that takes a mask."""

TOKEN_PX = 28 * 28
VLMEVALKIT_LIMITS = PixelLimits(1280 * TOKEN_PX, 16384 * TOKEN_PX)
VLMEVALKIT_LIMITS_BY_DATASET = {"OCRBench": PixelLimits(100 * TOKEN_PX, 16384 * TOKEN_PX)}
"""VLMEvalKit's settings of the released checkpoints. OCRBench's crops are small and get a lower bound of their own."""

SHIPPED_WEIGHTS = Path(__file__).parent / "standin" / "weights"


def qwen2_vl_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``Qwen2VLForConditionalGeneration`` or of its config (transformers >= 4.52 module names)."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    vision = _vision_tower(config.vision_config)
    return Layout(
        family=FAMILY_NAME,
        text=text_tower(config.text_config),
        vision=vision,
        patch_embed=vision.entry[0],
        projector=(f"{MERGER}.mlp.0", f"{MERGER}.mlp.2"),
        unquantized=("lm_head",),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
    )


def _vision_tower(config: Any) -> Tower:
    width, heads = config.embed_dim, config.num_heads

    def block(index: int) -> Block:
        name = f"{VISUAL}.blocks.{index}"
        qkv = f"{name}.attn.qkv"
        return Block(
            name=name,
            attention_norm=Norm(f"{name}.norm1", (qkv,)),
            attention=Attention(qkv, (2 * width, 3 * width), f"{name}.attn.proj", width // heads, heads, heads),
            mlp_norm=Norm(f"{name}.norm2", (f"{name}.mlp.fc1",)),
            mlp_out=f"{name}.mlp.fc2",
        )

    return Tower(
        part=Part.VISION,
        hidden_size=width,
        norm_kind=NormKind.LAYERNORM,
        entry=(f"{VISUAL}.patch_embed.proj",),
        blocks=tuple(block(index) for index in range(config.depth)),
        final_norm=Norm(f"{MERGER}.ln_q", (f"{MERGER}.mlp.0",), chunks=config.spatial_merge_size**2),
    )


def text_tower(config: Any) -> Tower:
    """The LLM, from its ``text_config``; Qwen2.5-VL has the same."""
    return llm_tower(config, TEXT, writers=(f"{MERGER}.mlp.2",))


@dataclass(frozen=True)
class Qwen2VLAdapter:
    """One registered Qwen2-VL.

    Attributes:
        name: As users type it.
        paper_name: Its row in the paper's tables, or None.
        how_to_get: One line for users who lack the weights.
        repo_id: Its Hugging Face repository; None when it ships with the project.
        attn_implementation: The attention that it runs with.
        max_new_tokens: Longest answer in tokens, where benchmarks allow more; None for the benchmarks' own limit.
    """

    name: str
    paper_name: str | None
    how_to_get: str
    repo_id: str | None = None
    attn_implementation: str = ATTENTION
    max_new_tokens: int | None = None

    def find_weights(self, models_dir: Path | None) -> Path | None:
        """The shipped folder; or ``models_dir/NAME``; or the snapshot in the Hugging Face cache; or None."""
        return find_folder(self.name, self.repo_id, SHIPPED_WEIGHTS, models_dir)

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """Loads weights and processor from local files.

        Raises:
            MissingWeightsError: the folder holds another family, lacks a file or a weight, or a file cannot be read.
            NonFiniteError: a weight is NaN or Inf.
        """
        from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

        check_complete(path, self.how_to_get)
        check_model_type(path, FAMILY_NAME, self.how_to_get)
        model = from_pretrained(Qwen2VLForConditionalGeneration, path, dtype, ATTENTION, self.how_to_get)
        check_finite_weights(model)
        processor = Qwen2VLProcessor.from_pretrained(path, local_files_only=True)
        layout = qwen2_vl_layout(model)
        layout.check(model)
        return LoadedModel(self.name, model.to(device).eval().requires_grad_(False), processor, layout)

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; rows may hold any number of images.

        Args:
            loaded: From ``load``.
            messages: One per row. An item may name its benchmark under ``"dataset"``, for VLMEvalKit's pixel limits.
            answers: One per row; their tokens follow the prompts, as in decoding.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T); with images also ``mm_token_type_ids`` (B, T),
            ``pixel_values`` (patches, patch elements) and ``image_grid_thw`` (images, 3).

        Raises:
            DatasetError: an image cannot be read.
        """
        processor = loaded.processor
        conversations = [[{"role": "user", "content": _chat_content(message)}] for message in messages]
        prompts = processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        images = self._images(processor, messages)
        encoded = processor(text=prompts, images=images or None, padding=False, do_resize=False)
        rows = encoded["input_ids"]
        if answers is not None:
            tails = [processor.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
            rows = [row + tail for row, tail in zip(rows, tails, strict=True)]
        batch = left_padded(rows, processor.tokenizer.pad_token_id)
        if images:
            batch["mm_token_type_ids"] = torch.eq(batch["input_ids"], processor.image_token_id).int()
            batch |= {name: torch.as_tensor(encoded[name]) for name in ("pixel_values", "image_grid_thw")}
        device = next(loaded.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def generate(self, loaded: LoadedModel, batch: Batch, max_new_tokens: int) -> list[str]:
        """Greedy answers of one encoded batch, without special tokens."""
        tokenizer = loaded.processor.tokenizer
        return greedy_answers(loaded.model, tokenizer, batch, max_new_tokens, tokenizer.pad_token_id)

    def pixel_limits(self, processor: Any, dataset: str | None) -> PixelLimits:
        """VLMEvalKit's limits for a released checkpoint; the stand-in's own, whatever the benchmark."""
        if self.repo_id is not None:
            return VLMEVALKIT_LIMITS_BY_DATASET.get(dataset or "", VLMEVALKIT_LIMITS)
        size = processor.image_processor.size
        return PixelLimits(size["shortest_edge"], size["longest_edge"])

    def visual_tokens(self, processor: Any, height_px: int, width_px: int, dataset: str | None = None) -> int:
        """Visual tokens of one image of that size.

        Raises:
            DatasetError: one side is more than 200 times the other.
        """
        factor = processor.image_processor.patch_size * processor.image_processor.merge_size
        height, width = fit_size(height_px, width_px, factor, self.pixel_limits(processor, dataset))
        return height * width // factor**2

    def _images(self, processor: Any, messages: Sequence[Message]) -> list[Any]:
        factor = processor.image_processor.patch_size * processor.image_processor.merge_size
        return [
            load_image(item["value"], factor, self.pixel_limits(processor, item.get("dataset")))
            for message in messages
            for item in message
            if item["type"] == "image"
        ]


def _released(size: str, paper_name: str | None) -> Qwen2VLAdapter:
    name, repo_id = f"qwen2-vl-{size.lower()}", f"Qwen/Qwen2-VL-{size}-Instruct"
    how_to_get = (
        f"put {repo_id} (config, tokenizer, processor, safetensors) into MODELS_DIR/{name} and pass --models-dir"
    )
    return Qwen2VLAdapter(name, paper_name, how_to_get, repo_id)


ADAPTERS: tuple[Qwen2VLAdapter, ...] = (
    Qwen2VLAdapter(
        "standin-qwen2-vl",
        None,
        "ships with mqbench: reinstall it, or run 'mqbench standin train'",
        max_new_tokens=16,  # its longest reference answer has 5; a broken model never ends one
    ),
    _released("2B", None),
    _released("7B", "qwen2-vl-7b"),
    _released("72B", "qwen2-vl-72b"),
)


def _chat_content(message: Message) -> list[dict[str, str]]:
    """VLMEvalKit's items as the chat template wants them."""
    return [
        {"type": "text", "text": item["value"]} if item["type"] == "text" else {"type": "image"} for item in message
    ]


VISION_START_ID, VISION_END_ID, IMAGE_ID, VIDEO_ID = 151652, 151653, 151655, 151656
TINY_VISION_START_ID, TINY_VISION_END_ID, TINY_IMAGE_ID, TINY_VIDEO_ID = 60, 61, 62, 63
TINY_TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
TINY_VISION = MappingProxyType(
    {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 4, "patch_size": 4, "hidden_size": 48}
)
RELEASED_VISION = MappingProxyType({"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4})
ROPE = MappingProxyType({"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
TEXT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
RELEASED_TEXT: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "qwen2-vl-2b": (1536, 8960, 28, 12, 2, 151936),
        "qwen2-vl-7b": (3584, 18944, 28, 28, 4, 152064),
        "qwen2-vl-72b": (8192, 29568, 80, 64, 8, 152064),
    }
)
"""The LLMs of the released checkpoints' config.json."""
TIED = frozenset({"qwen2-vl-2b"})


def released_text(sizes: Sequence[int]) -> dict[str, Any]:
    """A ``text_config`` by ``TEXT_SIZES``; Qwen2.5-VL's has the same form."""
    return dict(zip(TEXT_SIZES, sizes, strict=True)) | {"rope_parameters": dict(ROPE)}


def visual_ids(*ids: int) -> dict[str, int]:
    """Ids of vision start, vision end, image and video as configs name them."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, ids, strict=True))


def tiny_inputs(model: Any, generator: torch.Generator, grid: tuple[int, int] = (4, 4)) -> Batch:
    """Left-padded rows with one, no and two images of ``grid`` patches; Qwen2.5-VL takes the same."""
    counts, (rows, columns), vision = (1, 0, 2), grid, model.config.vision_config
    tokens = rows * columns // vision.spatial_merge_size**2
    around = ((TINY_VISION_START_ID,), (TINY_VISION_END_ID,))
    batch = prompts(counts, tokens, TINY_IMAGE_ID, generator, around)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return batch | {
        "mm_token_type_ids": torch.eq(batch["input_ids"], TINY_IMAGE_ID).int(),
        "pixel_values": random_pixels(model, (sum(counts) * rows * columns, width), generator),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * sum(counts)),
    }


def _build(config: Any) -> nn.Module:
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration(config)


def _tiny_config() -> Any:
    from transformers import Qwen2VLConfig

    ids = visual_ids(TINY_VISION_START_ID, TINY_VISION_END_ID, TINY_IMAGE_ID, TINY_VIDEO_ID)
    config = Qwen2VLConfig(vision_config=dict(TINY_VISION), text_config=dict(TINY_TEXT), **ids)
    config._attn_implementation = ATTENTION
    return config


def _released_config(name: str) -> Any:
    from transformers import Qwen2VLConfig

    text = released_text(RELEASED_TEXT[name])
    vision = dict(RELEASED_VISION) | {"hidden_size": text["hidden_size"]}
    ids = visual_ids(VISION_START_ID, VISION_END_ID, IMAGE_ID, VIDEO_ID)
    return Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=name in TIED, **ids)


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=qwen2_vl_layout,
    tiny_config=_tiny_config,
    tiny_inputs=tiny_inputs,
    configs={name: partial(_released_config, name) for name in RELEASED_TEXT},
)
