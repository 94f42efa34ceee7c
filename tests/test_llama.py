"""Text-only causal LMs: layout, adapters, exact transforms, every method, GPTQ's replay, save and load."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fakes.sessions import logits, session_for
from fakes.tiny_llama import tiny_batch, tiny_config, tiny_layout, tiny_model
from fakes.tiny_qwen2_vl import tiny_model as tiny_qwen2_vl
from mqbench.baselines.fusion import fuse_norms
from mqbench.baselines.rotation import attach_online_hadamard, attach_out_hadamard, rotate_residual, rotate_values
from mqbench.baselines.smoothquant import smooth
from mqbench.harness.errors import DatasetError, LayoutError, MissingWeightsError, NonFiniteError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.llama import ADAPTERS, LlamaAdapter, llama_layout
from mqbench.harness.models.standin_text.tokenizer import build_tokenizer
from mqbench.harness.quant.capture import Replay, visit_groups
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.method import StepMethod, open_session
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.serialize import load_quantized, save_quantized
from mqbench.harness.quant.session import Session, Step
from mqbench.mquant.aifs import reorder_tokens
from mqbench.mquant.msq import modality_ranges
from mqbench.mquant.rms import split_channel0

METHODS = tuple(point.name for point in entry_points(group="mqbench.methods"))
FAMILIES = ("llama", "mistral", "qwen2")


def method_named(name: str) -> StepMethod:
    (entry,) = entry_points(group="mqbench.methods", name=name)
    return entry.load()


def split_all(session: Session) -> None:
    """Splits channel 0 of every linear behind an online Hadamard, whatever Eq. 9 says."""
    for block in session.layout.text.blocks:
        split_channel0(session.linears[block.mlp_out])


CHAINS: dict[str, tuple[Step, ...]] = {
    "fuse": (fuse_norms,),
    "rotate": (fuse_norms, rotate_residual),
    "values": (rotate_values,),
    "online": (attach_online_hadamard,),
    "out": (rotate_values, attach_out_hadamard),
    "split": (attach_online_hadamard, split_all),
    "smooth": (smooth,),
    "reorder": (reorder_tokens,),
    "all": (
        fuse_norms, rotate_residual, rotate_values, attach_online_hadamard, attach_out_hadamard, split_all,
        reorder_tokens,
    ),
}  # fmt: skip

# --- layout ----------------------------------------------------------------------------------------------------------

RELEASED = {
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}


@pytest.mark.parametrize("size", RELEASED)
def test_layout_fits_released_sizes(size: str) -> None:
    width, mlp, depth, heads, kv_heads = RELEASED[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layout = llama_layout(model)
    layout.check(model)
    assert layout == llama_layout(config)
    assert not layout.is_multimodal
    quantized = layout.quantized_linears()
    assert len(quantized) == 7 * depth and set(quantized.values()) == {Part.TEXT}
    for block in layout.text.blocks:
        attention = block.attention
        assert model.get_submodule(attention.value).weight.shape[0] == attention.value_rows[1]
        assert model.get_submodule(attention.out).weight.shape[1] == attention.num_heads * attention.head_dim


def test_head_dim_of_the_config_wins() -> None:
    model = tiny_model(head_dim=16)
    attention = tiny_layout(model).text.blocks[0].attention
    assert attention.head_dim == 16
    assert attention.value_rows == (0, model.model.layers[0].self_attn.v_proj.out_features)


# --- exact transforms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chain", CHAINS)
def test_logits_do_not_change(chain: str, family: str, tied: bool) -> None:
    model = tiny_model(family=family, seed=1, tie_word_embeddings=tied)
    batch = tiny_batch(seed=2)
    expected = logits(model, batch)
    session = session_for(model, tiny_layout(model), [batch], seed=3, bits="w8a8")
    for step in CHAINS[chain]:
        step(session)
    assert (logits(model, batch) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_the_transforms_do_something() -> None:
    """A chain that changed nothing would pass the test above."""
    model = tiny_model()
    session = session_for(model, tiny_layout(model), [tiny_batch()])
    before = {name: linear.weight.clone() for name, linear in session.linears.items()}
    for step in CHAINS["all"]:
        step(session)
    changed = {name for name, linear in session.linears.items() if not torch.equal(linear.weight, before[name])}
    assert changed == set(before)


# --- methods ---------------------------------------------------------------------------------------------------------


def quantized(
    method: str, bits: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> tuple[LoadedModel, Any]:
    model = tiny_model(dtype, seed)
    recipe = Recipe(method, "float", bits, 3, options)
    loaded = LoadedModel("tiny", model, None, tiny_layout(model))
    batches = [tiny_batch(8, seed=seed) for seed in range(2)]
    return loaded, method_named(method).quantize(model, loaded.layout, recipe, batches)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w4a16-g64"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_quantizes_every_linear(name: str, bits: str) -> None:
    bits = "float" if name == "none" else bits
    loaded, report = quantized(name, bits)
    out = logits(loaded.model, tiny_batch(seed=9))
    expected = logits(tiny_model(torch.float32), tiny_batch(seed=9))
    assert list(report.layers) == list(loaded.layout.quantized_linears())
    assert all((layer.weight_num_bits is None) == (name == "none") for layer in report.layers.values())
    assert torch.equal(out, expected) == (name == "none")
    error = (out - expected).norm() / expected.norm()
    assert error < {"w8a8": 0.05, "w4a16-g64": 0.3, "w4a4": 0.6}.get(bits, 1e-6)


def test_msq_has_one_scale_and_is_the_per_tensor_quantizer() -> None:
    """Without visual tokens MQuant without RMS is QuaRot, to the last bit."""
    mine, report = quantized("mquant", "w4a8", rms=False)
    theirs, _ = quantized("quarot", "w4a8")
    assert all(layer.scales.keys() == {"tensor"} for layer in report.layers.values())
    assert torch.equal(logits(mine.model, tiny_batch()), logits(theirs.model, tiny_batch()))


def test_reordering_leaves_no_hook_behind() -> None:
    model = tiny_model()
    session = open_session(model, tiny_layout(model), Recipe("test"), [])
    decoder = model.get_submodule(session.layout.text_root)
    before = len(decoder._forward_pre_hooks), len(decoder._forward_hooks)
    reorder_tokens(session)
    assert (len(decoder._forward_pre_hooks), len(decoder._forward_hooks)) == before


def test_ranges_by_modality_are_text_alone() -> None:
    model = tiny_model()
    ranges = modality_ranges(open_session(model, tiny_layout(model), Recipe("test"), [tiny_batch()]))
    assert len(ranges) == 14
    assert all(seen.visual == 0 and seen.text > 0 for seen in ranges.values())


def test_inputs_embeds_are_enough() -> None:
    """A text-only model needs no input_ids to tell modalities apart."""
    loaded, _ = quantized("mquant", "w8a8")
    embeds = loaded.model.get_input_embeddings()(tiny_batch()["input_ids"])
    assert torch.isfinite(loaded.model(inputs_embeds=embeds).logits).all()


def test_visits_replay_what_a_whole_pass_would_show() -> None:
    """Each group's rows, with everything before it altered, against plain forward passes of the model as it then is."""
    model = tiny_model()
    session = open_session(
        model, tiny_layout(model), Recipe("test", "w4a8", "w4a8"), [tiny_batch(seed=s) for s in (0, 1)]
    )
    order: list[str] = []

    def visit(names: tuple[str, ...], replay: Replay) -> None:
        rows: list[Tensor] = []
        replay(rows.append)
        torch.testing.assert_close(torch.cat(rows), whole_pass_rows(session, names[0]), rtol=0, atol=1e-12)
        for name in names:
            session.linears[name].weight.data = session.linears[name].weight.mul(3).round() / 3
        order.extend(names)

    visit_groups(session, visit)
    assert order == list(session.linears)


