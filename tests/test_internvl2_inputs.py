"""InternVL2's adapter: inputs against VLMEvalKit, the tokenizer against SentencePiece, files, greedy answers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from fakes.native_checks import DAMAGES, check_answers, check_batch, check_damage, check_greedy, message
from fakes.qwen2_vl_folder import write_image
from fakes.sentencepiece_folder import write_tokenizer
from mqbench.harness.blueprint import load_blueprint
from mqbench.harness.blueprint_tokens import visual_tokens
from mqbench.harness.errors import DatasetError, MissingWeightsError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import tiny_model
from mqbench.harness.models.internvl2 import ADAPTERS, FAMILY, SYSTEM, TileProcessor
from mqbench.harness.models.sentencepiece_file import SentencePieceTokenizer
from mqbench.harness.vlmeval_kit.library import vlmeval_module

(ADAPTER,) = ADAPTERS
TILE_PX, TOKENS_PER_TILE = 32, 4
ADDED = ("<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "internvl2-8b"
    path.mkdir()
    config: Any = FAMILY.tiny_config()
    config.llm_config.vocab_size = write_tokenizer(path, ADDED)
    model: Any = tiny_model(replace(FAMILY, tiny_config=lambda: config), torch.float32)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return ADAPTER.load(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[Message]:
    """Two images; none; one."""
    path = tmp_path_factory.mktemp("images")
    sizes = ((32, 32), (64, 30), (30, 70))
    first, second, third = (write_image(path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes))
    return [message(first, "one", second, "two?"), message("no image"), message("a longer question", third)]


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_released_conversation(loaded: LoadedModel, tmp_path: Path) -> None:
    """One image stands in front; its tiles are in one pair of markers; nothing but markers between the turns."""
    path = write_image(tmp_path / "image.png", 64, 32)
    batch = ADAPTER.encode(loaded, [message("What is it?", path), message("Why {so}?")])
    texts = [loaded.processor.tokenizer.decode(row[mask.bool()]) for row, mask in zip(*batch_ids(batch), strict=True)]
    image = f"<img>{'<IMG_CONTEXT>' * (3 * TOKENS_PER_TILE)}</img>"
    around = (f"<s><|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n", "<|im_end|><|im_start|>assistant\n")
    assert texts == [f"{image}\nWhat is it?".join(around), "Why {so}?".join(around)]
    assert int((batch["input_ids"] == loaded.layout.image_token_id).sum()) == 3 * TOKENS_PER_TILE


def batch_ids(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["input_ids"], batch["attention_mask"]


def test_pixels_are_vlmevalkits(loaded: LoadedModel, tmp_path: Path) -> None:
    utils = vlmeval_module("vlmeval.vlm.internvl.utils")
    for index, size in enumerate([(100, 50), (50, 190), (33, 31), (20, 20)]):
        path = write_image(tmp_path / f"{index}.png", *size, seed=index)
        pixels = ADAPTER.encode(loaded, [message("?", path)])["pixel_values"]
        expected = utils.load_image(path, input_size=TILE_PX, max_num=6)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
        assert ADAPTER.visual_tokens(loaded.processor, *size[::-1]) == len(pixels) * TOKENS_PER_TILE


def test_limits_by_dataset(loaded: LoadedModel, tmp_path: Path) -> None:
    path = write_image(tmp_path / "wide.png", 24 * TILE_PX, TILE_PX)
    tiles = {
        dataset: len(
            ADAPTER.encode(loaded, [[{**item, "dataset": dataset} for item in message("?", path)]])["pixel_values"]
        )
        for dataset in ("TextVQA_VAL", "DocVQA_VAL", "OCRBench")
    }
    assert tiles == {"TextVQA_VAL": 7, "DocVQA_VAL": 19, "OCRBench": 25}


def test_visual_tokens_are_the_blueprints_at_twelve_tiles(loaded: LoadedModel) -> None:
    processor = TileProcessor(loaded.processor.tokenizer, 448, 256)
    blueprint = load_blueprint("internvl2-8b")
    for height, width in ((448, 448), (1000, 600), (480, 3000)):
        found = ADAPTER.visual_tokens(processor, height, width, "ChartQA_TEST")
        assert found == visual_tokens(blueprint, height, width)


def test_unreadable_image_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        ADAPTER.encode(loaded, [message(str(tmp_path / "broken.png"), "?")])


def test_batches(loaded: LoadedModel, messages: list[Message]) -> None:
    check_batch(ADAPTER, loaded, messages)
    check_answers(ADAPTER, loaded, messages)


def test_generate_is_greedy(loaded: LoadedModel, messages: list[Message], monkeypatch: pytest.MonkeyPatch) -> None:
    check_greedy(ADAPTER, loaded, messages, monkeypatch)


# --- tokenizer -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(ADDED), st.text(st.characters(exclude_categories=["Cs"]))), max_size=6))
def test_texts_come_back(folder: Path, parts: list[str]) -> None:
    """Between added tokens every piece is what SentencePiece makes of it alone."""
    tokenizer, pieces = tokenizers(folder)
    merged: list[str] = []
    for part in parts:  # neighbouring texts are one piece
        glue = merged and part not in ADDED and merged[-1] not in ADDED
        merged = [*merged[:-1], merged[-1] + part] if glue else [*merged, part]
    text = "".join(merged).replace("\0", "")
    ids = tokenizer(text)["input_ids"]
    expected = [400 + ADDED.index(part) if part in ADDED else pieces.encode(part.replace("\0", "")) for part in merged]
    assert ids == [1, *(index for item in expected for index in (item if isinstance(item, list) else [item]))]
    assert tokenizer.decode(ids) == "<s>" + text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(
        part for part in merged if part not in ADDED
    ).replace("\0", "")


def tokenizers(folder: Path) -> tuple[SentencePieceTokenizer, SentencePieceProcessor]:
    return SentencePieceTokenizer(folder, "get it"), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["no config", "no weights", "half a file", "another family", "config is no JSON"])
def test_damaged_folders(folder: Path, tmp_path: Path, damage: str) -> None:
    assert damage in DAMAGES
    check_damage(ADAPTER, folder, tmp_path / "copy", damage)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_damaged_tokenizers_are_named(folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).write_bytes(b"{")
    with pytest.raises(
        MissingWeightsError, match=r"the tokenizer in .* cannot be read .*; put OpenGVLab/InternVL2-8B"
    ) as caught:
        ADAPTER.load(copy, "cpu", torch.float32)
    assert "\n" not in str(caught.value)
    (copy / name).unlink()
    with pytest.raises(MissingWeightsError, match=f"lacks {name}"):
        ADAPTER.load(copy, "cpu", torch.float32)


def test_found_by_name(folder: Path) -> None:
    assert ADAPTER.find_weights(folder.parent) == folder
