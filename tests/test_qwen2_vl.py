"""The Qwen2-VL family: its layout at every released size, its adapters, and its inputs against the processor's own."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils.vision_process import fetch_image, smart_resize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fakes.qwen2_vl_folder import MAX_PX, MIN_PX, TOKEN_PX, write_image, write_model_folder
from fakes.tiny_qwen2_vl import tiny_layout, tiny_model
from mqbench.harness.errors import DatasetError, LayoutError, MissingWeightsError, NonFiniteError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.pixels import PixelLimits, fit_size, load_image
from mqbench.harness.models.qwen2_vl import ADAPTERS, Qwen2VLAdapter, qwen2_vl_layout
from mqbench.harness.quant.layout import Part

# --- layout ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Released:
    """The LLM of a released checkpoint; the vision tower is the same for all (1280, 5120, 32 layers, 16 heads)."""

    width: int
    mlp: int
    depth: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool = False

    def config(self) -> Qwen2VLConfig:
        return Qwen2VLConfig(
            vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": self.width},
            text_config={
                "hidden_size": self.width,
                "intermediate_size": self.mlp,
                "num_hidden_layers": self.depth,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "vocab_size": self.vocab_size,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            tie_word_embeddings=self.tied,
        )


RELEASED = {
    "2B": Released(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7B": Released(3584, 18944, 28, 28, 4, 152064),
    "72B": Released(8192, 29568, 80, 64, 8, 152064),
}


@pytest.mark.parametrize("size", RELEASED)
def test_layout_names_every_linear_of_released_sizes(size):
    released = RELEASED[size]
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(released.config())
    layout = qwen2_vl_layout(model)
    layout.check(model)
    assert layout == qwen2_vl_layout(released.config())

    linears = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv3d))}
    quantized = layout.quantized_linears()
    assert linears == {*quantized, "lm_head"}
    parts = [*quantized.values()]
    assert parts.count(Part.VISION) == 1 + 4 * 32
    assert parts.count(Part.PROJECTOR) == 2
    assert parts.count(Part.TEXT) == 7 * released.depth


@pytest.mark.parametrize("size", RELEASED)
def test_layout_agrees_with_the_shapes_of_released_sizes(size):
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(RELEASED[size].config())
    layout = qwen2_vl_layout(model)

    def shape(name: str) -> tuple[int, ...]:
        return tuple(model.get_submodule(name).weight.shape)

    for tower in layout.towers:
        for norm in tower.norms:
            assert shape(norm.name) == (tower.hidden_size,)
            assert all(shape(reader)[1] == norm.chunks * tower.hidden_size for reader in norm.readers)
        assert all(tower.hidden_size in shape(name)[:2] for name in tower.writers)
        for attention in (block.attention for block in tower.blocks):
            start, stop = attention.value_rows
            assert stop == shape(attention.value)[0]
            assert stop - start == attention.num_kv_heads * attention.head_dim
            assert shape(attention.out)[1] == attention.num_heads * attention.head_dim


@torch.no_grad()
def test_value_rows_are_the_values():
    model = tiny_model()
    layout = tiny_layout(model)
    for tower in layout.towers:
        attention = tower.blocks[0].attention
        seen: list[Tensor] = []
        value, out = model.get_submodule(attention.value), model.get_submodule(attention.out)
        keep = torch.zeros(value.weight.shape[0], dtype=torch.bool)
        keep[slice(*attention.value_rows)] = True
        value.weight[keep], value.bias[keep] = 0.0, 0.0
        out.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        feed_tower(model, tower.part)
        assert seen[0].abs().max() == 0


def feed_tower(model: nn.Module, part: Part) -> None:
    if part is Part.VISION:
        model.model.visual(torch.randn(16, 96, dtype=torch.float64), grid_thw=torch.tensor([[1, 4, 4]]))
    else:
        model(input_ids=torch.arange(3, 9)[None])


def test_check_finds_a_linear_that_nobody_declared():
    model = tiny_model(torch.float32)
    model.model.visual.extra = nn.Linear(2, 2)
    with pytest.raises(LayoutError, match=r"model\.visual\.extra"):
        tiny_layout(model).check(model)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "qwen2-vl-2b")


@pytest.fixture(scope="module")
def adapter() -> Qwen2VLAdapter:
    return ShippedLike("tiny", None, "make it again")


class ShippedLike(Qwen2VLAdapter):
    """Takes its pixel limits from the processor, as the stand-in does."""


@pytest.fixture(scope="module")
def loaded(adapter, folder) -> LoadedModel:
    return adapter.load(folder, "cpu", torch.float32)


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def adapter_named(name: str) -> Qwen2VLAdapter:
    return next(adapter for adapter in ADAPTERS if adapter.name == name)


def test_registered_names():
    assert [adapter.name for adapter in ADAPTERS] == ["standin-qwen2-vl", "qwen2-vl-2b", "qwen2-vl-7b", "qwen2-vl-72b"]


def test_weights_are_found_in_the_models_folder_and_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapter = adapter_named("qwen2-vl-2b")
    assert adapter.find_weights(None) is None
    assert adapter.find_weights(tmp_path) is None
    assert adapter.find_weights(folder.parent) == folder
    snapshot = tmp_path / "models--Qwen--Qwen2-VL-2B-Instruct" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert adapter.find_weights(None) == snapshot
    (snapshot / "model.safetensors").unlink()
    assert adapter.find_weights(None) is None


def test_load_keeps_dtype_and_pins_attention(adapter, folder):
    loaded = adapter.load(folder, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.config._attn_implementation == adapter.attn_implementation == "sdpa"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_finding_and_loading_ask_no_network(adapter, folder, monkeypatch):
    def refuse(*address: object) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    adapter_named("qwen2-vl-7b").find_weights(None)
    adapter.load(folder, "cpu", torch.float32)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(adapter, damaged, name):
    (damaged / name).unlink()
    with pytest.raises(MissingWeightsError, match=rf"lacks {name}; make it again"):
        adapter.load(damaged, "cpu", torch.float32)


def test_missing_shard_is_named(adapter, damaged):
    (damaged / "model.safetensors").rename(damaged / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingWeightsError, match=r"lacks model-2\.safetensors"):
        adapter.load(damaged, "cpu", torch.float32)


def test_truncated_weights_are_refused_in_one_line(adapter, damaged):
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(MissingWeightsError, match="cannot be loaded") as caught:
        adapter.load(damaged, "cpu", torch.float32)
    assert "\n" not in str(caught.value)


def test_missing_tensor_is_named(adapter, damaged):
    tensors = load_file(damaged / "model.safetensors")
    (dropped,) = [name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight")]
    del tensors[dropped]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingWeightsError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        adapter.load(damaged, "cpu", torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_is_named(adapter, damaged, value):
    tensors = load_file(damaged / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("blocks.1.mlp.fc2.bias")]
    tensors[name][3] = value
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.mlp\.fc2\.bias"):
        adapter.load(damaged, "cpu", torch.float32)


# --- inputs ----------------------------------------------------------------------------------------------------------


def message(*parts: str) -> Message:
    return [{"type": "image" if part.endswith(".png") else "text", "value": part} for part in parts]


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> Sequence[Message]:
    """Two images; none; one."""
    path = tmp_path_factory.mktemp("images")
    sizes = ((16, 16), (70, 31), (24, 16))
    first, second, third = (write_image(path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes))
    return [message(first, "one", second, "two?"), message("no image"), message(third, "a longer question about it")]


def test_encode_mixes_text_only_and_image_rows(adapter, loaded, messages):
    batch = adapter.encode(loaded, messages)
    rows = [adapter.encode(loaded, [single]) for single in messages]
    assert "pixel_values" not in rows[1]
    for ids, mask, single in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        assert torch.equal(ids[mask.bool()], single["input_ids"][0])
        assert mask.tolist() == sorted(mask.tolist())  # padding on the left
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch[name], torch.cat([rows[0][name], rows[2][name]]))
    is_image = batch["input_ids"] == loaded.layout.image_token_id
    assert torch.equal(batch["mm_token_type_ids"].bool(), is_image)
    assert is_image.sum(1).tolist() == [4 + 10, 0, 6]


@torch.no_grad()
def test_batch_rows_give_the_logits_of_single_rows(adapter, loaded, messages):
    batch_logits = loaded.model(**adapter.encode(loaded, messages)).logits[:, -1]
    for logits, single in zip(batch_logits, messages, strict=True):
        alone = loaded.model(**adapter.encode(loaded, [single])).logits[0, -1]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-4)


def test_encode_equals_the_processor_on_images_that_need_no_resizing(adapter, loaded, tmp_path):
    path = write_image(tmp_path / "image.png", 3 * TOKEN_PX, 2 * TOKEN_PX)
    batch = adapter.encode(loaded, [message(path, "Read it.")])
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Read it.<|im_end|>\n<|im_start|>assistant\n"
    expected = loaded.processor(text=[prompt], images=[Image.open(path)], return_tensors="pt")
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor.to(batch[name].dtype)), name


@pytest.mark.parametrize("size", [(70, 31), (9, 40), (200, 200), (5, 5)])
def test_encode_equals_vlmevalkits_preprocessing(adapter, loaded, tmp_path, size):
    path = write_image(tmp_path / "image.png", *size)
    wanted = {"image": f"file://{path}", "min_pixels": MIN_PX, "max_pixels": MAX_PX}
    image = fetch_image(wanted, image_patch_size=TOKEN_PX // 2)
    expected = loaded.processor(text=["<|image_pad|>"], images=[image], return_tensors="pt")
    batch = adapter.encode(loaded, [message(path, "?")])
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_answers_follow_the_prompt(adapter, loaded, messages):
    answers = ["yes", "", "B. two"]
    prompts = adapter.encode(loaded, messages)
    batch = adapter.encode(loaded, messages, answers)
    for row, answer in enumerate(answers):
        prompt, whole = (inputs["input_ids"][row][inputs["attention_mask"][row].bool()] for inputs in (prompts, batch))
        assert torch.equal(whole[: len(prompt)], prompt)
        assert loaded.processor.tokenizer.decode(whole[len(prompt) :]) == answer
    assert torch.equal(batch["pixel_values"], prompts["pixel_values"])


def test_unreadable_image_is_named(adapter, loaded, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        adapter.encode(loaded, [message(str(path), "?")])


@torch.no_grad()
def test_generate_is_greedy_and_strips_special_tokens(adapter, loaded, messages, monkeypatch):
    generation = loaded.model.generation_config
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}.items():
        monkeypatch.setattr(generation, name, value)
    answers = adapter.generate(loaded, adapter.encode(loaded, messages), 5)
    for answer, single in zip(answers, messages, strict=True):
        assert answer == greedy(loaded, dict(adapter.encode(loaded, [single])), 5)
    assert not any("<|" in answer for answer in answers)


def greedy(loaded: LoadedModel, batch: dict[str, Tensor], max_new_tokens: int) -> str:
    """Argmax by whole forward passes without a cache."""
    new: list[int] = []
    for _ in range(max_new_tokens):
        token = loaded.model(**batch).logits[0, -1].argmax()
        if token == loaded.processor.tokenizer.eos_token_id:
            break
        new.append(int(token))
        for name, value in {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0}.items():
            if name in batch:
                batch[name] = torch.cat([batch[name], torch.full_like(batch[name][:, :1], int(value))], dim=1)
    return loaded.processor.tokenizer.decode(new, skip_special_tokens=True)


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_released_models_take_vlmevalkits_limits_and_the_standin_its_own(loaded):
    real, standin = adapter_named("qwen2-vl-7b"), adapter_named("standin-qwen2-vl")
    tokens = 28 * 28
    assert real.pixel_limits(loaded.processor, "TextVQA_VAL") == PixelLimits(1280 * tokens, 16384 * tokens)
    assert real.pixel_limits(loaded.processor, None) == PixelLimits(1280 * tokens, 16384 * tokens)
    assert real.pixel_limits(loaded.processor, "OCRBench") == PixelLimits(100 * tokens, 16384 * tokens)
    for dataset in ("TextVQA_VAL", "OCRBench", None):
        assert standin.pixel_limits(loaded.processor, dataset) == PixelLimits(MIN_PX, MAX_PX)


def test_dataset_name_reaches_the_pixel_limits(loaded, tmp_path):
    path = write_image(tmp_path / "image.png", 300, 200)
    real = dataclasses.replace(adapter_named("qwen2-vl-7b"), name="tiny")
    factor = TOKEN_PX

    def num_tokens(prompt: Message) -> int:
        return int((real.encode(loaded, [prompt])["input_ids"] == loaded.layout.image_token_id).sum())

    rows, columns = fit_size(200, 300, factor, PixelLimits(100 * 28 * 28, 16384 * 28 * 28))
    tagged = [{**item, "dataset": "OCRBench"} for item in message(path, "Read.")]
    assert num_tokens(tagged) == rows * columns // factor**2
    rows, columns = fit_size(200, 300, factor, PixelLimits(1280 * 28 * 28, 16384 * 28 * 28))
    assert num_tokens(message(path, "Read.")) == rows * columns // factor**2


@given(
    st.integers(3, 4000),
    st.integers(3, 4000),
    st.sampled_from([(3136, 12845056), (78400, 401408), (1003520, 12845056)]),
)
@settings(deadline=None)
def test_sizes_equal_those_of_vlmevalkits_wrapper(height, width, limits):
    assume(max(height, width) <= 200 * min(height, width))
    assert fit_size(height, width, 28, PixelLimits(*limits)) == smart_resize(height, width, 28, *limits)


def test_extreme_aspect_ratio_is_refused():
    with pytest.raises(DatasetError, match="2010 x 10"):
        fit_size(10, 2010, 28, PixelLimits(3136, 12845056))


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (16, 16), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    image = load_image(tmp_path / "clear.png", 8, PixelLimits(MIN_PX, MAX_PX))
    assert image.mode == "RGB"
    assert image.getpixel((5, 5)) == (255, 255, 255)
