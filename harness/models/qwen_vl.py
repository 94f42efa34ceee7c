"""Qwen-VL-Chat under the names of its released checkpoint: OpenCLIP's ViT-bigG (a norm in front of block 0, none behind
the last, queries, keys and values interleaved by head), a resampler of 256 queries, Qwen-7B."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.native import NativeAdapter, padded_batch
from mqbench.harness.models.one_image import TextProcessor, encode_plain, square_pixels
from mqbench.harness.models.pixels import open_rgb
from mqbench.harness.models.tiktoken_file import read_tokenizer
from mqbench.harness.models.towers import HEAD
from mqbench.harness.models.weights import CONFIG_FILE
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Reader, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "qwen_vl"
TEXT, VISUAL = "transformer", "transformer.visual"
RESAMPLER = f"{VISUAL}.attn_pool"
ATTENTION = f"{RESAMPLER}.attn"


def qwen_vl_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``trees.qwen_vl.QWenLMHeadModel`` or of its config."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    width, head_dim = config.visual["output_dim"], config.visual["head_dim"]
    heads = width // head_dim
    return Layout(
        family=FAMILY_NAME,
        text=_text_tower(config),
        vision=_vision_tower(config.visual),
        patch_embed=f"{VISUAL}.conv1",
        projector=(
            f"{RESAMPLER}.kv_proj",
            *(f"{ATTENTION}.{name}_proj" for name in ("q", "k", "v", "out")),
            f"{VISUAL}.proj",
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
    """Patches behind ln_kv and queries behind ln_q, which positions join on their way to keys and queries; answers.

    One table of positions joins both, so it is an entry of the first only: streams of one part and one width have one
    basis.
    """
    stream = partial(Tower, part=Part.PROJECTOR, hidden_size=width, norm_kind=NormKind.LAYERNORM, blocks=())
    keys_and_values = (Reader(f"{ATTENTION}.k_proj"), Reader(f"{ATTENTION}.v_proj"))
    return (
        stream(
            entry=(f"{RESAMPLER}.pos_embed",), final_norm=None, entry_norm=f"{RESAMPLER}.ln_kv", exits=keys_and_values
        ),
        stream(entry=(), final_norm=None, entry_norm=f"{RESAMPLER}.ln_q", exits=(Reader(f"{ATTENTION}.q_proj"),)),
        stream(entry=(f"{ATTENTION}.out_proj",), final_norm=Norm(f"{VISUAL}.ln_post", (f"{VISUAL}.proj",))),
    )


def _vision_tower(visual: Mapping[str, Any]) -> Tower:
    return Tower(
        part=Part.VISION,
        hidden_size=visual["width"],
        norm_kind=NormKind.LAYERNORM,
        entry=(),
        blocks=tuple(_vision_block(visual, index) for index in range(visual["layers"])),
        final_norm=None,
        entry_norm=f"{VISUAL}.ln_pre",
        exits=(Reader(f"{RESAMPLER}.kv_proj"),),
    )


def _vision_block(visual: Mapping[str, Any], index: int) -> Block:
    name, heads = f"{VISUAL}.transformer.resblocks.{index}", visual["heads"]
    head_dim = visual["width"] // heads
    fused = f"{name}.attn.in_proj"
    attention = Attention(
        fused, (2 * head_dim, 3 * head_dim), f"{name}.attn.out_proj", head_dim, heads, heads, value_period=3 * head_dim
    )
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.ln_1", (fused,)),
        attention=attention,
        mlp_norm=Norm(f"{name}.ln_2", (f"{name}.mlp.c_fc",)),
        mlp_out=f"{name}.mlp.c_proj",
    )


def _text_tower(config: Any) -> Tower:
    return Tower(
        part=Part.TEXT,
        hidden_size=config.hidden_size,
        norm_kind=NormKind.RMSNORM,
        entry=(f"{TEXT}.wte", f"{VISUAL}.proj"),
        blocks=tuple(_text_block(config, f"{TEXT}.h.{index}") for index in range(config.num_hidden_layers)),
        final_norm=Norm(f"{TEXT}.ln_f", (HEAD,)),
    )


def _text_block(config: Any, name: str) -> Block:
    heads, width = config.num_attention_heads, config.hidden_size
    fused, mlp = f"{name}.attn.c_attn", f"{name}.mlp"
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.ln_1", (fused,)),
        attention=Attention(fused, (2 * width, 3 * width), f"{name}.attn.c_proj", config.kv_channels, heads, heads),
        mlp_norm=Norm(f"{name}.ln_2", (f"{mlp}.w1", f"{mlp}.w2")),
        mlp_out=f"{mlp}.c_proj",
        mlp_up=f"{mlp}.w1",
    )


TOKEN_FILE = "qwen.tiktoken"
TOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of the released tokenization_qwen.py; the file itself holds only ranks."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (
    *(END_OF_TEXT, TURN_START, TURN_END),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
"""Their ids follow the ranks in this order."""

SYSTEM = "You are a helpful assistant."


class QwenVLAdapter(NativeAdapter):
    """Qwen-VL-Chat. Its tokenizer, remote code elsewhere, is read from its file."""

    model_type = "qwen"
    needed = ((CONFIG_FILE,), (TOKEN_FILE,))

    def model_class(self) -> Any:
        from mqbench.harness.models.trees.qwen_vl import QWenLMHeadModel

        return QWenLMHeadModel

    def load_processor(self, path: Path) -> TextProcessor:
        visual = self.model_class().config_class.from_pretrained(path, local_files_only=True).visual
        roles = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
        tokenizer = read_tokenizer(path / TOKEN_FILE, TOKEN_PATTERN, SPECIAL_TOKENS, self.how_to_get, **roles)
        return TextProcessor(tokenizer, visual["image_size"], visual["n_queries"])

    def layout(self, model: nn.Module) -> Layout:
        return qwen_vl_layout(model)

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """As ``NativeAdapter.load``; an answer ends where its turn does."""
        loaded = super().load(path, device, dtype)
        model: Any = loaded.model
        ends = [END_OF_TEXT, TURN_END, TURN_START]
        model.generation_config.eos_token_id = loaded.processor.tokenizer.convert_tokens_to_ids(ends)
        return loaded

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; rows may hold any number of images.

        Args:
            loaded: From ``load``.
            messages: One per row.
            answers: One per row; their tokens follow the prompts, as in decoding.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T); with images also ``pixel_values`` (images, 3, side, side).

        Raises:
            DatasetError: an image cannot be read.
        """
        rows = [_prompt_ids(loaded, message) for message in messages]
        paths = [item["value"] for message in messages for item in message if item["type"] == "image"]
        pixels = [square_pixels(open_rgb(path), loaded.processor.image_px) for path in paths]
        return padded_batch(loaded, rows, answers, torch.stack(pixels) if pixels else None)

    def visual_tokens(self, processor: Any, height_px: int = 1, width_px: int = 1, dataset: str | None = None) -> int:
        """Visual tokens of one image: the same for every size."""
        return processor.num_patches


