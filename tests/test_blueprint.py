"""Counts of the paper's models, against closed forms, transformers' whole models, checkpoints and the paper."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fakes.repository import ROOT
from mqbench.harness.blueprint import (
    FOLDER,
    Blueprint,
    VisionSpec,
    blueprint_names,
    load_blueprint,
    load_blueprints,
    read_blueprint,
)
from mqbench.harness.blueprint_count import build_parts, llm_flops, num_params, num_view_tokens, visual_flops
from mqbench.harness.blueprint_modules import PlainBlock
from mqbench.harness.blueprint_records import blueprint_records, model_size
from mqbench.harness.blueprint_tokens import visual_tokens
from mqbench.harness.errors import RequestError, UnknownNameError

NAMES = blueprint_names()
PAPER_TOLERANCE = 0.02
EXPLAINED = {("glm-4v-9b", "llm_params_b"), ("glm-4v-9b", "visual_tflops")}
"""Figures of Table 19 that differ by more; the blueprint's explanation says why."""

CHECKPOINT_PARAMS = {
    "internvl2-8b": 16150730752 // 2,
    "qwen-vl-chat": 9656935168,
    "minicpm-v-2.6": 8099175152,
    "qwen2-vl-2b": 2208985600,
    "qwen2-vl-7b": 16582751232 // 2,
    "qwen2-vl-72b": 73405560320,
    "glm-4v-9b": 13906320896,
}
"""Parameters of the released checkpoints as others counted them, see ``sources`` of the blueprints."""


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + bias * outputs


def block_weights(vision: VisionSpec) -> int:
    return 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size


def tower_params(vision: VisionSpec) -> int:
    """Blocks with biases and two LayerNorms; then what each tower has beside them."""
    width = vision.hidden_size
    block = block_weights(vision) + 4 * width + vision.intermediate_size + width + 4 * width
    patch = linear(3 * vision.patch_size**2, width)
    learned = vision.num_positions * width
    beside = {
        "internvit": patch + learned + width + vision.num_layers * 2 * width,  # class token, layer scales
        "siglip": patch + learned + 2 * width,  # last norm
        "clip": patch - width + learned + width + 4 * width,  # no bias; class token; first and last norm
        "qwen2_vl": 2 * (patch - width),  # two frames, no bias
        "plain": patch + learned + (width if vision.class_token else -width + 2 * width),
    }
    return vision.num_layers * block + beside[vision.kind]


def projector_params(blueprint: Blueprint) -> int:
    spec = blueprint.projector
    inputs, width = spec.input_size, spec.hidden_size
    if spec.kind == "resampler":
        vectors = spec.num_queries + spec.stored_positions + 3 * 2  # three norms
        return inputs * width + 5 * width**2 + 4 * width + vectors * width
    if spec.kind == "merger":
        return 2 * inputs + linear(4 * inputs, 4 * inputs) + linear(4 * inputs, width)
    if spec.kind == "conv_glu":
        return linear(4 * inputs, width) + width**2 + 3 * width * spec.intermediate_size + (2 + 2) * width
    return linear(inputs, width) + linear(width, width) + (2 * inputs if spec.kind == "pixel_shuffle" else 0)


def llm_weights(blueprint: Blueprint) -> int:
    """Matrices that multiply every token: blocks and output layer."""
    spec = blueprint.llm
    key_value = spec.hidden_size // spec.num_heads * spec.num_key_value_heads
    block = spec.hidden_size * (2 * spec.hidden_size + 2 * key_value + 3 * spec.intermediate_size)
    return spec.num_layers * block + spec.vocab_size * spec.hidden_size


def llm_params(blueprint: Blueprint) -> int:
    spec = blueprint.llm
    key_value = spec.hidden_size // spec.num_heads * spec.num_key_value_heads
    biases = spec.hidden_size + 2 * key_value if spec.kind in ("qwen2", "glm") else 0
    vectors = spec.num_layers * (biases + 2 * spec.hidden_size) + spec.hidden_size
    return llm_weights(blueprint) + vectors + (0 if spec.tied else spec.vocab_size * spec.hidden_size)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_follow_the_closed_forms(name: str) -> None:
    blueprint = load_blueprint(name)
    parts = build_parts(blueprint)
    assert num_params(parts.tower) == tower_params(blueprint.vision)
    assert num_params(parts.projector) == projector_params(blueprint)
    assert num_params(parts.llm) == llm_params(blueprint)
    assert all(parameter.is_meta for part in vars(parts).values() for parameter in part.parameters())


