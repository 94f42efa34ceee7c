"""Qwen-VL-Chat's adapter: prompts, pixels, tokens against tiktoken, files of the released kinds, greedy answers."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from fakes.native_checks import DAMAGES, check_answers, check_batch, check_damage, message
from fakes.qwen2_vl_folder import write_image
from mqbench.harness.blueprint import load_blueprint
from mqbench.harness.blueprint_tokens import visual_tokens
from mqbench.harness.errors import DatasetError, MissingWeightsError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.family import tiny_model
from mqbench.harness.models.qwen_vl import (
    ADAPTERS,
    FAMILY,
    SPECIAL_TOKENS,
    TINY_VISUAL,
    TOKEN_FILE,
    TOKEN_PATTERN,
)
from mqbench.harness.models.trees.qwen_vl import QWenConfig

(ADAPTER,) = ADAPTERS
WORDS = (b"th", b"in", b"the", b" the", b"Pi", b"Pict", b"ture", b"ct", b"tu", b"re", b"Picture", b"\n\n", b" 1")
RANKS = {token: rank for rank, token in enumerate((*(bytes([byte]) for byte in range(256)), *WORDS))}
IDS = {token: len(RANKS) + index for index, token in enumerate(SPECIAL_TOKENS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen-vl-chat"
    path.mkdir()
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in RANKS.items())
    (path / TOKEN_FILE).write_bytes(b"".join(lines))
    config: Any = FAMILY.tiny_config()
    config.vocab_size = len(RANKS) + len(SPECIAL_TOKENS)
    config.visual["image_start_id"], config.image_token_id = IDS["<img>"], IDS["<imgpad>"]
    model: Any = tiny_model(replace(FAMILY, tiny_config=lambda: config), torch.float32)
    model.save_pretrained(path)
    released = {"chat_format": "chatml", "do_sample": True, "top_p": 0.3, "top_k": 0, "max_window_size": 6144}
    (path / "generation_config.json").write_text(json.dumps(released))
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
    return [message("one", first, second, "two?"), message("no image"), message(third, "a longer question")]


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_special_tokens_have_the_released_ids() -> None:
    """Behind the 151643 ranks of the released file."""
    ids = {token: 151643 + index for index, token in enumerate(SPECIAL_TOKENS)}
    assert [ids[token] for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [151643, 151644, 151645]
    assert [ids[token] for token in ("<img>", "</img>", "<imgpad>")] == [151857, 151858, 151859]


def test_prompts_are_those_of_the_released_conversation(loaded: LoadedModel, messages: list[Message]) -> None:
    batch = ADAPTER.encode(loaded, messages)
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    image = f"<img>{'<imgpad>' * TINY_VISUAL['n_queries']}</img>"
    contents = (
        f"onePicture 1: {image}\nPicture 2: {image}\ntwo?",
        "no image",
        f"Picture 1: {image}\na longer question",
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    expected = [f"{system}{content}<|im_end|>\n<|im_start|>assistant\n" for content in contents]
    assert [loaded.processor.tokenizer.decode(row[mask.bool()]) for row, mask in rows] == expected
    assert batch["pixel_values"].shape == (3, 3, 16, 16)


def test_tokens_are_tiktokens(loaded: LoadedModel) -> None:
    """The parts of a turn are encoded one by one: a question that begins with line ends keeps them."""
    reference = tiktoken.Encoding("qwen", pat_str=TOKEN_PATTERN, mergeable_ranks=RANKS, special_tokens=IDS)

    def plain(text: str) -> list[int]:
        return reference.encode(text, disallowed_special=())

    question = "\n\nthe Picture 1234: <|im_end|> thin\u0301g\u00e9 \U0001f600?"
    found = ADAPTER.encode(loaded, [message(question)])["input_ids"][0].tolist()
    start, end, line = IDS["<|im_start|>"], IDS["<|im_end|>"], plain("\n")
    turns = [start, *plain("system"), *line, *plain("You are a helpful assistant."), end, *line]
    turns += [
        start,
        *plain("user"),
        *line,
        *plain("\n\nthe Picture 1234: <|im_end|> thi\u0144g\u00e9 \U0001f600?"),
        end,
    ]
    assert found == [*turns, *line, start, *plain("assistant"), *line]


def test_pixels_are_torchvisions(loaded: LoadedModel, tmp_path: Path) -> None:
    """The transforms of the released code."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    resize = transforms.Resize((16, 16), interpolation=transforms.InterpolationMode.BICUBIC)
    released = transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(mean=mean, std=std)])
    path = write_image(tmp_path / "image.png", 50, 37)
    found = ADAPTER.encode(loaded, [message(path, "?")])["pixel_values"][0]
    torch.testing.assert_close(found, released(Image.open(path).convert("RGB")), rtol=0, atol=1e-5)