def _prompt_ids(loaded: LoadedModel, message: Message) -> list[int]:
    """The conversation of the model's own ``chat``, which VLMEvalKit calls."""
    tokenizer = loaded.processor.tokenizer
    start, end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    line_end = encode_plain(tokenizer, "\n")

    def turn(role: str, content: list[int]) -> list[int]:
        return [start, *encode_plain(tokenizer, role), *line_end, *content]

    system, user = turn("system", encode_plain(tokenizer, SYSTEM)), turn("user", _content_ids(loaded, message))
    return [*system, end, *line_end, *user, end, *line_end, *turn("assistant", [])]


def _content_ids(loaded: LoadedModel, message: Message) -> list[int]:
    """Texts one behind the other; images numbered, each in a line of its own."""
    config: Any = loaded.model.config
    processor = loaded.processor
    image_start = config.visual["image_start_id"]
    image = [image_start, *[config.image_token_id] * processor.num_patches, image_start + 1]
    ids, text, num_images = list[int](), "", 0
    for item in message:
        if item["type"] == "text":
            text += unicodedata.normalize("NFC", item["value"])
            continue
        num_images += 1
        ids += [*encode_plain(processor.tokenizer, f"{text}Picture {num_images}: "), *image]
        text = "\n"
    return [*ids, *encode_plain(processor.tokenizer, text)]


ADAPTERS: tuple[QwenVLAdapter, ...] = (
    QwenVLAdapter(
        "qwen-vl-chat",
        "qwen-vl-chat",
        "put Qwen/Qwen-VL-Chat (config, qwen.tiktoken, weights) into MODELS_DIR/qwen-vl-chat and pass --models-dir",
        "Qwen/Qwen-VL-Chat",
    ),
)


# --- proofs without weights ------------------------------------------------------------------------------------------


def _build(config: Any) -> nn.Module:
    from mqbench.harness.models.trees.qwen_vl import QWenLMHeadModel

    return QWenLMHeadModel(config)


def _config(**fields: Any) -> Any:
    from mqbench.harness.models.trees.qwen_vl import QWenConfig

    config = QWenConfig(**fields)
    config._attn_implementation = "sdpa"
    return config


TINY_IMAGE_ID, TINY_START_ID, TINY_END_ID = 63, 61, 62
TINY_VISUAL: Mapping[str, Any] = MappingProxyType(
    {
        "heads": 2,
        "image_size": 16,
        "image_start_id": TINY_START_ID,
        "layers": 2,
        "mlp_ratio": 4.0,
        "output_dim": 48,
        "patch_size": 4,
        "width": 24,
        "n_queries": 4,
        "head_dim": 8,
    }
)
TINY = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "kv_channels": 8,
        "seq_length": 12,  # shorter than prompts: the angles of long ones, and log n, take part in every proof
        "image_token_id": TINY_IMAGE_ID,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
)


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    counts = (1, 0, 2)
    batch = prompts(counts, TINY_VISUAL["n_queries"], TINY_IMAGE_ID, generator, ((TINY_START_ID,), (TINY_END_ID,)))
    return batch | {"pixel_values": random_pixels(model, (sum(counts), 3, 16, 16), generator)}


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=qwen_vl_layout,
    tiny_config=lambda: _config(**TINY, visual=dict(TINY_VISUAL)),
    tiny_inputs=_tiny_inputs,
    configs={"qwen-vl-chat": _config},
)
