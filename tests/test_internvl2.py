"""InternVL2's module tree: the released names and sizes, transformers' native InternVL as oracle, loading, decoding."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, LlamaConfig

from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.family import tiny_model
from mqbench.harness.models.internvl2 import FAMILY, TINY_IMAGE_ID, TINY_LLM, TINY_VISION
from mqbench.harness.models.trees.internvl2 import InternVLChatConfig, InternVLChatModel, pixel_shuffle
from mqbench.harness.models.weights import from_pretrained
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.serialize import load_quantized, save_quantized
from mqbench.mquant.mquant import METHOD as MQUANT

CHECKPOINT_BYTES = 16150730752
"""``total_size`` of the released safetensors index, two bytes per parameter."""

NAMES = {
    "language_model.model.": (
        "layers.0.attention.wo.weight layers.0.attention.wqkv.weight layers.0.attention_norm.weight "
        "layers.0.feed_forward.w1.weight layers.0.feed_forward.w2.weight layers.0.feed_forward.w3.weight "
        "layers.0.ffn_norm.weight norm.weight tok_embeddings.weight"
    ),
    "language_model.": "output.weight",
    "mlp1.": "0.bias 0.weight 1.bias 1.weight 3.bias 3.weight",
    "vision_model.embeddings.": "class_embedding patch_embedding.bias patch_embedding.weight position_embedding",
    "vision_model.encoder.layers.0.": (
        "attn.proj.bias attn.proj.weight attn.qkv.bias attn.qkv.weight ls1 ls2 mlp.fc1.bias mlp.fc1.weight "
        "mlp.fc2.bias mlp.fc2.weight norm1.bias norm1.weight norm2.bias norm2.weight"
    ),
}
"""Of the released checkpoint, by prefix: everything outside blocks, and the first block of each tower."""


@pytest.fixture
def model() -> InternVLChatModel:
    made = tiny_model(FAMILY, torch.float32)
    assert isinstance(made, InternVLChatModel)
    return made


def inputs(model: InternVLChatModel) -> dict[str, Tensor]:
    return dict(FAMILY.tiny_inputs(model, torch.Generator().manual_seed(1)))


def test_names_and_parameters_are_the_checkpoints() -> None:
    with torch.device("meta"):
        released = InternVLChatModel(FAMILY.configs["internvl2-8b"]())
    assert sum(parameter.numel() for parameter in released.parameters()) == CHECKPOINT_BYTES // 2
    first = {name for name in released.state_dict() if not re.search(r"layers\.[1-9]", name)}
    assert first == {prefix + name for prefix, names in NAMES.items() for name in names.split()}


# --- transformers' own InternVL --------------------------------------------------------------------------------------

RENAMED = {
    "vision_model": "model.vision_tower",
    "encoder.layers": "encoder.layer",
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding": "patch_embeddings.projection",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "attn.proj": "attention.projection_layer",
    "attn.qkv": "attention.qkv",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp1.0": "model.multi_modal_projector.layer_norm",
    "mlp1.1": "model.multi_modal_projector.linear_1",
    "mlp1.3": "model.multi_modal_projector.linear_2",
    "language_model.model": "model.language_model",
    "language_model.output": "lm_head",
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "attention.wqkv": "self_attn.wqkv",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def native_state(model: InternVLChatModel) -> Iterator[tuple[str, Tensor]]:
    """Our weights under the names of transformers' class, which has q, k and v apart."""
    for name, tensor in model.state_dict().items():
        for ours, theirs in RENAMED.items():
            name = re.sub(rf"(?<![a-z]){re.escape(ours)}(?=\.|$)", theirs, name)
        if ".qkv." in name:
            parts = tensor.chunk(3)
        elif ".wqkv." in name:
            heads, kv_heads = TINY_LLM["num_attention_heads"], TINY_LLM["num_key_value_heads"]
            groups = tensor.view(kv_heads, heads // kv_heads + 2, -1, tensor.shape[-1])
            parts = groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
        else:
            yield name, tensor
            continue
        for letter, part in zip("qkv", parts, strict=True):
            yield re.sub(r"w?qkv", f"{letter}_proj", name), part


@torch.no_grad()
def test_logits_are_those_of_transformers_internvl(model: InternVLChatModel) -> None:
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**TINY_VISION, attention_bias=True),
        text_config=LlamaConfig(**TINY_LLM),
        image_token_id=TINY_IMAGE_ID,
        tie_word_embeddings=False,
    )
    native = InternVLForConditionalGeneration(config).eval()
    native.load_state_dict(dict(native_state(model)))
    batch = inputs(model)
    torch.testing.assert_close(model(**batch).logits, native(**batch).logits, rtol=1e-4, atol=1e-5)