@torch.no_grad()
def whole_pass_rows(session: Session, name: str) -> Tensor:
    seen: list[Tensor] = []
    for batch in session.batches:
        valid = batch["attention_mask"].bool()
        handle = session.linears[name].register_forward_pre_hook(lambda _, args, v=valid: seen.append(args[0][v]))
        session.model(**batch)
        handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("options", [{}, {"activations": "token"}, {"rms_rule": "any"}], ids=str)
@pytest.mark.parametrize("name", ["rtn", "smoothquant", "quarot", "mquant"])
def test_save_and_load_are_exact(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    if "rms_rule" in options and name != "mquant":
        options = {"observer": "mse"}
    before, report = quantized(name, "w4a8", **options)
    save_quantized(before.model, report, Recipe(name, "float", "w4a8", 3, options), tmp_path, "tiny")
    model = tiny_model(torch.float32, seed=99)
    after = LoadedModel("tiny", model, None, tiny_layout(model))
    load_quantized(tmp_path, after, method_named(name).restore)
    for seed in (0, 7):
        assert torch.equal(logits(after.model, tiny_batch(seed=seed)), logits(before.model, tiny_batch(seed=seed)))


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the stand-in's tokenizer, in two shards."""
    path = tmp_path_factory.mktemp("models") / "llama-2-7b"
    tiny_model(torch.float32, vocab_size=len(tokenizer)).save_pretrained(path, max_shard_size="300KB")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter() -> LlamaAdapter:
    return next(adapter for adapter in ADAPTERS if adapter.name == "llama-2-7b")


@pytest.fixture(scope="module")
def loaded(adapter: LlamaAdapter, folder: Path) -> LoadedModel:
    return adapter.load(folder, "cpu", torch.float32)


def test_registered_models() -> None:
    lengths = {adapter.name: adapter.context_length for adapter in ADAPTERS}
    assert lengths == {"standin-llama": 256, "llama-2-7b": 2048, "llama-2-13b": 2048, "llama-2-70b": 2048}
    assert {adapter.modality for adapter in ADAPTERS} == {"text"}


def test_weights_are_found_in_the_models_folder_and_the_cache(
    adapter: LlamaAdapter, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert adapter.find_weights(None) is None
    assert adapter.find_weights(folder.parent) == folder
    snapshot = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert adapter.find_weights(None) == snapshot
    next(snapshot.glob("model-*.safetensors")).unlink()
    assert adapter.find_weights(None) is None


def test_loads_shards_without_the_network(adapter: LlamaAdapter, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = adapter.load(folder, "cpu", torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def remove_config(path: Path) -> None:
    (path / "config.json").unlink()


def remove_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def remove_shard(path: Path) -> None:
    (path / "model-00001-of-00002.safetensors").unlink()


def truncate_shard(path: Path) -> None:
    shard = path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])


def other_kind(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))


def drop_weight(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "lacks config.json"),
        (remove_tokenizer, "lacks tokenizer.json"),
        (remove_shard, "lacks model-00001-of-00002.safetensors"),
        (truncate_shard, "cannot be loaded"),
        (other_kind, "cannot be loaded"),
        (drop_weight, r"lacks the weight 'model\.layers\.2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named_in_one_line(
    adapter: LlamaAdapter, damaged: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(damaged)
    with pytest.raises(MissingWeightsError, match=message) as caught:
        adapter.load(damaged, "cpu", torch.float32)
    assert "\n" not in str(caught.value) and "MODELS_DIR/llama-2-7b" in str(caught.value)


def test_non_finite_weight_is_named(adapter: LlamaAdapter, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        adapter.load(tmp_path, "cpu", torch.float32)


def test_a_model_of_another_family_is_refused() -> None:
    model = tiny_qwen2_vl(torch.float32)
    with pytest.raises(LayoutError, match=r"model\.layers"):
        llama_layout(tiny_config()).check(model)


# --- inputs and outputs ----------------------------------------------------------------------------------------------


def message(*texts: str) -> Message:
    return [{"type": "text", "value": text} for text in texts]


PROMPTS = (message(" The town of "), message(" In 1812 , the ", "river"), message("x"))


def test_encode_pads_on_the_left_and_adds_nothing(adapter: LlamaAdapter, loaded: LoadedModel) -> None:
    batch = adapter.encode(loaded, PROMPTS, ["one", "", " two ."])
    texts = [" The town of one", " In 1812 , the river", "x two ."]
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
        assert loaded.processor.decode(ids[mask.bool()]) == text
        assert mask.tolist() == sorted(mask.tolist())


def test_images_are_refused(adapter: LlamaAdapter, loaded: LoadedModel) -> None:
    with pytest.raises(DatasetError, match="text only"):
        adapter.encode(loaded, [[{"type": "image", "value": "x.png"}]])


@torch.no_grad()
@pytest.mark.parametrize("method", ["none", "mquant"])
def test_generate_is_greedy_in_a_padded_batch(adapter: LlamaAdapter, folder: Path, method: str) -> None:
    loaded = adapter.load(folder, "cpu", torch.float32)
    loaded.model.generation_config.update(do_sample=True, temperature=5.0)
    if method != "none":
        recipe = Recipe(method, "float", "w8a8", options={"activations": "token"})
        method_named(method).quantize(loaded.model, loaded.layout, recipe, [adapter.encode(loaded, PROMPTS)])
    texts = adapter.generate(loaded, adapter.encode(loaded, PROMPTS), 5)
    assert texts == [greedy(loaded, adapter.encode(loaded, [prompt])["input_ids"], 5) for prompt in PROMPTS]


def greedy(loaded: LoadedModel, ids: Tensor, count: int) -> str:
    """Argmax by whole forward passes without a cache."""
    start = ids.shape[1]
    for _ in range(count):
        token = loaded.model(input_ids=ids).logits[0, -1].argmax()
        if token == loaded.processor.eos_token_id:
            break
        ids = torch.cat([ids, token[None, None]], dim=1)
    return loaded.processor.decode(ids[0, start:], skip_special_tokens=True)


def test_a_tokenizer_without_padding_pads_with_its_end(adapter: LlamaAdapter, folder: Path) -> None:
    """LLaMA-2's has none."""
    loaded = adapter.load(folder, "cpu", torch.float32)
    tokenizer = loaded.processor
    tokenizer.pad_token = None
    bare = LoadedModel("bare", nn.Linear(1, 1), tokenizer, loaded.layout)
    batch = adapter.encode(bare, PROMPTS)
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {tokenizer.eos_token_id}
