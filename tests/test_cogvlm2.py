"""CogVLM2: the module tree against transformers' LLaMA, which expert gets which rows, static scales by expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mqbench.harness.errors import CalibrationError
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.check import outputs
from mqbench.harness.models.cogvlm2 import FAMILY, TINY, cogvlm2_layout
from mqbench.harness.models.family import tiny_model
from mqbench.harness.models.trees.cogvlm2 import CogVLMForCausalLM
from mqbench.harness.models.weights import from_pretrained
from mqbench.harness.probes import PROBES, ProbeContext
from mqbench.harness.quant.layout import Modality, Part
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.serialize import load_quantized, save_quantized
from mqbench.mquant.mquant import METHOD as MQUANT

VISION_PARAMETERS = 4_279_387_392
"""Of the tower that GLM-4V-9B has too, counted on its released checkpoint."""

VISUAL, EOI = 62, 63
PATCHES = 4
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.fixture
def model() -> CogVLMForCausalLM:
    built = tiny_model(FAMILY, torch.float64)
    assert isinstance(built, CogVLMForCausalLM)
    return built


def inputs(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    return dict(FAMILY.tiny_inputs(model, torch.Generator().manual_seed(seed)))


def image_row(model: nn.Module) -> dict[str, Tensor]:
    """One row with one image, without padding."""
    ids = torch.tensor([[1, *[VISUAL] * (1 + PATCHES), EOI, 7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {"input_ids": ids, "pixel_values": pixels.to(next(model.parameters()).dtype)}


def rows_seen(model: nn.Module, batch: dict[str, Tensor], *names: str) -> list[Tensor]:
    """Inputs of the named linears during one pass, (rows, width) each."""
    seen: dict[str, Tensor] = {}
    for name in names:
        hook = lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    model(**batch)
    return [seen[name] for name in names]


# --- the tree --------------------------------------------------------------------------------------------------------


def test_sizes_of_the_released_checkpoint():
    """The card says 19B; the vision tower is GLM-4V-9B's to the parameter but for its positions."""
    config = FAMILY.configs["cogvlm2"]()
    with torch.device("meta"):
        model = FAMILY.build(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1) == 19.5
    assert sum(p.numel() for p in model.model.vision.transformer.parameters()) == VISION_PARAMETERS
    assert config.vision_config.num_positions == (1344 // 14) ** 2 + 1
    assert config.vision_config.num_patches + 2 == 2306


def native_llama(model: CogVLMForCausalLM) -> LlamaForCausalLM:
    """Transformers' LLaMA with the weights of the language experts."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    native = LlamaForCausalLM(config).to(torch.float32).eval()
    state = {}
    for index, block in enumerate(model.model.layers):
        name, mlp = f"model.layers.{index}", block.mlp.language_mlp
        parts = block.self_attn.language_expert_query_key_value.weight.split([48, 16, 16])
        state |= {f"{name}.self_attn.{x}_proj.weight": part for x, part in zip("qkv", parts, strict=True)}
        state[f"{name}.self_attn.o_proj.weight"] = block.self_attn.language_expert_dense.weight
        state |= {f"{name}.mlp.{x}_proj.weight": getattr(mlp, f"{x}_proj").weight for x in ("gate", "up", "down")}
        state[f"{name}.input_layernorm.weight"] = block.input_layernorm.weight
        state[f"{name}.post_attention_layernorm.weight"] = block.post_attention_layernorm.weight
    state["model.norm.weight"] = model.model.norm.weight
    state["model.embed_tokens.weight"] = model.model.embed_tokens.weight
    state["lm_head.weight"] = model.lm_head.weight
    native.load_state_dict(state)
    return native


@torch.no_grad()
def test_text_goes_through_llama():
    model = tiny_model(FAMILY, torch.float32)
    ids = torch.tensor([[0, 0, 5, 9, 11, 40], [7, 8, 9, 3, 4, 50]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = native_llama(model)(ids, attention_mask=mask, position_ids=model.positions(ids, mask)).logits
    torch.testing.assert_close(model(ids, mask).logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_equal_experts_images_go_through_llama_too():
    """Features in place of embeddings; the patches share a position, as in the released ``build_position_ids``."""
    model = tiny_model(FAMILY, torch.float32)
    for block in model.model.layers:
        attention = block.self_attn
        attention.vision_expert_query_key_value.weight.copy_(attention.language_expert_query_key_value.weight)
        attention.vision_expert_query_key_value.bias.zero_()
        attention.vision_expert_dense.load_state_dict(attention.language_expert_dense.state_dict())
        block.mlp.vision_mlp.load_state_dict(block.mlp.language_mlp.state_dict())
    row = image_row(model)
    embeds = model.model.embed_tokens(row["input_ids"])
    embeds = torch.cat([embeds[:, :1], model.model.vision(row["pixel_values"]), embeds[:, -3:]], dim=1)
    positions = torch.tensor([[0, 1, *[2] * PATCHES, 3, 4, 5, 6]])
    mask = torch.ones_like(positions)
    expected = native_llama(model)(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(model(**row).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_experts_get_the_rows_that_the_released_code_gives_them(model):
    """Released: visual expert iff a token and its successor are of the visual type; the last of an image is not."""
    row = image_row(model)
    token_types = torch.tensor([0, *[1] * (1 + PATCHES + 1), 0, 0, 0])
    to_vision = torch.zeros(len(token_types), dtype=torch.bool)
    to_vision[:-1] = (token_types[:-1] == 1) & (token_types[1:] == 1)
    names = (f"{ATTENTION}.vision_expert_query_key_value", f"{ATTENTION}.language_expert_query_key_value")
    vision, language = rows_seen(model, row, *names)
    embeds = model.model.embed_tokens(row["input_ids"])
    features = model.model.vision(row["pixel_values"])
    stream = torch.cat([embeds[:, :1], features, embeds[:, -3:]], dim=1)
    normed = model.model.layers[0].input_layernorm(stream)[0]
    torch.testing.assert_close(vision, normed[to_vision], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(language, normed[~to_vision], rtol=1e-12, atol=1e-12)


def test_positions_of_padded_rows(model):
    ids = torch.tensor([[0, 0, 1, VISUAL, VISUAL, VISUAL, VISUAL, EOI, 6, 7]])
    mask = torch.tensor([[0, 0, *[1] * 8]])
    assert model.positions(ids, mask).tolist() == [[0, 0, 0, 1, 2, 2, 2, 3, 4, 5]]


@torch.no_grad()
@pytest.mark.parametrize("method", [None, MQUANT], ids=["float", "mquant"])
def test_generate_continues_positions_behind_images(model, method):
    """Greedy answers of a padded batch equal those of repeated whole passes; so they do reordered."""
    batch = inputs(model)
    if method is not None:
        method.quantize(model, cogvlm2_layout(model), Recipe("mquant", *parse_bits("float/float"), 0, {}), [])
    never = [2, VISUAL, EOI]
    answers = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=never)
    new = answers[:, batch["input_ids"].shape[1] :]
    for _ in range(4):
        logits = model(**batch, use_cache=False).logits[:, -1]
        logits[:, never] = -torch.inf
        chosen = logits.argmax(-1, keepdim=True)
        batch["input_ids"] = torch.cat([batch["input_ids"], chosen], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(chosen)], dim=1)
    assert torch.equal(batch["input_ids"][:, -4:], new)


@torch.no_grad()
def test_a_released_folder_loads_by_name_without_remote_code(tmp_path: Path):
    model = tiny_model(FAMILY, torch.float32)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state | {f"{ATTENTION}.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    released = {**TINY, "vision_config": dict(TINY["vision_config"]), "torch_dtype": "bfloat16"}
    released |= {"model_type": "cogvlm", "auto_map": {"AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(released))
    loaded: Any = from_pretrained(CogVLMForCausalLM, tmp_path, torch.float32, "sdpa", "get it")
    batch = inputs(model)
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model, batch))


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


# --- methods ---------------------------------------------------------------------------------------------------------


def quantized(bits: str, batch: dict[str, Tensor] | None = None, **options: Any) -> tuple[Any, Any]:
    model = tiny_model(FAMILY, torch.float32)
    batch = inputs(model) if batch is None else batch
    recipe = Recipe("mquant", *parse_bits(bits), 0, options)
    return model, MQUANT.quantize(model, cogvlm2_layout(model), recipe, [batch])


@torch.no_grad()
def test_every_expert_has_one_static_scale_over_its_own_rows():
    """Modality-specific scales fall out of the architecture. Weights are kept, so the rows are the float ones."""
    batch = inputs(tiny_model(FAMILY, torch.float32))
    plain = {"rotation": False, "online_hadamard": False}
    model, report = quantized("float/w16a8", batch, **plain)
    layout = cogvlm2_layout(model)
    experts = [name for name in report.layers if layout.modality_of(name) is not None]
    assert len(experts) == 2 * 2 * 5
    assert all(set(layer.scales) == {"tensor"} for layer in report.layers.values() if layer.activation_num_bits)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    float_model = tiny_model(FAMILY, torch.float32)
    read = "language_expert_query_key_value", "vision_expert_query_key_value"
    norm = float_model.model.layers[0].input_layernorm
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda _, __, output: seen.append(output / norm.weight))
    float_model(**batch)
    for name, rows in zip(read, (mask & (ids != VISUAL), ids == VISUAL), strict=True):
        scale = report.layers[f"{ATTENTION}.{name}"].scales["tensor"]
        assert scale == pytest.approx(seen[0][rows].abs().max().item() / 127, rel=1e-5)


@torch.no_grad()
def test_quantize_tokens_chooses_experts():
    """Only the visual experts' inputs are rounded: a text row keeps its float logits, one with an image does not."""
    plain = {"rotation": False, "online_hadamard": False, "rms": False, "quantize_tokens": "visual"}
    model, report = quantized("float/w16a4", **plain)
    exact = tiny_model(FAMILY, torch.float32)
    row = image_row(model)
    text = {"input_ids": row["input_ids"][:, -3:]}
    torch.testing.assert_close(model(**text).logits, exact(**text).logits, rtol=1e-4, atol=1e-5)
    assert (model(**row).logits - exact(**row).logits).abs().max() > 1e-3
    rounded = {name for name, layer in report.layers.items() if layer.activation_num_bits}
    assert rounded and all(".vision_" in name and name.startswith("model.layers") for name in rounded)


@torch.no_grad()
def test_padding_stays_out_of_an_experts_scale():
    batch = inputs(tiny_model(FAMILY, torch.float32))
    padded = {name: batch[name] for name in ("input_ids", "attention_mask")}
    padded["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 40)
    _, report = quantized("w8a8/w4a8", batch)
    _, other = quantized("w8a8/w4a8", batch | padded)
    assert {name: layer.scales for name, layer in report.layers.items()} == {
        name: layer.scales for name, layer in other.layers.items()
    }


def test_calibration_without_images_is_refused():
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(CalibrationError, match=r"saw no calibration data|no calibration sample reaches"):
        quantized("w8a8/w4a8", text)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}, {"kv_bits": 4}], ids=["mquant", "gptq", "kv"])
