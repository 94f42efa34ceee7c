"""Adapters of GLM-4V-9B and CogVLM2: folders in the released form, prompts, pixels, answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fakes.native_checks import check_batch, check_greedy, message
from fakes.native_folders import byte_tokenizer
from fakes.tiktoken_ranks import learn_ranks, write_ranks
from mqbench.harness import discover
from mqbench.harness.errors import DatasetError, MissingWeightsError
from mqbench.harness.models import cogvlm2, glm_4v
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import tiny_model
from mqbench.harness.models.one_image import CLIP_MEAN, CLIP_STD, OneImageAdapter, square_pixels, text_and_image

PATCHES = 4
GLM_SPECIAL = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
)
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
RANKS = learn_ranks(glm_4v.TOKEN_PATTERN)


def write_glm(folder: Path) -> Path:
    """Sizes of the tiny family with a vocabulary of its own, as save_pretrained and THUDM write it."""
    folder.mkdir(parents=True)
    ids = {token: len(RANKS) + index for index, token in enumerate(GLM_SPECIAL)}
    config = glm_4v.FAMILY.tiny_config()
    config.padded_vocab_size = len(RANKS) + len(GLM_SPECIAL) + 5
    config.image_token_id = config.padded_vocab_size - 1
    config.boi_token_id, config.eoi_token_id = ids["<|begin_of_image|>"], ids["<|end_of_image|>"]
    config.eos_token_id = config.pad_token_id = ids["<|endoftext|>"]
    save(folder, glm_4v.FAMILY, config)
    write_ranks(folder / "tokenizer.model", RANKS)
    decoder = {str(index): {"content": token, "special": True} for token, index in reversed(ids.items())}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return folder


def write_cogvlm2(folder: Path) -> Path:
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer(LLAMA_SPECIAL, bos="<|begin_of_text|>", eos_token="<|end_of_text|>")
    config = cogvlm2.FAMILY.tiny_config()
    config.vocab_size = len(tokenizer)
    bos, eos, visual, eoi = tokenizer.convert_tokens_to_ids(list(LLAMA_SPECIAL))
    config.bos_token_id, config.eos_token_id, config.image_token_id, config.eoi_token_id = bos, eos, visual, eoi
    config.pad_token_id = visual
    save(folder, cogvlm2.FAMILY, config)
    tokenizer.save_pretrained(folder)
    return folder


def save(folder: Path, family: Any, config: Any) -> None:
    model: Any = tiny_model(replace(family, tiny_config=lambda: config), torch.float32)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)


WRITERS: dict[str, Callable[[Path], Path]] = {"glm-4v-9b": write_glm, "cogvlm2": write_cogvlm2}
ADAPTERS: dict[str, OneImageAdapter] = {"glm-4v-9b": glm_4v.ADAPTERS[0], "cogvlm2": cogvlm2.ADAPTERS[0]}


@pytest.fixture(scope="module", params=WRITERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def adapter(name: str) -> OneImageAdapter:
    return ADAPTERS[name]


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[name](tmp_path_factory.mktemp("models") / name)


@pytest.fixture(scope="module")
def loaded(adapter: OneImageAdapter, folder: Path) -> LoadedModel:
    return adapter.load(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "image.png"
    noise = np.random.default_rng(0).integers(0, 256, (21, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


@pytest.fixture
def messages(image: str) -> list[Message]:
    return [message(image, "one"), message("no image"), message(image, "a longer question")]


def test_registered(name: str, adapter: OneImageAdapter) -> None:
    assert discover.find_model(name) == adapter


def test_glm_prompt(image: str, tmp_path: Path) -> None:
    """[gMASK]<sop><|user|>, line end, begin, patches, end, text, <|assistant|>: as the released chat template."""
    adapter = ADAPTERS["glm-4v-9b"]
    loaded = adapter.load(write_glm(tmp_path / "glm"), "cpu", torch.float32)
    batch = adapter.encode(loaded, [message(image, "the theme <|user|>?")])
    tokenizer, config = loaded.processor.tokenizer, loaded.model.config
    ids = batch["input_ids"][0].tolist()
    before, after = ids[:4], ids[4 + PATCHES + 2 :]
    assert tokenizer.decode(before) == "[gMASK]<sop><|user|>\n"
    assert ids[4 : 4 + PATCHES + 2] == [config.boi_token_id, *[config.image_token_id] * PATCHES, config.eoi_token_id]
    assert tokenizer.decode(after) == "the theme <|user|>?<|assistant|>"
    assert after.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 0
    assert config.image_token_id != tokenizer.pad_token_id
    whole = adapter.encode(loaded, [message(image, "the theme <|user|>?")], ["yes"])
    assert tokenizer.decode(whole["input_ids"][0, len(ids) :]) == "\nyes"


def test_cogvlm2_prompt(image: str, tmp_path: Path) -> None:
    """Begin, the image, question and answer; padding is another id than the placeholder of visual tokens."""
    adapter = ADAPTERS["cogvlm2"]
    loaded = adapter.load(write_cogvlm2(tmp_path / "cogvlm2"), "cpu", torch.float32)
    batch = adapter.encode(loaded, [message(image, "What?"), message("Why not?")], ["yes", "no"])
    tokenizer, config = loaded.processor.tokenizer, loaded.model.config
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    first, second = (row[mask].tolist() for row, mask in rows)
    assert first[: PATCHES + 3] == [config.bos_token_id, *[config.image_token_id] * (1 + PATCHES), config.eoi_token_id]
    assert tokenizer.decode(first[PATCHES + 3 :]) == "Question: What? Answer:yes"
    assert tokenizer.decode(second) == "<|begin_of_text|>Question: Why not? Answer:no"
    assert int((batch["input_ids"] == config.image_token_id).sum()) == 1 + PATCHES


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [("MME", "a\nb\nShort Answer."), ("ScienceQA_TEST", "a\nb\nShort Answer."), ("OCRBench", "a\nb")],
)
def test_texts_are_joined_and_the_first_image_is_taken(dataset: str, expected: str) -> None:
    items = [{**item, "dataset": dataset} for item in message("a", "1.png", "b", "2.png")]
    assert text_and_image(items) == (expected, "1.png")


def test_pixels_are_clips(image: str) -> None:
    with Image.open(image) as file:
        square = file.resize((32, 32), Image.Resampling.BICUBIC)
        pixels = square_pixels(file, 32)
    red, green, blue = square.getpixel((5, 7))
    for channel, value in enumerate((red, green, blue)):
        expected = (value / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        assert pixels[channel, 7, 5].item() == pytest.approx(expected, abs=1e-6)


def test_visual_tokens_of_released_sizes(adapter: OneImageAdapter, loaded: LoadedModel) -> None:
    assert adapter.visual_tokens(loaded.processor, 20, 300) == PATCHES
    config = type(loaded.model.config)()
    assert config.vision_config.num_patches == {"chatglm": 1600, "cogvlm": 2304}[config.model_type]


def test_batches(adapter: OneImageAdapter, loaded: LoadedModel, messages: list[Message], monkeypatch: Any) -> None:
    check_batch(adapter, loaded, messages)
    check_greedy(adapter, loaded, messages, monkeypatch)


def test_unreadable_image_is_named(adapter: OneImageAdapter, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        adapter.encode(loaded, [message(str(tmp_path / "broken.png"), "?")])


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer"])
def test_a_missing_file_is_named(adapter: OneImageAdapter, folder: Path, tmp_path: Path, missing: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = next(path for path in copy.iterdir() if path.name in (missing, f"{missing}.model", f"{missing}.json"))
    file.unlink()
    with pytest.raises(MissingWeightsError, match=rf"lacks {file.name}; put THUDM/") as caught:
        adapter.load(copy, "cpu", torch.float32)
    assert "\n" not in str(caught.value)


def test_found_below_the_models_folder(name: str, adapter: OneImageAdapter, folder: Path) -> None:
    assert adapter.find_weights(folder.parent) == folder
