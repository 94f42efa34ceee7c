"""LLaVA-1.5: inputs against transformers' processor, files, greedy answers, sizes of the released checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from fakes.native_checks import DAMAGES, check_answers, check_batch, check_damage, check_greedy, message
from fakes.native_folders import byte_tokenizer, write_folder
from fakes.qwen2_vl_folder import write_image
from mqbench.harness.blueprint import load_blueprint
from mqbench.harness.blueprint_tokens import visual_tokens
from mqbench.harness.errors import DatasetError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.llava import ADAPTERS, FAMILY, LlavaAdapter
from mqbench.harness.vlmeval_kit.library import vlmeval_module

SIDE_PX = 16
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


def tiny_processor() -> LlavaProcessor:
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": SIDE_PX},
        "crop_size": {"height": SIDE_PX, "width": SIDE_PX},
    }
    tokenizer = byte_tokenizer(SPECIAL, bos="<s>", pad_token="<pad>", eos_token="</s>")
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(CLIPImageProcessor(**sizes), tokenizer, patch_size=8, **strategy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    processor = tiny_processor()

    def change(config: Any) -> None:
        config.image_token_id = config.image_token_index = processor.image_token_id

    return write_folder(tmp_path_factory.mktemp("models") / "llava-1.5-7b", FAMILY, change, processor)


@pytest.fixture(scope="module")
def adapter() -> LlavaAdapter:
    return ADAPTERS[0]


@pytest.fixture(scope="module")
def loaded(adapter: LlavaAdapter, folder: Path) -> LoadedModel:
    return adapter.load(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[Message]:
    """Two images; none; one."""
    path = tmp_path_factory.mktemp("images")
    sizes = ((16, 16), (40, 21), (9, 30))
    first, second, third = (write_image(path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes))
    return [message(first, "one", second, "two?"), message("no image"), message(third, "a longer question")]


def test_registered_names_and_folders(folder: Path, tmp_path: Path) -> None:
    assert [(adapter.name, adapter.paper_name) for adapter in ADAPTERS] == [
        ("llava-1.5-7b", None),
        ("llava-1.5-13b", "llava-1.5-13b"),
    ]
    assert ADAPTERS[0].find_weights(folder.parent) == folder
    assert ADAPTERS[1].find_weights(folder.parent) is None


def test_encode_equals_the_processor(adapter: LlavaAdapter, loaded: LoadedModel, tmp_path: Path) -> None:
    """On a square of the right size, where nothing is resized; VLMEvalKit puts the image between two spaces."""
    path = write_image(tmp_path / "image.png", SIDE_PX, SIDE_PX)
    prompt = f"{SYSTEM}USER:  <image> What is it? ASSISTANT: "
    expected = loaded.processor(text=[prompt], images=[Image.open(path)], return_tensors="pt")
    batch = adapter.encode(loaded, [message(path, "What is it?")])
    assert batch.keys() == {"input_ids", "attention_mask", "pixel_values"}
    for name, tensor in batch.items():
        assert torch.equal(tensor, expected[name]), name
    assert int((batch["input_ids"] == loaded.layout.image_token_id).sum()) == 4


def test_text_only_prompt(adapter: LlavaAdapter, loaded: LoadedModel) -> None:
    batch = adapter.encode(loaded, [message("Why?")])
    assert "pixel_values" not in batch
    assert loaded.processor.tokenizer.decode(batch["input_ids"][0]) == f"<s>{SYSTEM}USER: Why? ASSISTANT: "


def test_prompts_are_vlmevalkits(adapter: LlavaAdapter, loaded: LoadedModel, messages: list[Message]) -> None:
    """The items of a message are joined as its wrapper does; each image is four placeholders here."""
    join = vlmeval_module("vlmeval.vlm.llava.llava").LLaVA.concat_tilist
    for single in messages:
        text, images = join(None, single)
        ids = adapter.encode(loaded, [single])["input_ids"][0]
        assert int((ids == loaded.layout.image_token_id).sum()) == 4 * len(images)
        prompt = loaded.processor.tokenizer.decode(ids).replace("<image>" * 4, "<image>")
        assert prompt == f"<s>{SYSTEM}USER: {text} ASSISTANT: "


@pytest.mark.parametrize("size", [(40, 21), (9, 30), (33, 33)])
def test_images_are_padded_with_the_mean_colour(
    adapter: LlavaAdapter, loaded: LoadedModel, tmp_path: Path, size: tuple[int, int]
) -> None:
    path = write_image(tmp_path / "image.png", *size)
    pixels = adapter.encode(loaded, [message(path, "?")])["pixel_values"][0]
    torch.testing.assert_close(pixels, torch.from_numpy(padded_reference(path)), rtol=0, atol=1e-5)


def padded_reference(path: str) -> np.ndarray:
    """Square with the mean colour, bicubic to 16 px, normalized; by arrays."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    image = np.asarray(Image.open(path))
    height, width, _ = image.shape
    side = max(height, width)
    square = np.tile((mean * 255).astype(np.uint8), (side, side, 1))
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    resized = np.asarray(Image.fromarray(square).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))
    return ((resized / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)


def test_visual_tokens_are_those_of_the_blueprint(adapter: LlavaAdapter, loaded: LoadedModel) -> None:
    assert adapter.visual_tokens(loaded.processor, 20, 300) == 4
    real = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        loaded.processor.tokenizer,
        patch_size=14,
    )
    assert adapter.visual_tokens(real, 20, 300) == visual_tokens(load_blueprint("llava-1.5-13b"), 20, 300) == 576


def test_batches(adapter: LlavaAdapter, loaded: LoadedModel, messages: list[Message]) -> None:
    check_batch(adapter, loaded, messages)
    check_answers(adapter, loaded, messages)


def test_generate_is_greedy(
    adapter: LlavaAdapter, loaded: LoadedModel, messages: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_greedy(adapter, loaded, messages, monkeypatch)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(adapter: LlavaAdapter, folder: Path, tmp_path: Path, damage: str) -> None:
    check_damage(adapter, folder, tmp_path / "copy", damage)


def test_unreadable_image_is_named(adapter: LlavaAdapter, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        adapter.encode(loaded, [message(str(tmp_path / "broken.png"), "?")])


@pytest.mark.parametrize(("name", "parameters"), [("llava-1.5-7b", 7_063_427_072), ("llava-1.5-13b", 13_351_494_656)])
def test_parameters_of_released_sizes(name: str, parameters: int) -> None:
    """Counts of the llava-hf checkpoints."""
    with torch.device("meta"):
        model = FAMILY.build(FAMILY.configs[name]())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
