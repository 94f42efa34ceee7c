"""Qwen2.5-VL: inputs against transformers' processor and VLMEvalKit's sizes, files, answers, checkpoint sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from qwen_vl_utils.vision_process import fetch_image
from transformers import Qwen2_5_VLProcessor

from fakes.native_checks import DAMAGES, check_answers, check_batch, check_damage, check_greedy, message
from fakes.native_folders import write_folder
from fakes.qwen2_vl_folder import CHAT_TEMPLATE, MAX_PX, MIN_PX, SPECIAL, TOKEN_PX, tiny_processor, write_image
from mqbench.harness.errors import DatasetError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import tiny_model
from mqbench.harness.models.pixels import PixelLimits
from mqbench.harness.models.qwen2_5_vl import ADAPTERS, FAMILY, Qwen25VLAdapter
from mqbench.harness.quant.layout import NormKind


class TinyPixels(Qwen25VLAdapter):
    """Takes the tiny processor's limits in place of VLMEvalKit's, which are for 28 px tokens."""

    def pixel_limits(self, processor: Any, dataset: str | None) -> PixelLimits:
        return PixelLimits(MIN_PX, MAX_PX)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = tiny_processor()
    processor = Qwen2_5_VLProcessor(
        parts.image_processor, parts.tokenizer, parts.video_processor, chat_template=CHAT_TEMPLATE
    )
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, processor.tokenizer.convert_tokens_to_ids(list(SPECIAL[3:])), strict=True))

    def change(config: Any) -> None:
        config.update(ids)

    return write_folder(tmp_path_factory.mktemp("models") / "qwen2.5-vl-7b", FAMILY, change, processor)


@pytest.fixture(scope="module")
def adapter() -> Qwen25VLAdapter:
    return TinyPixels("qwen2.5-vl-7b", None, "get it", "Qwen/Qwen2.5-VL-7B-Instruct")


@pytest.fixture(scope="module")
def loaded(adapter: Qwen25VLAdapter, folder: Path) -> LoadedModel:
    return adapter.load(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[Message]:
    """Two images; none; one."""
    path = tmp_path_factory.mktemp("images")
    sizes = ((16, 16), (70, 31), (24, 16))
    first, second, third = (write_image(path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes))
    return [message(first, "one", second, "two?"), message("no image"), message(third, "a longer question about it")]


def test_registered_names_and_folders(folder: Path) -> None:
    assert [adapter.name for adapter in ADAPTERS] == ["qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2.5-vl-72b"]
    assert [adapter.find_weights(folder.parent) for adapter in ADAPTERS] == [None, folder, None]


def test_layout(loaded: LoadedModel) -> None:
    vision = loaded.layout.vision
    assert vision is not None
    assert vision.norm_kind is NormKind.RMSNORM
    assert all(block.mlp_up is not None for block in vision.blocks)
    assert all(loaded.model.get_submodule(name).bias is not None for block in vision.blocks for name in block.linears)


@torch.no_grad()
def test_the_tiny_model_has_windows() -> None:
    """Its first block attends within windows: with whole images there, its outputs are others."""
    model: Any = tiny_model(FAMILY, torch.float32)
    batch = FAMILY.tiny_inputs(model, torch.Generator().manual_seed(0))
    windowed = model(**batch).logits
    model.model.visual.fullatt_block_indexes = [0, 1]
    assert not torch.allclose(model(**batch).logits, windowed, atol=1e-3)


def test_encode_equals_the_processor(adapter: Qwen25VLAdapter, loaded: LoadedModel, tmp_path: Path) -> None:
    """On an image that needs no resizing."""
    path = write_image(tmp_path / "image.png", 3 * TOKEN_PX, 2 * TOKEN_PX)
    batch = adapter.encode(loaded, [message(path, "Read it.")])
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Read it.<|im_end|>\n<|im_start|>assistant\n"
    expected = loaded.processor(text=[prompt], images=[Image.open(path)], return_tensors="pt")
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor.to(batch[name].dtype)), name


@pytest.mark.parametrize("size", [(70, 31), (9, 40), (5, 5)])
def test_encode_equals_vlmevalkits_preprocessing(
    adapter: Qwen25VLAdapter, loaded: LoadedModel, tmp_path: Path, size: tuple[int, int]
) -> None:
    path = write_image(tmp_path / "image.png", *size)
    wanted = {"image": f"file://{path}", "min_pixels": MIN_PX, "max_pixels": MAX_PX}
    image = fetch_image(wanted, image_patch_size=TOKEN_PX // 2)
    expected = loaded.processor(text=["<|image_pad|>"], images=[image], return_tensors="pt")
    batch = adapter.encode(loaded, [message(path, "?")])
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    count = int((batch["input_ids"] == loaded.layout.image_token_id).sum())
    assert count == adapter.visual_tokens(loaded.processor, *size[::-1])


def test_pixel_limits_are_vlmevalkits() -> None:
    tokens = 28 * 28
    assert ADAPTERS[1].pixel_limits(None, None) == PixelLimits(1280 * tokens, 16384 * tokens)
    assert ADAPTERS[1].pixel_limits(None, "OCRBench") == PixelLimits(100 * tokens, 16384 * tokens)


def test_batches(adapter: Qwen25VLAdapter, loaded: LoadedModel, messages: list[Message]) -> None:
    check_batch(adapter, loaded, messages)
    check_answers(adapter, loaded, messages)


def test_generate_is_greedy(
    adapter: Qwen25VLAdapter, loaded: LoadedModel, messages: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_greedy(adapter, loaded, messages, monkeypatch)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(adapter: Qwen25VLAdapter, folder: Path, tmp_path: Path, damage: str) -> None:
    check_damage(adapter, folder, tmp_path / "copy", damage)


def test_unreadable_image_is_named(adapter: Qwen25VLAdapter, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        adapter.encode(loaded, [message(str(tmp_path / "broken.png"), "?")])


RELEASED = [
    ("qwen2.5-vl-3b", 3_754_622_976),
    ("qwen2.5-vl-7b", 8_292_166_656),
    ("qwen2.5-vl-72b", 73_410_777_344),
]


@pytest.mark.parametrize(("name", "parameters"), RELEASED)
def test_parameters_of_released_sizes(name: str, parameters: int) -> None:
    """Counts of the released checkpoints (3B, 7B: as their model pages give them; 3B has its embeddings tied)."""
    with torch.device("meta"):
        model = FAMILY.build(FAMILY.configs[name]())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
