"""GLM-4V-9B: EVA2-CLIP-E normalized behind its branches, read by a 2 x 2 convolution without a norm; a gated adapter;
ChatGLM as LLM, with fused qkv and fused gate and up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.errors import MissingWeightsError
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.eva_clip import patch_embed, projector, vision_tower
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.one_image import OneImageAdapter, encode_plain
from mqbench.harness.models.tiktoken_file import read_tokenizer
from mqbench.harness.models.weights import CONFIG_FILE
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "glm_4v"
VISUAL, TEXT = "transformer.vision", "transformer.encoder"
EMBEDDING, HEAD = "transformer.embedding.word_embeddings", "transformer.output_layer"

TOKEN_FILE, TOKEN_CONFIG = "tokenizer.model", "tokenizer_config.json"
TOKEN_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Of the released tokenization_chatglm.py; the file itself holds only ranks."""

BEFORE, AFTER = ("[gMASK]", "<sop>", "<|user|>"), "<|assistant|>"
END = "<|endoftext|>"


def glm_4v_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``ChatGLMForConditionalGeneration`` (our module tree) or of its config."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    return Layout(
        family=FAMILY_NAME,
        text=_text_tower(config),
        vision=vision_tower(config.vision_config, VISUAL),
        patch_embed=patch_embed(VISUAL),
        projector=projector(VISUAL),
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
        entry=(EMBEDDING, f"{VISUAL}.boi", f"{VISUAL}.eoi", projector(VISUAL)[-1]),
        blocks=tuple(_block(config, index) for index in range(config.num_layers)),
        final_norm=Norm(f"{TEXT}.final_layernorm", (HEAD,)),
    )


def _block(config: Any, index: int) -> Block:
    name = f"{TEXT}.layers.{index}"
    attention, mlp = f"{name}.self_attention", f"{name}.mlp"
    heads, kv_heads, head_dim = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
    value, first = f"{attention}.query_key_value", (heads + kv_heads) * head_dim
    rows = first, first + kv_heads * head_dim
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.input_layernorm", (value,)),
        attention=Attention(value, rows, f"{attention}.dense", head_dim, heads, kv_heads),
        mlp_norm=Norm(f"{name}.post_attention_layernorm", (f"{mlp}.dense_h_to_4h",)),
        mlp_out=f"{mlp}.dense_4h_to_h",
    )


class GLM4VAdapter(OneImageAdapter):
    """GLM-4V-9B. Its tokenizer, remote code elsewhere, is read from its file."""

    model_type = "chatglm"
    needed = ((CONFIG_FILE,), (TOKEN_FILE,), (TOKEN_CONFIG,))

    def model_class(self) -> Any:
        from mqbench.harness.models.trees.glm_4v import ChatGLMForConditionalGeneration

        return ChatGLMForConditionalGeneration

    def load_tokenizer(self, path: Path) -> Any:
        special = _special_tokens(path / TOKEN_CONFIG, self.how_to_get)
        roles = {"eos_token": END, "pad_token": END}
        return read_tokenizer(path / TOKEN_FILE, TOKEN_PATTERN, special, self.how_to_get, **roles)

    def layout(self, model: nn.Module) -> Layout:
        return glm_4v_layout(model)

    def prompt_ids(self, loaded: LoadedModel, text: str, has_image: bool) -> list[int]:
        config: Any = loaded.model.config
        tokenizer = loaded.processor.tokenizer
        patches = [config.image_token_id] * loaded.processor.num_patches
        image = [config.boi_token_id, *patches, config.eoi_token_id] if has_image else []
        before, after = tokenizer.convert_tokens_to_ids(list(BEFORE)), tokenizer.convert_tokens_to_ids(AFTER)
        return [*before, *encode_plain(tokenizer, "\n"), *image, *encode_plain(tokenizer, text), after]

    def answer_text(self, answer: str) -> str:
        return f"\n{answer}"


def _special_tokens(file: Path, how_to_get: str) -> list[str]:
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))["added_tokens_decoder"]
        return [tokens[key]["content"] for key in sorted(tokens, key=int)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MissingWeightsError(f"'{file}' names no special tokens ({error!r}); {how_to_get}") from None


ADAPTERS: tuple[GLM4VAdapter, ...] = (
    GLM4VAdapter(
        "glm-4v-9b",
        "glm-4v-9b",
        "put THUDM/glm-4v-9b (config, tokenizer, safetensors) into MODELS_DIR/glm-4v-9b and pass --models-dir",
        "THUDM/glm-4v-9b",
    ),
)


def _build(config: Any) -> nn.Module:
    from mqbench.harness.models.trees.glm_4v import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration(config)


def _config(settings: Mapping[str, Any]) -> Any:
    from mqbench.harness.models.trees.glm_4v import ChatGLMConfig

    config = ChatGLMConfig(**settings)
    config._attn_implementation = "sdpa"
    return config


TINY_IMAGE_PX = 32
TINY = MappingProxyType(
    {
        "num_layers": 2,
        "padded_vocab_size": 64,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "kv_channels": 8,
        "num_attention_heads": 6,
        "multi_query_group_num": 2,
        "layernorm_epsilon": 1e-6,
        "boi_token_id": 61,
        "eoi_token_id": 62,
        "image_token_id": 63,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "vision_config": MappingProxyType(
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_heads": 2,
                "image_size": TINY_IMAGE_PX,
                "patch_size": 8,
                "num_positions": 17,
                "scaling_factor": 8,
            }
        ),
    }
)


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    config: Any = model.config
    counts = 1, 0, 2
    around = ((config.boi_token_id,), (config.eoi_token_id,))
    batch = prompts(counts, config.vision_config.num_patches, config.image_token_id, generator, around)
    pixels = random_pixels(model, (sum(counts), 3, TINY_IMAGE_PX, TINY_IMAGE_PX), generator)
    return batch | {"pixel_values": pixels}


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=glm_4v_layout,
    tiny_config=lambda: _config(TINY),
    tiny_inputs=_tiny_inputs,
    configs={"glm-4v-9b": lambda: _config({})},
)
