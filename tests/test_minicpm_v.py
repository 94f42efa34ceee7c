"""MiniCPM-V 2.6: the module tree against torch's own parts, a checkpoint in the released form, slices, adapter."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, SiglipVisionModel
from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor

from mqbench.baselines.quarot import METHOD as QUAROT
from mqbench.harness.blueprint import load_blueprint
from mqbench.harness.blueprint_tokens import visual_tokens
from mqbench.harness.errors import DatasetError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.check import outcome_of, outputs, proofs
from mqbench.harness.models.family import tiny_model
from mqbench.harness.models.minicpm_v import ADAPTERS, FAMILY, TINY_GRIDS, TINY_VISION, minicpm_v_layout
from mqbench.harness.models.slices import SliceRule, cut_slices, enlarged, patch_strips
from mqbench.harness.models.trees.cross_attention import sine_positions
from mqbench.harness.models.trees.minicpm_v import MiniCPMV, MiniCPMVConfig, nearest_positions
from mqbench.harness.models.weights import from_pretrained
from mqbench.harness.quant.layout import Layout, Tower
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.serialize import load_quantized, save_quantized
from mqbench.harness.quant.transforms import AffineNorm, OnlineHadamard, RMSNorm
from mqbench.kernels.hadamard import is_supported

PARAMETERS = 8_099_175_152
"""Of the released checkpoint, from its safetensors metadata (see harness/blueprints/minicpm-v-2.6.toml)."""


@pytest.fixture
def model() -> MiniCPMV:
    built = tiny_model(FAMILY, torch.float64)
    assert isinstance(built, MiniCPMV)
    return built


def inputs(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    return dict(FAMILY.tiny_inputs(model, torch.Generator().manual_seed(seed)))


# --- the tree --------------------------------------------------------------------------------------------------------


def test_parameters_of_the_released_checkpoint():
    with torch.device("meta"):
        model = FAMILY.build(FAMILY.configs["minicpm-v-2.6"]())
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS


@torch.no_grad()
def test_resampler_is_torchs_attention_over_normed_patches(model):
    """Written with torch's ``MultiheadAttention`` and one fused weight, as the released code is."""
    resampler, generator = model.resampler, torch.Generator().manual_seed(0)
    width = resampler.query.shape[1]
    oracle = nn.MultiheadAttention(width, resampler.attn.num_heads, batch_first=True, dtype=torch.float64)
    halves = [resampler.attn.q_proj, resampler.attn.k_proj, resampler.attn.v_proj]
    oracle.in_proj_weight.copy_(torch.cat([linear.weight for linear in halves]))
    oracle.in_proj_bias.copy_(torch.cat([linear.bias for linear in halves]))
    oracle.out_proj.load_state_dict(resampler.attn.out_proj.state_dict())
    grids = torch.tensor(TINY_GRIDS)
    patches = torch.randn(3, 12, 24, generator=generator, dtype=torch.float64)
    found = resampler(patches, grids)
    for index, (rows, columns) in enumerate(TINY_GRIDS):
        values = resampler.ln_kv(patches[index, : rows * columns] @ resampler.kv_proj.weight.T)
        places = [naive_sines(row, column, width) for row in range(rows) for column in range(columns)]
        queries = resampler.ln_q(resampler.query)
        mixed, _ = oracle(queries[None], (values + torch.stack(places))[None], values[None])
        expected = resampler.ln_post(mixed[0]) @ resampler.proj.weight.T
        torch.testing.assert_close(found[index], expected, atol=1e-6, rtol=0)


