"""GLM-4V-9B: the module tree against transformers' GLM and torch's own parts, a checkpoint in the released form, the
rotation of a post-norm stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GlmConfig, GlmForCausalLM

from mqbench.baselines.quarot import METHOD as QUAROT
from mqbench.baselines.rotation import residual_rotation
from mqbench.baselines.rtn import METHOD as RTN
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.check import outputs
from mqbench.harness.models.family import tiny_model
from mqbench.harness.models.glm_4v import FAMILY, TINY, glm_4v_layout
from mqbench.harness.models.trees.glm_4v import ChatGLMForConditionalGeneration
from mqbench.harness.models.weights import from_pretrained
from mqbench.harness.quant.integer import use_integer_backend
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.serialize import load_quantized, save_quantized
from mqbench.harness.quant.transforms import AffineNorm
from mqbench.mquant.mquant import METHOD as MQUANT

PARAMETERS, VISION_PARAMETERS = 13_906_320_896, 4_279_387_392
"""Counted on the released checkpoint (see harness/blueprints/glm-4v-9b.toml)."""

BOI, EOI, PATCH = 61, 62, 63
PATCHES = 4


@pytest.fixture
def model() -> ChatGLMForConditionalGeneration:
    built = tiny_model(FAMILY, torch.float64)
    assert isinstance(built, ChatGLMForConditionalGeneration)
    return built


def inputs(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    return dict(FAMILY.tiny_inputs(model, torch.Generator().manual_seed(seed)))


def image_row(model: nn.Module) -> dict[str, Tensor]:
    """One row with one image, without padding."""
    ids = torch.tensor([[5, 6, BOI, *[PATCH] * PATCHES, EOI, 7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {"input_ids": ids, "pixel_values": pixels.to(next(model.parameters()).dtype)}


# --- the tree --------------------------------------------------------------------------------------------------------


def test_parameters_of_the_released_checkpoint():
    with torch.device("meta"):
        model = FAMILY.build(FAMILY.configs["glm-4v-9b"]())
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    assert sum(p.numel() for p in model.transformer.vision.transformer.parameters()) == VISION_PARAMETERS


@torch.no_grad()
def test_vision_block_normalizes_behind_its_branches(model):
    """Written with torch's ``MultiheadAttention``, whose fused weight has the same order."""
    block = model.transformer.vision.transformer.layers[0]
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    attention, heads = block.attention, block.attention.num_heads
    oracle = nn.MultiheadAttention(32, heads, batch_first=True, dtype=torch.float64)
    oracle.in_proj_weight.copy_(attention.query_key_value.weight)
    oracle.in_proj_bias.copy_(attention.query_key_value.bias)
    oracle.out_proj.load_state_dict(attention.dense.state_dict())
    norm, second = block.input_layernorm, block.post_attention_layernorm
    x1 = x + F.layer_norm(oracle(x, x, x)[0], (32,), norm.weight, norm.bias, 1e-6)
    branch = F.linear(F.gelu(F.linear(x1, block.mlp.fc1.weight, block.mlp.fc1.bias)), block.mlp.fc2.weight)
    expected = x1 + F.layer_norm(branch + block.mlp.fc2.bias, (32,), second.weight, second.bias, 1e-6)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_convolution_reads_two_by_two_neighbours_without_the_class_token(model):
    vision = model.transformer.vision
    seen: list[Tensor] = []
    vision.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stream = torch.randn(1, 17, 32, dtype=torch.float64)
    vision.transformer.forward = lambda _: stream
    features = vision(image_row(model)["pixel_values"])
    assert torch.equal(seen[0][0, :, 1, 2], stream[0, 1 + 4 + 2])
    assert features.shape == (1, 1 + PATCHES + 1, 48)
    torch.testing.assert_close(features[:, :1], vision.boi / 8)
    torch.testing.assert_close(features[:, -1:], vision.eoi / 8)