def test_saved_and_loaded_again(tmp_path: Path, options: dict[str, Any]):
    model, report = quantized("w8a8/w4a8", **options)
    recipe = Recipe("mquant", *parse_bits("w8a8/w4a8"), 0, options)
    save_quantized(model, report, recipe, tmp_path / "saved", "tiny")
    fresh = tiny_model(FAMILY, torch.float32)
    load_quantized(tmp_path / "saved", LoadedModel("tiny", fresh, None, cogvlm2_layout(fresh)), MQUANT.restore)
    batch = inputs(model)
    assert torch.equal(outputs(fresh, batch), outputs(model, batch))


@torch.no_grad()
@pytest.mark.parametrize("bits", ["float/float", "w8a8/w4a8"])
def test_probe_of_activations_looks_at_both_experts(bits: str):
    """Also where tokens are reordered and quantizers hold the contexts of single experts."""
    model = tiny_model(FAMILY, torch.float32)
    batch, layout = inputs(model), cogvlm2_layout(model)
    recipe, report = Recipe("mquant", *parse_bits(bits), 0, {}), None
    if bits != "float/float":
        report = MQUANT.quantize(model, layout, recipe, [batch])
    probed = ProbeContext(LoadedModel("tiny", model, None, layout), recipe, report, lambda: [batch])
    arrays = PROBES["activation_ranges"].run(probed).arrays
    names = [f"{MLP}.{prefix}_mlp.down_proj" for prefix in ("language", "vision")]
    language, vision = rows_seen(model, batch, *names)
    if report is not None:
        language, vision = (
            model.get_submodule(name).prepare_input(rows)[0]
            for name, rows in zip(names, (language, vision), strict=True)
        )
    assert arrays["mlp_out.visual.max"][0] == pytest.approx(vision.max().item(), rel=1e-4)
    assert arrays["mlp_out.visual.min"][0] == pytest.approx(vision.min().item(), rel=1e-4)
    assert arrays["mlp_out.text.max"][0] <= language.max().item() * (1 + 1e-4)  # padding does not count
    assert arrays["mlp_out.text.max"][0] > 0


def test_layout_names_experts_by_modality():
    layout = cogvlm2_layout(FAMILY.tiny_config())
    assert layout.modality_of(f"{ATTENTION}.vision_expert_dense") is Modality.VISUAL
    assert layout.modality_of(f"{MLP}.language_mlp.up_proj") is Modality.TEXT
    assert sum(part is Part.TEXT for part in layout.quantized_linears().values()) == 2 * 2 * 5