def naive_sines(row: int, column: int, width: int) -> Tensor:
    """Columns come first; within each half all sines, then all cosines."""
    rates = [10000 ** -(4 * index / width) for index in range(width // 4)]
    waves = [wave(place * rate) for place in (column, row) for wave in (math.sin, math.cos) for rate in rates]
    return torch.tensor(waves, dtype=torch.float64)


def test_sine_tables_add_up_without_rounding():
    rows, columns = sine_positions(5, 16)
    assert rows.dtype == columns.dtype == torch.float32
    assert not rows[:, :8].any() and not columns[:, 8:].any()
    assert torch.equal(rows[:, 8:], columns[:, :8])


@torch.no_grad()
def test_vision_tower_is_siglip_on_a_square_of_its_own_size(model):
    config = model.config.vision_config
    oracle = SiglipVisionModel(config).double().eval()
    missing, unexpected = oracle.load_state_dict(model.vpm.state_dict(), strict=False)
    assert not unexpected and all("head." in name for name in missing)
    side, patch = config.image_size // config.patch_size, config.patch_size
    image = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.float64)
    strips = image.unflatten(2, (side, patch)).transpose(2, 3).flatten(3)  # a row of patches behind the other
    found = model.vpm(strips, torch.full((2, 2), side))
    torch.testing.assert_close(found, oracle(image).last_hidden_state, atol=1e-12, rtol=0)


@torch.no_grad()
def test_padding_of_short_slices_changes_nothing(model):
    batch = inputs(model)
    together = model.get_image_features(batch["pixel_values"], batch["tgt_sizes"])
    for index, (rows, columns) in enumerate(TINY_GRIDS):
        strip = batch["pixel_values"][index : index + 1, ..., : rows * columns * TINY_VISION["patch_size"]]
        alone = model.get_image_features(strip, batch["tgt_sizes"][index : index + 1])
        torch.testing.assert_close(together[index], alone[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 13, 25, 32, 49, 69, 70, 71, 140])
def test_positions_are_float32_buckets(length):
    """At 25 and 49 float32 puts patches on a border one position lower than exact fractions would."""
    borders = torch.arange(1 / 70, 1.0, 1 / 70)
    expected = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / torch.tensor(length)), borders, right=True)
    found = nearest_positions(length, 70)
    assert torch.equal(found, expected)
    exact = torch.tensor([step * 70 // length for step in range(length)])
    assert len(found) == length
    assert ((exact - found) <= (length in (25, 49))).all() and (found <= exact).all()


@torch.no_grad()
def test_wrong_number_of_placeholders_is_refused(model):
    batch = inputs(model)
    with pytest.raises(ValueError, match="holds 12 placeholders for 8 visual tokens"):
        model(**batch | {name: batch[name][:2] for name in ("pixel_values", "tgt_sizes")})


@torch.no_grad()
def test_generate_is_the_greedy_loop():
    model = tiny_model(FAMILY, torch.float32)
    batch = inputs(model)
    found = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert found.shape[1] == batch["input_ids"].shape[1] + 4
    row = 2  # the longest has no padding
    start = int((batch["attention_mask"][row] == 0).sum())
    ids, images = batch["input_ids"][row : row + 1, start:], {}
    images = {name: batch[name][1:] for name in ("pixel_values", "tgt_sizes")}
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids, **images).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found[row, start:], ids[0])


# --- a checkpoint in the released form -------------------------------------------------------------------------------


@torch.no_grad()
def test_released_names_come_back_to_the_last_bit(tmp_path):
    model = tiny_model(FAMILY, torch.float32)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    attention, resampler = model.resampler.attn, model.resampler
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert torch.equal(saved["resampler.attn.in_proj_weight"], torch.cat([linear.weight for linear in linears]))
    assert torch.equal(saved["resampler.attn.in_proj_bias"], torch.cat([linear.bias for linear in linears]))
    assert torch.equal(saved["resampler.proj"], resampler.proj.weight.T)
    assert not any("attn.q_proj" in name and "resampler" in name for name in saved)

    released = {name: tensor for name, tensor in saved.items() if "_positions" not in name}
    assert len(saved) - len(released) == 2
    save_file(released, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = from_pretrained(MiniCPMV, tmp_path, torch.float32, "sdpa", "make it again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = inputs(model)
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model, batch))


