"""CogVLM2 (LLaMA-3, 19B): GLM-4V's vision tower, and an LLM with a visual expert. Every block has two sets of weights,
by modality, so each linear has one static scale: modality-specific quantization falls out of the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.eva_clip import patch_embed, projector, vision_tower
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.one_image import OneImageAdapter, encode_plain
from mqbench.harness.models.towers import HEAD
from mqbench.harness.models.weights import CONFIG_FILE
from mqbench.harness.quant.layout import Attention, Block, Layout, Modality, Norm, NormKind, Part, Path, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "cogvlm2"
VISUAL, TEXT = "model.vision", "model"

EXPERTS: Mapping[str, Modality] = MappingProxyType({"language": Modality.TEXT, "vision": Modality.VISUAL})
"""Prefixes of the experts' modules."""

PROMPT = "Question: {} Answer:"
"""The released code's, for ``template_version`` chat."""


def cogvlm2_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``CogVLMForCausalLM`` (our module tree) or of its config."""
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
        entry=(f"{TEXT}.embed_tokens", f"{VISUAL}.boi", f"{VISUAL}.eoi", projector(VISUAL)[-1]),
        blocks=tuple(_block(config, f"{TEXT}.layers.{index}") for index in range(config.num_hidden_layers)),
        final_norm=Norm(f"{TEXT}.norm", (HEAD,)),
    )


def _block(config: Any, name: str) -> Block:
    experts = tuple(_path(config, name, prefix, modality) for prefix, modality in EXPERTS.items())
    first = experts[0]
    attention_readers = tuple(reader for path in experts for reader in path.attention_readers)
    mlp_readers = tuple(reader for path in experts for reader in path.mlp_readers)
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.input_layernorm", attention_readers),
        attention=first.attention,
        mlp_norm=Norm(f"{name}.post_attention_layernorm", mlp_readers),
        mlp_out=first.mlp_out,
        mlp_up=first.mlp_up,
        experts=experts,
    )


def _path(config: Any, block: str, prefix: str, modality: Modality) -> Path:
    attention, mlp = f"{block}.self_attn.{prefix}_expert", f"{block}.mlp.{prefix}_mlp"
    heads, kv_heads = config.num_attention_heads, config.num_multi_query_heads
    head_dim = config.hidden_size // heads
    value, first = f"{attention}_query_key_value", (heads + kv_heads) * head_dim
    rows = first, first + kv_heads * head_dim
    return Path(
        attention_readers=(value,),
        attention=Attention(value, rows, f"{attention}_dense", head_dim, heads, kv_heads),
        mlp_readers=(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        mlp_out=f"{mlp}.down_proj",
        mlp_up=f"{mlp}.up_proj",
        modality=modality,
    )


class CogVLM2Adapter(OneImageAdapter):
    """CogVLM2 with LLaMA-3."""

    model_type = "cogvlm"
    needed = ((CONFIG_FILE,), ("tokenizer.json",))

    def model_class(self) -> Any:
        from mqbench.harness.models.trees.cogvlm2 import CogVLMForCausalLM

        return CogVLMForCausalLM

    def load_tokenizer(self, path: FilePath) -> Any:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        # The released code pads with the placeholder of visual tokens.
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def layout(self, model: nn.Module) -> Layout:
        return cogvlm2_layout(model)

    def prompt_ids(self, loaded: LoadedModel, text: str, has_image: bool) -> list[int]:
        config: Any = loaded.model.config
        tokenizer = loaded.processor.tokenizer
        visual = [config.image_token_id] * (1 + loaded.processor.num_patches)
        image = [*visual, config.eoi_token_id] if has_image else []
        return [tokenizer.bos_token_id, *image, *encode_plain(tokenizer, PROMPT.format(text))]


ADAPTERS: tuple[CogVLM2Adapter, ...] = (
    CogVLM2Adapter(
        "cogvlm2",
        None,
        "put THUDM/cogvlm2-llama3-chat-19B (config, tokenizer, safetensors) into MODELS_DIR/cogvlm2 and pass "
        "--models-dir",
        "THUDM/cogvlm2-llama3-chat-19B",
    ),
)


def _build(config: Any) -> nn.Module:
    from mqbench.harness.models.trees.cogvlm2 import CogVLMForCausalLM

    return CogVLMForCausalLM(config)


def _config(settings: Mapping[str, Any]) -> Any:
    from mqbench.harness.models.trees.cogvlm2 import CogVLMConfig

    config = CogVLMConfig(**settings)
    config._attn_implementation = "sdpa"
    return config


TINY_IMAGE_PX = 32
TINY = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_multi_query_heads": 2,
        "rms_norm_eps": 1e-6,
        "image_token_id": 62,
        "eoi_token_id": 63,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vision_config": MappingProxyType(
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_heads": 2,
                "image_size": TINY_IMAGE_PX,
                "patch_size": 8,
                "num_positions": 17,
            }
        ),
    }
)


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    config: Any = model.config
    counts, behind = (1, 0, 2), (config.eoi_token_id,)
    visual_tokens = 1 + config.vision_config.num_patches
    batch = prompts(counts, visual_tokens, config.image_token_id, generator, ((), behind))
    pixels = random_pixels(model, (sum(counts), 3, TINY_IMAGE_PX, TINY_IMAGE_PX), generator)
    return batch | {"pixel_values": pixels}


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=cogvlm2_layout,
    tiny_config=lambda: _config(TINY),
    tiny_inputs=_tiny_inputs,
    configs={"cogvlm2": lambda: _config({})},
)
