"""InternVL3: inputs against transformers' processor and VLMEvalKit, files, greedy answers, sizes of the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

from fakes.native_checks import DAMAGES, check_answers, check_batch, check_damage, check_greedy, message
from fakes.native_folders import byte_tokenizer, write_folder
from fakes.qwen2_vl_folder import write_image
from mqbench.harness.errors import DatasetError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.internvl import ADAPTERS, CHAT, FAMILY, InternVLAdapter, join_items
from mqbench.harness.models.tiles import cut_tiles, num_tiles
from mqbench.harness.vlmeval_kit.library import vlmeval_module

TILE_PX = 32
TOKENS_PER_TILE = 4
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def tiny_processor() -> InternVLProcessor:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(SPECIAL, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=names)
    size: dict[str, Any] = {"size": {"height": TILE_PX, "width": TILE_PX}, **IMAGENET}
    return InternVLProcessor(
        GotOcr2ImageProcessor(**size), tokenizer, InternVLVideoProcessor(**size), image_seq_length=TOKENS_PER_TILE
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    processor = tiny_processor()

    def change(config: Any) -> None:
        config.image_token_id = processor.image_token_id

    return write_folder(tmp_path_factory.mktemp("models") / "internvl3-8b", FAMILY, change, processor)


@pytest.fixture(scope="module")
def adapter() -> InternVLAdapter:
    return ADAPTERS[-1]


@pytest.fixture(scope="module")
def loaded(adapter: InternVLAdapter, folder: Path) -> LoadedModel:
    return adapter.load(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[Message]:
    """Two images; none; one."""
    path = tmp_path_factory.mktemp("images")
    sizes = ((32, 32), (64, 30), (30, 70))
    first, second, third = (write_image(path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes))
    return [message(first, "one", second, "two?"), message("no image"), message("a longer question", third)]


def test_registered_names_and_folders(folder: Path) -> None:
    assert [adapter.name for adapter in ADAPTERS] == ["internvl3-1b", "internvl3-2b", "internvl3-8b"]
    assert [adapter.find_weights(folder.parent) for adapter in ADAPTERS] == [None, None, folder]


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # numpy, inside the processor
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (96, 64)])
def test_encode_equals_the_processor(
    adapter: InternVLAdapter, loaded: LoadedModel, tmp_path: Path, size: tuple[int, int]
) -> None:
    """On images that are tiles already; the thumbnail alone is resized, by another library."""
    path = write_image(tmp_path / "image.png", *size)
    prompt = CHAT.format(question="<IMG_CONTEXT>\nWhat is it?")
    limits = {"min_patches": 1, "max_patches": 6}
    expected = loaded.processor(text=[prompt], images=[Image.open(path)], return_tensors="pt", **limits)
    batch = adapter.encode(loaded, [message("What is it?", path)])
    assert batch.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    tiles = size[0] * size[1] // TILE_PX**2
    torch.testing.assert_close(batch["pixel_values"][:tiles], expected["pixel_values"][:tiles], rtol=0, atol=1e-5)
    assert batch["pixel_values"].shape == expected["pixel_values"].shape
    count = int((batch["input_ids"] == loaded.layout.image_token_id).sum())
    assert count == TOKENS_PER_TILE * len(batch["pixel_values"]) == adapter.visual_tokens(loaded.processor, *size[::-1])


def test_pixels_and_prompts_are_vlmevalkits(adapter: InternVLAdapter, loaded: LoadedModel, tmp_path: Path) -> None:
    """``load_image`` and ``reorganize_prompt`` of its wrapper, on images of all shapes and on several images."""
    utils = vlmeval_module("vlmeval.vlm.internvl.utils")
    sizes = [(100, 50), (50, 190), (33, 31), (20, 20)]
    paths = [write_image(tmp_path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)]
    for path in paths:
        batch = adapter.encode(loaded, [message("?", path)])
        expected = utils.load_image(path, input_size=TILE_PX, max_num=6)
        torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-5)
    rows = (
        message("one?", paths[0]),
        message(paths[0], "one?", "two?"),
        message("Which?", paths[0], paths[1]),
        message("First", paths[0], "or", paths[1], "?"),
        message("none"),
    )
    for row in rows:
        count = sum(item["type"] == "image" for item in row)
        assert join_items(row, "<image>") == utils.reorganize_prompt(row, count)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 6, 18, 24]))
def test_tiles_are_transformers(height: int, width: int, max_tiles: int) -> None:
    image = Image.new("RGB", (width, height))
    tiles = cut_tiles(image, TILE_PX, max_tiles)
    processor = GotOcr2ImageProcessor(size={"height": TILE_PX, "width": TILE_PX})
    limits = {"crop_to_patches": True, "min_patches": 1, "max_patches": max_tiles}
    assert len(tiles) == num_tiles(height, width, TILE_PX, max_tiles)
    assert len(tiles) == processor.get_number_of_image_patches(height, width, limits)
    assert {tile.size for tile in tiles} == {(TILE_PX, TILE_PX)}


def test_limits_by_dataset_and_number_of_images(adapter: InternVLAdapter, loaded: LoadedModel, tmp_path: Path) -> None:
    path = write_image(tmp_path / "wide.png", 24 * TILE_PX, TILE_PX)

    def tiles(row: Message, dataset: str | None) -> int:
        tagged = [item if dataset is None else {**item, "dataset": dataset} for item in row]
        return len(adapter.encode(loaded, [tagged])["pixel_values"])

    alone = message("?", path)
    assert tiles(alone, None) == tiles(alone, "TextVQA_VAL") == 6 + 1
    assert tiles(alone, "DocVQA_VAL") == 18 + 1
    assert tiles(alone, "OCRBench") == 24 + 1
    assert tiles(message("?", *[path] * 4), "OCRBench") == 4 * (16 + 1)
    assert tiles(message("?", *[path] * 20), None) == 20 * (3 + 1)


def test_text_only_prompt(adapter: InternVLAdapter, loaded: LoadedModel) -> None:
    batch = adapter.encode(loaded, [message("Why {so}?")])
    assert "pixel_values" not in batch
    text = loaded.processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<|im_start|>system\n你是书生")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nWhy {so}?<|im_end|>\n<|im_start|>assistant\n")


def test_batches(adapter: InternVLAdapter, loaded: LoadedModel, messages: list[Message]) -> None:
    check_batch(adapter, loaded, messages)
    check_answers(adapter, loaded, messages)


def test_generate_is_greedy(
    adapter: InternVLAdapter, loaded: LoadedModel, messages: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_greedy(adapter, loaded, messages, monkeypatch)


def test_unreadable_image_is_named(adapter: InternVLAdapter, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        adapter.encode(loaded, [message(str(tmp_path / "broken.png"), "?")])


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(adapter: InternVLAdapter, folder: Path, tmp_path: Path, damage: str) -> None:
    check_damage(adapter, folder, tmp_path / "copy", damage)


def test_head_stays_apart_from_the_embeddings(adapter: InternVLAdapter, folder: Path, loaded: LoadedModel) -> None:
    """Transformers' config ties the two unless a checkpoint says otherwise; released ones may not say it."""
    file = folder / "config.json"
    text = file.read_text()
    config = json.loads(text)
    config.pop("tie_word_embeddings", None)
    file.write_text(json.dumps(config))
    try:
        model = adapter.load(folder, "cpu", torch.float32).model
    finally:
        file.write_text(text)
    (head,) = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if "lm_head" in name]
    assert torch.equal(model.get_submodule("lm_head").weight, head)
    assert not torch.equal(head, model.get_submodule("model.language_model.embed_tokens").weight)


RELEASED = [("internvl3-1b", 938_193_024), ("internvl3-2b", 2_088_957_440), ("internvl3-8b", 7_944_373_760)]


@pytest.mark.parametrize(("name", "parameters"), RELEASED)
def test_parameters_of_released_sizes(name: str, parameters: int) -> None:
    """8B: the count of the released checkpoint; the others follow from their parts."""
    with torch.device("meta"):
        model = FAMILY.build(FAMILY.configs[name]())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