def test_pixel_shuffle_joins_squares() -> None:
    """Patches numbered row by row on a 4 x 4 grid, with two channels."""
    patches = torch.arange(16.0)[None, :, None] + torch.tensor([0, 0.5])
    joined = pixel_shuffle(patches, 2)
    squares = [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]
    expected = [[index + half for index in square for half in (0, 0.5)] for square in squares]
    assert joined.tolist() == [expected]


# --- decoding --------------------------------------------------------------------------------------------------------

FORBIDDEN = [TINY_LLM["eos_token_id"], TINY_IMAGE_ID]


@torch.no_grad()
def test_generation_with_a_cache_chooses_what_whole_passes_choose(model: InternVLChatModel) -> None:
    """Row by row without padding, one whole pass per token, against a padded batch with a cache."""
    batch = inputs(model)
    new_tokens = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=FORBIDDEN)[:, -4:]
    tiles = iter(batch["pixel_values"].split([1, 2]))
    for row, mask, found in zip(batch["input_ids"], batch["attention_mask"], new_tokens, strict=True):
        ids = row[mask.bool()][None]
        pixels = next(tiles) if (ids == TINY_IMAGE_ID).any() else None
        for token in found:
            logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0, -1]
            logits[FORBIDDEN] = -torch.inf
            assert logits[token] >= logits.max() - 1e-5
            ids = torch.cat([ids, token.view(1, 1)], dim=1)


def test_a_wrong_number_of_placeholders_is_refused(model: InternVLChatModel) -> None:
    batch = inputs(model)
    with pytest.raises(ValueError, match=r"input_ids hold 12 places of visual tokens, but pixel_values make 8"):
        model(**batch | {"pixel_values": batch["pixel_values"][:2]})


# --- quantized -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_quantized_model_saves_loads_and_generates(model: InternVLChatModel, tmp_path: Path) -> None:
    """MQuant with a 4-bit cache: the reordered decoder, the cache's quantizers and every new norm come back."""
    layout, batch, fresh = FAMILY.layout(model), inputs(model), tiny_model(FAMILY, torch.float32)
    recipe = Recipe("mquant", *parse_bits("w8a8/w4a8"), 0, {"kv_bits": 4})
    report = MQUANT.quantize(model, layout, recipe, [batch])
    save_quantized(model, report, recipe, tmp_path, "tiny")
    load_quantized(tmp_path, LoadedModel("tiny", fresh, None, layout), MQUANT.restore)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": FORBIDDEN}
    loaded: Any = fresh
    assert torch.equal(loaded.generate(**batch, **options), model.generate(**batch, **options))


# --- released files --------------------------------------------------------------------------------------------------


def test_a_saved_folder_loads_by_name(model: InternVLChatModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(InternVLChatModel, tmp_path, torch.float32, "sdpa", "get it again")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.get_submodule("language_model.model").config._attn_implementation == "sdpa"
    with torch.no_grad():  # buffers that no file holds are right too
        assert torch.equal(loaded.eval()(**inputs(model)).logits, model(**inputs(model)).logits)


def test_released_configs_are_understood() -> None:
    """Fields that matter only to the released code are there too; its LLM asks for flash attention."""
    llm = {"architectures": ["InternLM2ForCausalLM"], "attn_implementation": "flash_attention_2", "bias": False}
    rope = {"rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000}
    vision = {"model_type": "intern_vit_6b", "drop_path_rate": 0.0, "use_flash_attn": True}
    config = InternVLChatConfig(
        vision_config=dict(TINY_VISION) | vision,
        llm_config=dict(TINY_LLM) | llm | rope | {"model_type": "internlm2"},
        template="internlm2-chat",
        force_image_size=448,
    )
    found = config.get_text_config()
    assert found._attn_implementation != "flash_attention_2"
    assert (found.rope_parameters["rope_type"], found.rope_parameters["rope_theta"]) == ("dynamic", 1000000)
    assert InternVLChatModel(config).language_model.model.rotary_emb.rope_type == "dynamic"


def test_what_the_tree_does_not_cover_is_named() -> None:
    with pytest.raises(ValueError, match="the LLM is 'phi3'"):
        InternVLChatConfig(llm_config={"model_type": "phi3"})
    with pytest.raises(ValueError, match="InternViT-6B"):
        InternVLChatConfig(vision_config={"qk_normalization": True})
    with pytest.raises(ValueError, match="select_layer"):
        InternVLChatConfig(select_layer=-4)
