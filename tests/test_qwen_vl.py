"""Qwen-VL-Chat's module tree: the released names and sizes, torch's own parts and Qwen2 as oracles, long rows."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.family import Family, tiny_model
from mqbench.harness.models.qwen_vl import FAMILY, TINY, TINY_IMAGE_ID, TINY_VISUAL
from mqbench.harness.models.trees.qwen_vl import QWenConfig, QWenLMHeadModel
from mqbench.harness.models.weights import from_pretrained
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.serialize import load_quantized, save_quantized
from mqbench.mquant.mquant import METHOD as MQUANT

CHECKPOINT_PARAMS = 9656935168
NAMES = {
    "lm_head.": "weight",
    "transformer.": "ln_f.weight wte.weight",
    "transformer.h.0.": (
        "attn.c_attn.bias attn.c_attn.weight attn.c_proj.weight ln_1.weight ln_2.weight mlp.c_proj.weight "
        "mlp.w1.weight mlp.w2.weight"
    ),
    "transformer.visual.": (
        "conv1.weight ln_post.bias ln_post.weight ln_pre.bias ln_pre.weight positional_embedding proj"
    ),
    "transformer.visual.attn_pool.": (
        "attn.in_proj_bias attn.in_proj_weight attn.out_proj.bias attn.out_proj.weight kv_proj.weight ln_kv.bias "
        "ln_kv.weight ln_q.bias ln_q.weight pos_embed query"
    ),
    "transformer.visual.transformer.resblocks.0.": (
        "attn.in_proj.bias attn.in_proj.weight attn.out_proj.bias attn.out_proj.weight ln_1.bias ln_1.weight "
        "ln_2.bias ln_2.weight mlp.c_fc.bias mlp.c_fc.weight mlp.c_proj.bias mlp.c_proj.weight"
    ),
}
"""Of the released checkpoint, by prefix: everything outside blocks, and the first block of each tower."""


def family(**fields: object) -> Family:
    """The family with other fields in its tiny config."""
    return replace(FAMILY, tiny_config=lambda: tiny_config(**fields))


def tiny_config(**fields: object) -> QWenConfig:
    config = QWenConfig(**dict(TINY) | {"visual": dict(TINY_VISUAL)} | fields)
    config._attn_implementation = "sdpa"
    return config


@pytest.fixture
def model() -> QWenLMHeadModel:
    made = tiny_model(FAMILY, torch.float32)
    assert isinstance(made, QWenLMHeadModel)
    return made


def inputs(model: nn.Module) -> dict[str, Tensor]:
    return dict(FAMILY.tiny_inputs(model, torch.Generator().manual_seed(1)))


@pytest.fixture
def released_form(model: QWenLMHeadModel, tmp_path: Path) -> dict[str, Tensor]:
    """The tiny model's weights as a released checkpoint holds them."""
    model.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


# --- released files --------------------------------------------------------------------------------------------------


def test_parameters_are_the_checkpoints() -> None:
    with torch.device("meta"):
        released = QWenLMHeadModel(FAMILY.configs["qwen-vl-chat"]())
    assert sum(parameter.numel() for parameter in released.parameters()) == CHECKPOINT_PARAMS


def test_names_are_the_checkpoints(released_form: dict[str, Tensor]) -> None:
    first = {name for name in released_form if not re.search(r"(\.h|resblocks)\.[1-9]", name)}
    assert first == {prefix + name for prefix, names in NAMES.items() for name in names.split()}


def test_conversion_on_load_is_exact(model: QWenLMHeadModel, released_form: dict[str, Tensor], tmp_path: Path) -> None:
    """Matrices of the released form become linears and nothing else changes; saving has turned them back."""
    expected, visual = model.state_dict(), "transformer.visual"
    qkv = [expected[f"{visual}.attn_pool.attn.{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(released_form[f"{visual}.attn_pool.attn.in_proj_weight"], torch.cat(qkv))
    assert torch.equal(released_form[f"{visual}.proj"], expected[f"{visual}.proj.weight"].T)
    loaded = from_pretrained(QWenLMHeadModel, tmp_path, torch.float32, "sdpa", "get it again")
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs(model)).logits, model(**inputs(model)).logits)