def test_visual_tokens_do_not_depend_on_the_size(loaded: LoadedModel) -> None:
    sizes = ((448, 448), (100, 2000))
    assert {ADAPTER.visual_tokens(loaded.processor, *size) for size in sizes} == {TINY_VISUAL["n_queries"]}
    with torch.device("meta"):
        released = FAMILY.configs["qwen-vl-chat"]().visual["n_queries"]
    assert {visual_tokens(load_blueprint("qwen-vl-chat"), *size) for size in sizes} == {released}


def test_unreadable_image_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        ADAPTER.encode(loaded, [message(str(tmp_path / "broken.png"), "?")])


def test_answers_follow_the_prompts(loaded: LoadedModel, messages: list[Message]) -> None:
    check_answers(ADAPTER, loaded, messages)


def test_rows_of_a_batch_are_what_they_are_alone(folder: Path, tmp_path: Path, messages: list[Message]) -> None:
    """Given positions from each row's first token, as ``generate`` does; a short training length would show others."""
    loaded = ADAPTER.load(folder, "cpu", torch.float32)
    rotary: Any = loaded.model.get_submodule("transformer.rotary_emb")
    rotary.is_dynamic, loaded.model.config.use_logn_attn = False, False
    check_batch(ADAPTER, loaded, messages)


def test_answers_are_greedy_and_end_with_their_turn(
    loaded: LoadedModel, messages: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the checkpoint wants to sample; batches and single rows agree."""
    assert loaded.model.generation_config.do_sample
    ends = [IDS[token] for token in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")]
    assert loaded.model.generation_config.eos_token_id == ends
    together = ADAPTER.generate(loaded, ADAPTER.encode(loaded, messages), 6)
    assert together == [ADAPTER.generate(loaded, ADAPTER.encode(loaded, [single]), 6)[0] for single in messages]
    head: Any = loaded.model.get_submodule("lm_head")
    weight = head.weight.clone()
    weight[IDS["<|im_end|>"]] = 100 * weight.norm(dim=1).max() * loaded.model.get_submodule("transformer").ln_f.weight
    monkeypatch.setattr(head, "forward", lambda hidden: (hidden @ weight.T).abs())
    assert ADAPTER.generate(loaded, ADAPTER.encode(loaded, messages), 6) == [""] * 3


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["no config", "no weights", "half a file", "another family", "config is no JSON"])
def test_damaged_folders(folder: Path, tmp_path: Path, damage: str) -> None:
    assert damage in DAMAGES
    check_damage(ADAPTER, folder, tmp_path / "copy", damage)


def test_damaged_tokenizers_are_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / TOKEN_FILE).write_bytes(b"no base64 at all")
    with pytest.raises(MissingWeightsError, match=r"cannot be read as a tiktoken file .*; put Qwen/Qwen-VL-Chat"):
        ADAPTER.load(copy, "cpu", torch.float32)
    (copy / TOKEN_FILE).unlink()
    with pytest.raises(MissingWeightsError, match=f"lacks {TOKEN_FILE}"):
        ADAPTER.load(copy, "cpu", torch.float32)


def test_the_released_config_is_understood(tmp_path: Path) -> None:
    """As in the checkpoint, with fields that matter only to the released code; our defaults are its values."""
    visual = {"heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231}
    released = {
        "attn_dropout_prob": 0.0, "bf16": True, "emb_dropout_prob": 0.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}, "fp16": False, "fp32": False,
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 22016, "kv_channels": 128,
        "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192, "model_type": "qwen", "no_bias": True,
        "num_attention_heads": 32, "num_hidden_layers": 32, "onnx_safe": None, "rotary_emb_base": 10000,
        "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048, "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer", "use_cache": True, "use_dynamic_ntk": True,
        "use_flash_attn": False, "use_logn_attn": True, "vocab_size": 151936,
        "visual": {**visual, "output_dim": 4096, "patch_size": 14, "width": 1664},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released))
    found, expected = QWenConfig.from_pretrained(tmp_path), FAMILY.configs["qwen-vl-chat"]()
    for name in released.keys() & vars(expected).keys():
        assert getattr(found, name) == getattr(expected, name), name
    assert FAMILY.layout(found) == FAMILY.layout(expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_released_pickles_load(folder: Path, tmp_path: Path, loaded: LoadedModel, shards: int) -> None:
    """The released weights are ``pytorch_model-*.bin``; a missing shard is named."""
    copy = Path(shutil.copytree(folder, tmp_path / "qwen-vl-chat"))
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, copy / "pytorch_model.bin")
    else:
        files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
        parts = names[::2], names[1::2]
        for file, part in zip(files, parts, strict=True):
            torch.save({name: tensors[name] for name in part}, copy / file)
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert ADAPTER.find_weights(tmp_path) == copy
    expected = loaded.model.state_dict()
    found = ADAPTER.load(copy, "cpu", torch.float32).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    if shards == 2:
        (copy / files[1]).unlink()
        with pytest.raises(MissingWeightsError, match=f"lacks {files[1]}"):
            ADAPTER.load(copy, "cpu", torch.float32)
