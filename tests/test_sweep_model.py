"""Architectures by name and by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mqbench.harness.errors import RequestError, UnknownNameError
from mqbench.harness.sweep.model import STANDIN_FOLDER, find_sweep_model, known_models
from mqbench.harness.sweep.protocol import ImageRules

RELEASED: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "rope_theta": 1000000.0,
    "image_token_id": 390,
    "video_token_id": 391,
    "vision_start_token_id": 392,
    "vision_end_token_id": 393,
    "vision_config": {
        "depth": 2,
        "embed_dim": 64,
        "mlp_ratio": 4,
        "num_heads": 2,
        "hidden_size": 256,
        "patch_size": 14,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Laid out as the released checkpoints' config.json: the LLM's entries at the top."""


def write(folder: Path, data: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_known_models() -> None:
    assert set(known_models()) == {"standin-qwen2-vl", "qwen2-vl-2b", "qwen2-vl-7b", "qwen2-vl-72b"}


@pytest.mark.parametrize("name", known_models())
def test_known_models_can_be_made(name: str) -> None:
    model = find_sweep_model(name, None, {})
    model.check()
    assert model.name == name


@pytest.mark.parametrize(("name", "billions"), [("qwen2-vl-2b", 2.2), ("qwen2-vl-7b", 8.29), ("qwen2-vl-72b", 73.41)])
def test_sizes_are_those_of_the_checkpoints(name: str, billions: float) -> None:
    from mqbench.harness.runtime.family import family_of

    config = find_sweep_model(name, None, {}).build_config()
    parameters = sum(one.numel() for one in family_of(config).empty_model(config).parameters())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_file_of_a_released_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "qwen-small"
    folder.mkdir()
    write(folder, {"min_pixels": 3136, "max_pixels": 78400}, "preprocessor_config.json")
    model = find_sweep_model(None, write(folder, RELEASED), {})
    assert model.name == "qwen-small", "config.json says nothing, its folder does"
    assert model.rules == ImageRules(14, 2, 3136, 78400)
    model.check()
    config = model.build_config()
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (256, 3)
    assert config.vision_config.depth == 2 and config.image_token_id == 390


def test_file_without_a_preprocessor_has_the_released_limits(tmp_path: Path) -> None:
    assert find_sweep_model(None, write(tmp_path, RELEASED), {}).rules == ImageRules(14, 2, 3136, 12845056)


def test_changes_make_another_model() -> None:
    plain = find_sweep_model("standin-qwen2-vl", None, {})
    changed = find_sweep_model("standin-qwen2-vl", None, {"text_config.num_hidden_layers": 2}, max_px=12544)
    assert changed.name == "standin-qwen2-vl[max_pixels=12544,text_config.num_hidden_layers=2]"
    assert changed.rules.max_px == 12544 and changed.sha256 != plain.sha256
    changed.check()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is of model_type None"),
        ({"model_type": "llama"}, "is of model_type 'llama'; sweeps know 'qwen2_vl' only"),
        ({"model_type": "qwen2_vl", "text_config": {}}, "lacks 'vision_config'"),
    ],
)
def test_files_that_are_no_configuration(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        find_sweep_model(None, write(tmp_path, data), {})


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("text_config.layers", 2, UnknownNameError, "unknown entry of the configuration 'layers'"),
        ("llm.num_hidden_layers", 2, UnknownNameError, "unknown part of the configuration 'llm'"),
        ("text_config.num_hidden_layers", True, RequestError, "must be of type int"),
        ("text_config.num_hidden_layers", "2x", RequestError, "must be of type int"),
    ],
)
def test_wrong_changes(key: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_sweep_model("standin-qwen2-vl", None, {key: value})


def test_sizes_that_do_not_fit_are_found_before_anything_runs() -> None:
    with pytest.raises(RequestError, match=r"heads of .* are 64 wide, its mrope_section needs 32"):
        find_sweep_model("standin-qwen2-vl", None, {"text_config.num_attention_heads": 3}).check()
    with pytest.raises(RequestError, match="no model can be made"):
        find_sweep_model("standin-qwen2-vl", None, {"vision_config.num_heads": 0}).check()


def test_one_source_only() -> None:
    for name, file in ((None, None), ("standin-qwen2-vl", STANDIN_FOLDER / "config.json")):
        with pytest.raises(RequestError, match="either --model or --config"):
            find_sweep_model(name, file, {})