# --- oracles ---------------------------------------------------------------------------------------------------------


class Weights:
    """A released checkpoint's tensors below a prefix."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str) -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.tensors.get(f"{self.prefix}{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], 1e-6)


def plain_positions(table: Tensor, side: int) -> Tensor:
    """(grid^2, C) at side^2 places, one channel at a time."""
    grid = math.isqrt(len(table))
    resize = {"size": (side, side), "mode": "bicubic", "align_corners": False}
    return torch.stack([F.interpolate(column.view(1, 1, grid, grid), **resize).flatten() for column in table.T], dim=1)


def plain_block(weights: Weights, x: Tensor, heads: int) -> Tensor:
    """One image, head by head."""
    fused = weights.linear(weights.norm(x, "ln_1"), "attn.in_proj")
    mixed = []
    for head in fused.chunk(heads, dim=-1):
        query, key, value = head.chunk(3, dim=-1)
        mixed.append((query @ key.T / query.shape[-1] ** 0.5).softmax(-1) @ value)
    x = x + weights.linear(torch.cat(mixed, dim=-1), "attn.out_proj")
    hidden = F.gelu(weights.linear(weights.norm(x, "ln_2"), "mlp.c_fc"))
    return x + weights.linear(hidden, "mlp.c_proj")


@torch.no_grad()
def test_visual_tokens_are_those_of_a_plain_computation(
    model: QWenLMHeadModel, released_form: dict[str, Tensor]
) -> None:
    """With torch's MultiheadAttention and the released matrices, one image at a time."""
    pixels, weights = inputs(model)["pixel_values"], Weights(released_form, "transformer.visual.")
    pool = Weights(released_form, "transformer.visual.attn_pool.")
    width, head_dim = TINY_VISUAL["output_dim"], TINY_VISUAL["head_dim"]
    attention = nn.MultiheadAttention(width, width // head_dim, batch_first=True)
    attention.load_state_dict({name: pool[f"attn.{name}"] for name in attention.state_dict()})
    for image, found in zip(pixels, model.transformer.visual(pixels), strict=True):
        patches = F.conv2d(image[None], weights["conv1.weight"], stride=TINY_VISUAL["patch_size"])[0]
        side = patches.shape[-1]
        x = weights.norm(patches.flatten(1).T + plain_positions(weights["positional_embedding"], side), "ln_pre")
        for index in range(TINY_VISUAL["layers"]):
            block = Weights(released_form, f"transformer.visual.transformer.resblocks.{index}.")
            x = plain_block(block, x, TINY_VISUAL["heads"])
        values = pool.norm(pool.linear(x, "kv_proj"), "ln_kv")
        keys, queries = values + plain_positions(pool["pos_embed"], side), pool.norm(pool["query"], "ln_q")
        answers, _ = attention(queries + pool["pos_embed"], keys, values)
        expected = weights.norm(answers, "ln_post") @ weights["proj"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def as_qwen2(tensors: dict[str, Tensor], config: QWenConfig) -> Qwen2ForCausalLM:
    """Qwen2 computes the same on rows up to the training length, with c_attn's three matrices apart."""
    sizes = {"intermediate_size": config.intermediate_size // 2, "num_key_value_heads": config.num_attention_heads}
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    native = Qwen2ForCausalLM(
        Qwen2Config(**sizes, **{name: getattr(config, name) for name in kept}, rms_norm_eps=config.layer_norm_epsilon)
    ).eval()
    renamed = {
        "lm_head": "lm_head", "wte": "model.embed_tokens", "ln_f": "model.norm", "h": "model.layers",
        "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for name, tensor in tensors.items():
        if "visual" in name:
            continue
        name = name.removeprefix("transformer.")
        for ours, theirs in renamed.items():
            name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\1{theirs}.", name)
        parts = {name: tensor}
        if "c_attn" in name:
            names = [name.replace("attn.c_attn", f"self_attn.{letter}_proj") for letter in "qkv"]
            parts = dict(zip(names, tensor.chunk(3), strict=True))
        state |= parts
    native.load_state_dict(state)
    return native


@torch.no_grad()
def test_logits_of_text_are_those_of_qwen2() -> None:
    model = tiny_model(family(seq_length=64), torch.float32)
    batch = {name: tensor for name, tensor in inputs(model).items() if name != "pixel_values"}
    native = as_qwen2(model.state_dict(), model.config)
    torch.testing.assert_close(model(**batch).logits, native(**batch).logits, rtol=1e-4, atol=1e-5)


# --- long rows and decoding ------------------------------------------------------------------------------------------


def test_angles_and_sharpness_grow_beyond_the_training_length(model: QWenLMHeadModel) -> None:
    """seq_length is 12: base * 1 up to 12 tokens, * 3^(d/(d-2)) up to 24, * 7^(d/(d-2)) up to 48; log_12 of n."""
    rotary, width = model.transformer.rotary_emb, TINY["kv_channels"]
    assert rotary.growth(torch.tensor([1, 12, 13, 24, 25, 48, 49])).tolist() == [1, 1, 3, 3, 7, 7, 15]
    places = torch.arange(25).expand(2, -1).clone()
    places[0, 13:] = 12  # a row of 13 beside one of 25
    cos, sin = rotary(places, is_prompt=True)
    for row, growth in enumerate((3, 7)):
        for pair in range(width // 2):
            base = 10000 * growth ** (width / (width - 2))
            angle = places[row].double() / base ** (2 * pair / width)
            for offset in (0, width // 2):
                torch.testing.assert_close(cos[row, :, pair + offset].double(), angle.cos(), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(sin[row, :, pair + offset].double(), angle.sin(), rtol=1e-5, atol=1e-5)
    sharpness = model.transformer.sharpness(places[1:])
    assert sharpness is not None
    expected = [max(1.0, math.log(place + 1, 12)) for place in range(25)]
    torch.testing.assert_close(sharpness[0].tolist(), expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_long_rows_compute_otherwise_only_because_of_angles_and_sharpness() -> None:
    made = [tiny_model(family(**{key: False}), torch.float32) for key in ("use_dynamic_ntk", "use_logn_attn")]
    model = tiny_model(FAMILY, torch.float32)
    batch = inputs(model)
    outputs = [one(**batch).logits for one in (model, *made)]
    assert all((outputs[0] - other).abs().max() > 1e-4 for other in outputs[1:])


FORBIDDEN = [TINY["eos_token_id"], TINY_IMAGE_ID]


@torch.no_grad()
@pytest.mark.parametrize("seq_length", [12, 64])
def test_generation_with_a_cache_chooses_what_whole_passes_choose(seq_length: int) -> None:
    """Row by row without padding, one whole pass per token, against a padded batch with a cache.

    Decoding keeps the angles of the prompt, as the released code does: whole passes take the prompt's growth too.
    """
    model = tiny_model(family(seq_length=seq_length), torch.float32)
    batch = inputs(model)
    new_tokens = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=FORBIDDEN)[:, -4:]
    images = iter(batch["pixel_values"].split([1, 2]))
    rotary = model.transformer.rotary_emb
    for row, mask, found in zip(batch["input_ids"], batch["attention_mask"], new_tokens, strict=True):
        ids = row[mask.bool()][None]
        pixels = next(images) if (ids == TINY_IMAGE_ID).any() else None
        growth = rotary.growth(torch.tensor([ids.shape[1]]))
        rotary.growth = lambda _, growth=growth: growth
        for token in found:
            logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0, -1]
            logits[FORBIDDEN] = -torch.inf
            assert logits[token] >= logits.max() - 1e-5
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        del rotary.growth


def test_a_wrong_number_of_placeholders_is_refused(model: QWenLMHeadModel) -> None:
    batch = inputs(model)
    with pytest.raises(ValueError, match=r"input_ids hold 12 places of visual tokens, but pixel_values make 8"):
        model(**batch | {"pixel_values": batch["pixel_values"][:2]})


# --- quantized -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_quantized_model_saves_loads_and_generates(model: QWenLMHeadModel, tmp_path: Path) -> None:
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