@pytest.mark.parametrize("name", sorted(CHECKPOINT_PARAMS))
def test_parameters_equal_the_checkpoints(name: str) -> None:
    assert sum(map(num_params, vars(build_parts(load_blueprint(name))).values())) == CHECKPOINT_PARAMS[name]


def test_glm_vision_transformer_equals_the_checkpoint() -> None:
    assert num_params(build_parts(load_blueprint("glm-4v-9b")).tower.get_submodule("blocks")) == 4279387392


def projector_flops(blueprint: Blueprint, num_patches: int) -> tuple[int, int]:
    spec = blueprint.projector
    inputs, width, tokens = spec.input_size, spec.hidden_size, num_patches // 4
    if spec.kind == "resampler":
        keys = num_patches * (inputs * width + 2 * width**2)
        return 2 * (keys + 3 * spec.num_queries * width**2), 4 * spec.num_queries * num_patches * width
    if spec.kind == "merger":
        return 2 * tokens * (4 * inputs) * (4 * inputs + width), 0
    if spec.kind == "conv_glu":
        return 2 * tokens * (4 * inputs * width + width**2 + 3 * width * spec.intermediate_size), 0
    return 2 * (tokens if spec.kind == "pixel_shuffle" else num_patches) * width * (inputs + width), 0


@pytest.mark.parametrize("name", NAMES)
def test_visual_flops_follow_the_closed_form(name: str) -> None:
    blueprint = load_blueprint(name)
    vision, side = blueprint.vision, blueprint.input.view_px
    patches = (side // vision.patch_size) ** 2
    has_class = vision.kind in ("internvit", "clip") or (vision.kind == "plain" and vision.class_token)
    tokens = patches + has_class
    frames = 2 if vision.kind == "qwen2_vl" else 1
    embed = 2 * patches * frames * 3 * vision.patch_size**2 * vision.hidden_size
    linear_flops, attention = projector_flops(blueprint, patches)
    flops = visual_flops(blueprint, side)
    assert flops.linear == linear_flops + embed + 2 * tokens * vision.num_layers * block_weights(vision)
    assert flops.attention == attention + 4 * tokens**2 * vision.hidden_size * vision.num_layers


@pytest.mark.parametrize("name", NAMES)
def test_llm_flops_follow_the_closed_form(name: str) -> None:
    blueprint, tokens = load_blueprint(name), 37
    spec = blueprint.llm
    head_size = spec.hidden_size // spec.num_heads
    angles = tokens * (head_size // 2 if spec.kind == "glm" else head_size)
    flops = llm_flops(blueprint, tokens)
    assert flops.linear == 2 * tokens * llm_weights(blueprint)
    assert flops.attention == 4 * tokens**2 * spec.hidden_size * spec.num_layers + angles


def test_transformers_whole_qwen2_vl_agrees() -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    blueprint = load_blueprint("qwen2-vl-7b")
    spec = blueprint.llm
    sizes = {"hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size}
    heads = {"num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_key_value_heads}
    text = {**sizes, **heads, "num_hidden_layers": spec.num_layers, "vocab_size": spec.vocab_size}
    config = Qwen2VLConfig(text_config=text, vision_config={"hidden_size": spec.hidden_size}, tie_word_embeddings=False)
    with torch.device("meta"):
        whole = Qwen2VLForConditionalGeneration(config)
    parts = build_parts(blueprint)
    assert num_params(whole.model.visual) == num_params(parts.tower) + num_params(parts.projector)
    assert num_params(whole.model.language_model) + num_params(whole.lm_head) == num_params(parts.llm)


def test_transformers_whole_internvl_and_llava_agree() -> None:
    from transformers import (
        CLIPVisionConfig,
        InternVLConfig,
        InternVLForConditionalGeneration,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    internvl, llava = load_blueprint("internvl2-8b"), load_blueprint("llava-1.5-13b")
    text = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 92553}
    wide = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        image_size=336,
    )  # fmt: skip
    with torch.device("meta"):
        whole_internvl = InternVLForConditionalGeneration(
            InternVLConfig(
                text_config=LlamaConfig(**text), vision_config={"attention_bias": True}, tie_word_embeddings=False
            )
        )
        whole_llava = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=clip, text_config=LlamaConfig(**wide), tie_word_embeddings=False)
        )
    assert num_params(whole_internvl) == sum(map(num_params, vars(build_parts(internvl)).values()))
    assert num_params(whole_llava) == sum(map(num_params, vars(build_parts(llava)).values()))


def test_plain_block_computes_what_torch_computes() -> None:
    spec = replace(load_blueprint("qwen-vl-chat").vision, hidden_size=24, intermediate_size=40, num_heads=3)
    torch.manual_seed(0)
    block = PlainBlock(spec).double()
    theirs = nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu", batch_first=True, norm_first=True).double()
    names = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.proj.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
    }
    state = block.state_dict()
    renamed = {}
    for name in theirs.state_dict():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[name] = state[names.get(prefix, "") + name.removeprefix(prefix)]
    theirs.load_state_dict(renamed)
    hidden = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(block(hidden), theirs(hidden), rtol=0, atol=1e-9)