def test_released_config_is_read():
    """The fields of the released config.json that its code has beside Qwen2's."""
    vision = {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
    config = MiniCPMVConfig.from_dict(
        {
            "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
            "hidden_size": 3584,
            "model_type": "minicpmv",
            "num_attention_heads": 28,
            "rope_theta": 1000000.0,
            "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
            "slice_mode": True,
            "use_image_id": True,
            "version": 2.6,
            "vision_config": vision | {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14},
        }
    )
    assert config.rope_parameters["rope_theta"] == 1000000.0
    assert config.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert (config.query_num, config.resampler_head_dim, config.drop_vision_last_layer) == (64, 128, False)
    layout = minicpm_v_layout(config)
    assert layout.vision is not None and len(layout.vision.blocks) == 27
    assert layout.cross_attentions[0].num_heads == 28


# --- the layout ------------------------------------------------------------------------------------------------------


def rotated(model: nn.Module) -> Layout:
    layout = minicpm_v_layout(model)
    calibration = [inputs(model, seed=2)]
    QUAROT.quantize(model, layout, Recipe("quarot", "float", "float", 0, {}), calibration)
    return layout


def test_resampler_is_rotated(model):
    """A proof of exactness also passes where nothing is transformed."""
    before = model.resampler.row_positions.clone()
    rotated(model)
    resampler = model.resampler
    assert isinstance(resampler.ln_q, RMSNorm) and isinstance(resampler.ln_post, RMSNorm)
    assert isinstance(resampler.ln_kv, AffineNorm) and resampler.ln_kv.rotate
    assert not torch.equal(resampler.row_positions, before)
    assert "row_positions" in dict(resampler.named_buffers()), "a table does not become a parameter"
    gram = resampler.row_positions @ resampler.row_positions.T
    torch.testing.assert_close(gram, before @ before.T, atol=1e-4, rtol=0)


def test_width_of_fc2_has_no_hadamard_matrix_and_is_padded(model):
    width = TINY_VISION["intermediate_size"]
    assert not is_supported(width) and not is_supported(4304)
    layout = rotated(model)
    assert layout.vision is not None
    fc2 = model.get_submodule(layout.vision.blocks[0].mlp_out)
    assert isinstance(fc2.input_transform, OnlineHadamard)
    assert fc2.weight.shape[1] == fc2.input_transform.padded_n > width


def without_positions(layout: Layout) -> Layout:
    def drop(tower: Tower) -> Tower:
        return replace(tower, entry=()) if tower.entry_norm is not None else tower

    return replace(layout, resampler=tuple(drop(tower) for tower in layout.resampler))


def with_swapped_norms(layout: Layout) -> Layout:
    queries, patches, answers = layout.resampler
    assert queries.final_norm is not None
    lie = replace(queries, final_norm=replace(queries.final_norm, readers=(answers.entry[0],)))
    return replace(layout, resampler=(lie, patches, answers))


@pytest.mark.parametrize("lie", [without_positions, with_swapped_norms])
def test_a_lie_about_the_resampler_is_found(lie):
    family = replace(FAMILY, layout=lambda model: lie(minicpm_v_layout(model)), configs={})
    proof = next(proof for proof in proofs(family) if proof.name == "exact quarot")
    assert not outcome_of(proof).ok


@torch.no_grad()
def test_saved_and_loaded_quantized_model_is_the_same(tmp_path):
    """The rotated position tables are buffers: they must come back too."""
    model, fresh = (tiny_model(FAMILY, torch.float32) for _ in range(2))
    layout, recipe = minicpm_v_layout(model), Recipe("quarot", "w8a8", "w4a8", 0, {})
    report = QUAROT.quantize(model, layout, recipe, [inputs(model, seed=2)])
    save_quantized(model, report, recipe, tmp_path, "tiny")
    load_quantized(tmp_path, LoadedModel("tiny", fresh, None, layout))
    batch = inputs(model)
    assert torch.equal(outputs(fresh, batch), outputs(model, batch))


# --- slices ----------------------------------------------------------------------------------------------------------


RULE = SliceRule()
PORT = MiniCPMV4_6ImageProcessor()
"""Transformers' port of a later version: the same rules, but sides are multiples of ``4 * patch_size``."""
QUARTER_PATCH = RULE.patch_px / 4


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_sizes_are_those_of_the_port(width, height):
    assume(max(width, height) < 100 * min(width, height))
    image = Image.new("RGB", (width, height))
    found = cut_slices(image, RULE)
    size, area = (height, width), (RULE.slice_px, QUARTER_PATCH)
    grid = PORT.get_sliced_grid(size, RULE.max_slices, RULE.slice_px)
    assert found.pictures[0].size == PORT.find_best_resize(size, *area, allow_upscale=grid is None)[::-1]
    if grid is None:
        assert len(found.pictures) == 1 and found.columns == found.rows == 0
        return
    assert [found.rows, found.columns] == grid
    height, width = PORT.get_refine_size(size, grid, *area, allow_upscale=True)
    assert {slice.size for slice in found.pictures[1:]} == {(width // grid[1], height // grid[0])}
    assert len(found.pictures) == 1 + grid[0] * grid[1] <= 10


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).round().astype(np.uint8))


def test_slices_stand_row_by_row():
    found = cut_slices(gradient(1200, 900), RULE)
    assert (found.columns, found.rows) == (3, 2)
    reds, greens = np.array([np.asarray(slice).mean((0, 1))[:2] for slice in found.pictures[1:]]).T
    assert (np.diff(reds.reshape(2, 3), axis=1) > 50).all() and (np.diff(greens.reshape(2, 3), axis=0) > 50).all()


def test_strips_are_the_patches_of_the_port():
    small, large = gradient(28, 42), gradient(56, 28)
    strips, sizes = patch_strips([small, large], RULE)
    assert sizes.tolist() == [[3, 2], [2, 4]]
    for strip, image in zip(strips, (small, large), strict=True):
        pixels = torch.from_numpy((np.asarray(image, np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)
        expected = PORT.reshape_by_patch(pixels, 14)
        assert torch.equal(strip[..., : expected.shape[-1]], expected)
    assert torch.equal(strips[0, ..., -14:], strips[0, ..., :14]), "the first patch is repeated"


def test_a_very_narrow_image_is_refused():
    with pytest.raises(DatasetError, match="5000 x 1 pixels is too narrow"):
        cut_slices(Image.new("RGB", (5000, 1)), RULE)


def test_some_benchmarks_enlarge_images_always_alike():
    image = gradient(300, 200)
    assert enlarged(image, "TextVQA_VAL") is image and enlarged(image, None) is image
    large = enlarged(image, "OCRBench")
    assert large.size == enlarged(image, "OCRBench").size
    assert 300 <= large.width <= 1645 and large.height == int(large.width / 300 * 200)
    assert len({enlarged(gradient(300 + step, 200), "OCRBench").width for step in range(5)}) > 1
    assert enlarged(Image.new("RGB", (1344, 1344)), "OCRBench").size == (1344, 1344)


def test_slices_give_as_many_tokens_as_the_blueprint_says():
    blueprint = load_blueprint("minicpm-v-2.6")
    for width, height in ((224, 224), (448, 448), (449, 448), (1000, 700), (1344, 1344), (3000, 400)):
        tokens = 64 * len(cut_slices(Image.new("RGB", (width, height)), RULE).pictures)
        assert tokens == visual_tokens(blueprint, height, width)


# --- adapter ---------------------------------------------------------------------------------------------------------

SPECIAL = (
    *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<slice>", "</slice>"),
    *("<image_id>", "</image_id>"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_PIXELS = {"max_slice_nums": 9, "scale_resolution": 16, "patch_size": 4, "image_feature_size": 4, "version": 2.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model with the files of the released repository."""
    path = tmp_path_factory.mktemp("models") / "minicpm-v-2.6"
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATE, **names).save_pretrained(path)
    config = FAMILY.tiny_config()
    config.vocab_size = len(alphabet) + len(SPECIAL)
    config.image_token_id = 5  # like the released config, it does not know the tokenizer's
    model = tiny_model(replace(FAMILY, tiny_config=lambda: config), torch.float32)
    model.save_pretrained(path)
    colours = {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(TINY_PIXELS | colours))
    tokenizer_config = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer_config["tokenizer_class"] = "MiniCPMVTokenizer"
    tokenizer_config["auto_map"] = {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


@pytest.fixture(scope="module")
def loaded(folder) -> LoadedModel:
    return ADAPTERS[0].load(folder, "cpu", torch.float32)


def picture(folder: Path, width: int, height: int) -> str:
    path = folder / f"{width}x{height}.png"
    gradient(width, height).save(path)
    return str(path)


def message(*parts: str) -> Message:
    return [{"type": "image" if part.endswith(".png") else "text", "value": part} for part in parts]


def test_registered_name(folder):
    assert [adapter.name for adapter in ADAPTERS] == ["minicpm-v-2.6"]
    assert ADAPTERS[0].find_weights(folder.parent) == folder


def test_load_needs_no_remote_code_and_asks_the_tokenizer(loaded):
    tokenizer = loaded.processor.tokenizer
    placeholder, *terminators = tokenizer.convert_tokens_to_ids(["<unk>", "<|im_end|>", "<|endoftext|>"])
    assert loaded.layout.image_token_id == loaded.model.config.image_token_id == placeholder == 256
    assert loaded.model.generation_config.eos_token_id == terminators
    assert loaded.processor.rule == SliceRule(16, 9, 4)
    assert loaded.model.vpm.config._attn_implementation == "sdpa"


def test_weights_load_in_half_precision(folder):
    model = ADAPTERS[0].load(folder, "cpu", torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rows, columns = sine_positions(*model.resampler.row_positions.shape)
    torch.testing.assert_close(model.resampler.row_positions.float(), rows, atol=4e-3, rtol=0)
    torch.testing.assert_close(model.resampler.column_positions.float(), columns, atol=4e-3, rtol=0)


def test_prompt_is_that_of_the_released_processor(loaded, tmp_path):
    """An image takes a line; its rows of slices take a line each, the first beside the overview."""
    prompt = message("Look:", picture(tmp_path, 36, 24), picture(tmp_path, 12, 12), "What is it?")
    batch = ADAPTERS[0].encode(loaded, [prompt])
    tokens = "<unk>" * 4
    cut = f"<slice>{tokens}</slice>"
    expected = (
        f"<|im_start|>user\nLook:\n<image_id>0</image_id><image>{tokens}</image>{cut}{cut}\n{cut}{cut}\n"
        f"<image_id>1</image_id><image>{tokens}</image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.processor.tokenizer.decode(batch["input_ids"][0]) == expected
    assert batch["pixel_values"].shape[:3] == (6, 3, 4)
    assert batch["tgt_sizes"].shape == (6, 2)


@torch.no_grad()
def test_a_batch_is_its_rows(loaded, tmp_path):
    prompts = [
        message(picture(tmp_path, 36, 24), "a"),
        message("nothing to see"),
        message(picture(tmp_path, 9, 40), "b"),
    ]
    batch = ADAPTERS[0].encode(loaded, prompts, answers=["yes", "no", "so"])
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"][1, 0] == 0)
    together = loaded.model(**batch).logits[:, -1]
    for row, (prompt, answer) in enumerate(zip(prompts, ("yes", "no", "so"), strict=True)):
        alone = loaded.model(**ADAPTERS[0].encode(loaded, [prompt], answers=[answer])).logits[0, -1]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
    assert all(isinstance(answer, str) for answer in ADAPTERS[0].generate(loaded, batch, 3))


def test_a_text_with_the_placeholder_is_refused(loaded):
    with pytest.raises(DatasetError, match="<unk> itself"):
        ADAPTERS[0].encode(loaded, [message("what does <unk> mean?")])


def test_images_beyond_the_limit_of_tokens_are_refused(loaded, tmp_path):
    with pytest.raises(DatasetError, match="first 8192 tokens"):
        ADAPTERS[0].encode(loaded, [message("x" * 9000, picture(tmp_path, 12, 12))])