def native_glm(model: ChatGLMForConditionalGeneration) -> GlmForCausalLM:
    """Transformers' GLM with the weights of our decoder."""
    config = GlmConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    native = GlmForCausalLM(config).to(torch.float32).eval()
    state, decoder = {}, model.transformer.encoder
    for index, block in enumerate(decoder.layers):
        name, fused = f"model.layers.{index}", block.self_attention.query_key_value
        for kind in ("weight", "bias"):
            parts = getattr(fused, kind).split([48, 16, 16])
            state |= {f"{name}.self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", parts, strict=True)}
        state[f"{name}.self_attn.o_proj.weight"] = block.self_attention.dense.weight
        state[f"{name}.mlp.gate_up_proj.weight"] = block.mlp.dense_h_to_4h.weight
        state[f"{name}.mlp.down_proj.weight"] = block.mlp.dense_4h_to_h.weight
        state[f"{name}.input_layernorm.weight"] = block.input_layernorm.weight
        state[f"{name}.post_attention_layernorm.weight"] = block.post_attention_layernorm.weight
    state["model.norm.weight"] = decoder.final_layernorm.weight
    state["model.embed_tokens.weight"] = model.get_input_embeddings().weight
    state["lm_head.weight"] = model.get_output_embeddings().weight
    native.load_state_dict(state)
    return native