def table_19() -> dict[str, dict[str, str]]:
    with (ROOT / "results" / "paper" / "table19.csv").open() as stream:
        return {row["model"]: row for row in csv.DictReader(stream)}


@pytest.mark.parametrize("name", sorted(table_19()))
def test_agrees_with_the_paper_or_explains(name: str) -> None:
    blueprint, row = load_blueprint(name), table_19()[name]
    metrics = model_size(blueprint).metrics
    figures = ("visual_params_b", "llm_params_b", "visual_tflops", "llm_tflops")
    ratios = {figure: metrics[figure] / float(row[figure]) for figure in figures}
    apart = {(name, figure) for figure, ratio in ratios.items() if abs(ratio - 1) > PAPER_TOLERANCE}
    assert apart == {pair for pair in EXPLAINED if pair[0] == name}
    assert blueprint.explanation or not apart
    assert row["vision_norm"] == f"{blueprint.vision.norm}-LN"


def test_what_the_explanation_of_glm_says() -> None:
    blueprint = load_blueprint("glm-4v-9b")
    metrics = model_size(blueprint).metrics
    whole = replace(blueprint.paper_input, share=1.0)
    assert metrics["llm_without_embedding_params_b"] == pytest.approx(8.78, abs=0.005)
    assert visual_flops(blueprint, 1120).total(whole) / 1e12 == pytest.approx(73.96, abs=0.005)
    assert llm_flops(blueprint, 1600).total(whole) / 1e12 == pytest.approx(29.77, abs=0.005)
    assert 12.10 / metrics["visual_tflops"] == pytest.approx(1.022, abs=0.001)


@pytest.mark.parametrize("name", sorted(table_19()))
def test_both_inputs_are_256_visual_tokens(name: str) -> None:
    blueprint = load_blueprint(name)
    assert blueprint.input.views * num_view_tokens(blueprint, blueprint.input.view_px) == 256
    paper = blueprint.paper_input
    tokens = paper.views * num_view_tokens(blueprint, paper.view_px) * paper.share
    assert tokens == (512 if name == "internvl2-8b" else 256)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_heads = 16", "num_head = 16", r"section \[vision\]"),
        ("[image]", "[imgae]", "no blueprint"),
        ("title =", "titel =", "no blueprint"),
        ("views = 1", "views = ", "no blueprint"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((FOLDER / "qwen2-vl-2b.toml").read_text().replace(old, new, 1))
    with pytest.raises(RequestError, match=message) as caught:
        read_blueprint(path)
    assert "mine.toml" in str(caught.value)


def test_unknown_names_are_told() -> None:
    blueprint = load_blueprint("qwen2-vl-2b")
    with pytest.raises(UnknownNameError, match="qwen2-vl-7b"):
        load_blueprint("qwen2-vl-7")
    with pytest.raises(UnknownNameError, match="model_size"):
        blueprint_records(["qwen2-vl-2b"], ["model_sizes"])
    with pytest.raises(UnknownNameError, match="slices"):
        visual_tokens(replace(blueprint, image={"rule": "slice"}), 28, 28)
    with pytest.raises(UnknownNameError, match="siglip"):
        build_parts(replace(blueprint, vision=replace(blueprint.vision, kind="sigli")))


def test_every_blueprint_names_its_sources() -> None:
    assert all(blueprint.sources and blueprint.title for blueprint in load_blueprints())