@torch.no_grad()
def test_decoder_is_transformers_glm():
    model = tiny_model(FAMILY, torch.float32)
    native = native_glm(model)
    ids = torch.tensor([[0, 0, 5, 9, 11, 40], [7, 8, 9, 3, 4, 50]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = model.positions(ids, mask)
    expected = native(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(model(ids, mask).logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_features_stand_in_place_of_the_released_three_tokens(model):
    """The released forward: [.., begin, pad, end, ..], with features and repeated positions spliced in."""
    row = image_row(model)
    short = torch.tensor([[5, 6, BOI, 0, EOI, 7, 8, 9]])
    embeds, features = model.get_input_embeddings()(short), model.transformer.vision(row["pixel_values"])
    embeds = torch.cat([embeds[:, :2], features, embeds[:, 5:]], dim=1)
    positions = torch.tensor([[0, 1, 2, *[3] * PATCHES, 4, 5, 6, 7]])
    hidden = model.transformer.encoder(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    expected = model.transformer.output_layer(hidden)
    torch.testing.assert_close(model(**row).logits, expected, rtol=1e-12, atol=1e-12)


def test_positions_count_from_the_first_token_and_repeat_at_patches(model):
    ids = torch.tensor([[0, 0, 5, BOI, PATCH, PATCH, PATCH, EOI, 6, BOI, PATCH, PATCH, EOI]])
    mask = torch.tensor([[0, 0, *[1] * 11]])
    assert model.positions(ids, mask).tolist() == [[0, 0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6, 7]]


@torch.no_grad()
def test_repeated_positions_are_no_packed_rows(model):
    row = image_row(model)
    ones = torch.ones_like(row["input_ids"])
    positions = model.positions(row["input_ids"], None)
    assert torch.equal(model(**row, position_ids=positions).logits, model(**row, attention_mask=ones).logits)


@torch.no_grad()
@pytest.mark.parametrize("places", [PATCHES - 1, PATCHES + 1])
def test_placeholders_must_fit_the_pixels(model, places):
    row = image_row(model) | {"input_ids": torch.tensor([[5, BOI, *[PATCH] * places, EOI]])}
    with pytest.raises(ValueError, match=rf"input_ids hold {places + 2} places .* pixel_values make 6"):
        model(**row)


@torch.no_grad()
def test_generate_continues_positions_behind_images(model):
    """Greedy answers of a padded batch equal those of repeated whole passes, row by row."""
    batch = inputs(model)
    never = [2, BOI, EOI, PATCH]
    answers = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=never)
    new = answers[:, batch["input_ids"].shape[1] :]
    for _ in range(4):
        logits = model(**batch, use_cache=False).logits[:, -1]
        logits[:, never] = -torch.inf
        chosen = logits.argmax(-1, keepdim=True)
        batch["input_ids"] = torch.cat([batch["input_ids"], chosen], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(chosen)], dim=1)
    assert torch.equal(batch["input_ids"][:, -4:], new)


# --- a checkpoint in the released form -------------------------------------------------------------------------------


def released_config() -> dict[str, Any]:
    """Keys of the released config.json that are not the tree's, beside the tiny sizes."""
    sizes = {key: value for key, value in TINY.items() if key != "image_token_id"}
    vision = {**TINY["vision_config"], "dropout_prob": 0.0, "in_channels": 3, "hidden_act": "gelu"}
    return sizes | {
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "model_type": "chatglm",
        "torch_dtype": "bfloat16",
        "rmsnorm": True,
        "multi_query_attention": True,
        "add_qkv_bias": True,
        "seq_length": 8192,
        "vision_config": vision,
    }


@torch.no_grad()
def test_a_released_folder_loads_by_name_without_remote_code(tmp_path: Path):
    model = tiny_model(FAMILY, torch.float32)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state | {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(released_config()))
    loaded: Any = from_pretrained(ChatGLMForConditionalGeneration, tmp_path, torch.float32, "sdpa", "get it")
    loaded.config.image_token_id = PATCH  # the released one stands behind the tiny vocabulary
    batch = inputs(model)
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model, batch))


def test_the_patch_placeholder_is_no_token_of_the_released_vocabulary():
    config = FAMILY.configs["glm-4v-9b"]()
    last_token = 151342  # <|end_of_video|>
    assert last_token < config.image_token_id < config.vocab_size


# --- methods ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_post_norm_stream_runs_rotated(model):
    """Every norm writes in the rotated basis; what the convolution reads is the float stream times Q."""
    batch = inputs(model)
    streams: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        streams.append(output)

    model.transformer.vision.transformer.register_forward_hook(keep)
    model(**batch)
    layout = glm_4v_layout(model)
    QUAROT.quantize(model, layout, Recipe("quarot", *parse_bits("float/float"), 0, {}), [])
    model(**batch)
    norms = [model.get_submodule(norm.name) for norm in layout.vision.norms]
    assert len(norms) == 4
    assert all(isinstance(norm, AffineNorm) and norm.rotate and not norm.centre for norm in norms)
    expected = residual_rotation(32, Part.VISION, seed=0)(streams[0])
    assert not torch.allclose(streams[0], expected)
    torch.testing.assert_close(streams[1], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_saved_and_loaded_again(tmp_path: Path):
    model = tiny_model(FAMILY, torch.float32)
    layout, recipe = glm_4v_layout(model), Recipe("mquant", *parse_bits("w8a8/w4a8"), 0, {})
    report = MQUANT.quantize(model, layout, recipe, [inputs(model, seed=2)])
    save_quantized(model, report, recipe, tmp_path / "saved", "tiny")
    fresh = tiny_model(FAMILY, torch.float32)
    load_quantized(tmp_path / "saved", LoadedModel("tiny", fresh, None, glm_4v_layout(fresh)), MQUANT.restore)
    batch = inputs(model)
    assert torch.equal(outputs(fresh, batch), outputs(model, batch))


@torch.no_grad()
def test_integer_backend_runs_the_convolutions_on_maps():
    model = tiny_model(FAMILY, torch.float32)
    recipe = Recipe("rtn", *parse_bits("w8a8/w4a8"), 0, {})
    RTN.quantize(model, glm_4v_layout(model), recipe, [inputs(model)])
    batch = inputs(model)
    simulated = outputs(model, batch)
    report = use_integer_backend(model)
    assert report.complete and "transformer.vision.conv" in report.integer
    torch.testing.assert_close(outputs(model, batch), simulated, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_eager_attention_and_bfloat16_run():
    """Eager attention agrees; in bfloat16 the answers stay close, pixels and positions come in their own types."""
    model: Any = tiny_model(FAMILY, torch.float32)
    batch = inputs(model)
    expected = outputs(model, batch)
    model.config._attn_implementation = "eager"
    torch.testing.assert_close(outputs(model, batch), expected, rtol=1e-4, atol=1e-5)
    found = outputs(model.to(torch.bfloat16), batch)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_msq_gives_two_scales_to_the_llm_alone():
    model = tiny_model(FAMILY, torch.float32)
    recipe = Recipe("mquant", *parse_bits("w8a8/w4a8"), 0, {})
    report = MQUANT.quantize(model, glm_4v_layout(model), recipe, [inputs(model)])
    for name, layer in report.layers.items():
        wanted = {"text", "visual"} if layer.part is Part.TEXT else {"tensor"}
        assert set(layer.scales) == wanted, name
