"""Runtimes straight from a config: their sizes, what building costs, and that they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen2VLConfig

from fakes.allocation import AllocationMeter, unique_tensor_bytes
from fakes.runtimes import all_logits, decoded, generated, quantized_llama, quantized_tiny, real
from fakes.tiny_llama import tiny_batch as llama_batch
from fakes.tiny_llama import tiny_config as llama_config
from fakes.tiny_qwen2_vl import tiny_batch, tiny_config, tiny_model
from mqbench.harness.quant.integer import quant_linears
from mqbench.harness.runtime.attention import KV_BLOCK
from mqbench.harness.runtime.build import build_runtime, spread_blocks
from mqbench.harness.runtime.convert import runtime_of
from mqbench.harness.runtime.interface import DECODE_RESERVE, RuntimeInputs
from mqbench.harness.runtime.systems import SYSTEMS

ON_CPU = [name for name, system in SYSTEMS.items() if system.runs_on("cpu") is None]
NEW_TOKENS = 4


def build(name: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    return build_runtime(tiny_config(), SYSTEMS[name], device="cpu", dtype=dtype, **arguments)


def a_batch(seed: int = 7) -> dict[str, torch.Tensor]:
    return tiny_batch(tiny_model(torch.float32), num_images=2, batch_size=3, seed=seed)


@pytest.mark.parametrize("name", ON_CPU)
def test_both_ways_through_a_built_model_agree(name: str) -> None:
    """Its own passes, and Transformers' ``generate``; in bfloat16 it runs as well."""
    runtime, batch = build(name, torch.float64), a_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    runtime.model.generation_config.eos_token_id = None
    tokens = decoded(runtime, batch, NEW_TOKENS)
    assert torch.equal(generated(runtime.model, batch, NEW_TOKENS), tokens)
    runtime.reset()
    found = runtime.prefill(RuntimeInputs.from_batch(batch))
    torch.testing.assert_close(found, all_logits(runtime.model, batch)[:, -1], rtol=0, atol=1e-9)
    assert 0.3 < found.std() < 3
    low = build(name, torch.bfloat16)
    logits = low.prefill(RuntimeInputs.from_batch(batch))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert low.decode(logits.argmax(-1)).isfinite().all()


def test_orders_of_one_model_agree() -> None:
    """Random values do not depend on the order, so the three are one model."""
    batch = a_batch()
    names = ("mquant-w4a8", "w4a8-rows", "w4a8-msq")
    runtimes = [build(name, torch.float64) for name in names]
    found = [(decoded(runtime, batch, NEW_TOKENS), runtime.decode(torch.tensor([3, 4, 5]))) for runtime in runtimes]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-9)


def test_the_seed_decides() -> None:
    batch = RuntimeInputs.from_batch(a_batch())
    one, same, other = (build("mquant-w4a8", seed=seed).prefill(batch) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.1)


# --- the same tensors as a quantized model has


EQUAL = [
    ("mquant", "mquant-w4a8", {"rms_rule": "any"}),
    ("mquant", "w4a8-token", {"rms_rule": "any", "activations": "token"}),
    ("mquant", "w4a8-token-unfused", {"rms_rule": "any", "activations": "token"}),
    ("awq", "awq-w4a16-g128", {}),
    ("none", "bf16-graph", {}),
]


@pytest.mark.parametrize(("method", "name", "options"), EQUAL)
def test_a_built_model_has_the_tensors_of_a_quantized_one(method: str, name: str, options: dict[str, Any]) -> None:
    system = SYSTEMS[name]
    loaded, _ = quantized_tiny(method, system.bits, torch.float32, down_mean=0.5, **options)
    split = {linear.name for linear in quant_linears(loaded.model).values() if linear.x0_bypass}
    transformed = {block.mlp_out for tower in loaded.layout.towers for block in tower.blocks if system.split}
    assert split == transformed
    quantized = runtime_of(loaded, system)
    built = build_runtime(tiny_config(), system, device="cpu", dtype=torch.float32)
    assert tensors_of(built) == tensors_of(quantized)
    assert built.memory() == quantized.memory()
    assert all((linear.w0 is not None) is system.split for linear in mlp_outs(built))


def mlp_outs(runtime: Any) -> list[Any]:
    return [block.mlp_out.linears[0] for block in (*runtime.fused.vision_blocks, *runtime.fused.decoder.blocks)]


def tensors_of(runtime: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    named = dict(runtime.model.named_parameters(remove_duplicate=False)) | dict(runtime.model.named_buffers())
    return {name: (tuple(x.shape), x.dtype) for name, x in named.items() if "inv_freq" not in name}


def test_a_text_only_model_too() -> None:
    loaded, _ = quantized_llama("quarot", "w4a8/w4a8")
    system = replace(SYSTEMS["w4a8-tensor"], split=False)
    built = build_runtime(llama_config(), system, device="cpu", dtype=torch.float64)
    assert tensors_of(built) == tensors_of(runtime_of(loaded, system))
    assert torch.equal(decoded(built, llama_batch(), 3), generated(built.model, llama_batch(), 3, eos_token_id=None))


# --- what building costs


@pytest.mark.parametrize("name", ON_CPU)
def test_building_holds_little_more_than_the_result(name: str) -> None:
    config = medium_config()
    with AllocationMeter() as meter:
        runtime = build_runtime(config, SYSTEMS[name], device="cpu", dtype=torch.bfloat16)
    weights = runtime.memory().weights_bytes
    assert weights == unique_tensor_bytes(runtime.model)
    assert meter.held_bytes <= 1.01 * weights
    assert meter.peak_bytes <= 1.2 * weights


def test_the_meter_sees_a_copy_in_16_bits() -> None:
    """What the test above would catch: a model that is built in 16 bits and packed afterwards."""
    with AllocationMeter() as meter:
        floats = build_runtime(medium_config(), SYSTEMS["bf16-graph"], device="cpu", dtype=torch.bfloat16)
        packed = build_runtime(medium_config(), SYSTEMS["mquant-w4a8"], device="cpu", dtype=torch.bfloat16)
    assert meter.peak_bytes > 3 * packed.memory().weights_bytes
    assert floats.memory().weights_bytes > 2 * packed.memory().weights_bytes


def medium_config() -> Qwen2VLConfig:
    """Blocks weigh more than embeddings, as in the real models."""
    config = tiny_config()
    config.vision_config.depth = 4
    text = config.text_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = 6, 192, 768
    text.num_attention_heads, text.num_key_value_heads = 6, 2
    text.rope_parameters = text.rope_parameters | {"mrope_section": [4, 6, 6]}
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.vision_config.hidden_size = text.hidden_size
    return config


def test_tied_embeddings_are_one_tensor() -> None:
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    for name in ("bf16-eager", "mquant-w4a8"):
        tied = build_runtime(config, SYSTEMS[name], device="cpu", dtype=torch.bfloat16).memory().weights_bytes
        assert build(name, torch.bfloat16).memory().weights_bytes - tied == 64 * 48 * 2


# --- several devices, memory, padding


def test_blocks_go_where_the_map_says() -> None:
    layout_of = build("mquant-w4a8").fused.layout
    places = spread_blocks(layout_of, ["cpu", "meta"])
    assert list(places.values()) == ["cpu", "meta"]
    runtime = build("mquant-w4a8", device_map=places)
    assert [device.type for device in runtime.layer_devices] == ["cpu", "meta"]
    assert {x.device.type for x in runtime.fused.visual.parameters()} == {"cpu"}
    runtime.reserve(1, 8)
    assert [keys.device.type for keys in runtime.cache.keys] == ["cpu", "meta"]


@pytest.mark.parametrize("name", ["bf16-eager", "bf16-graph", "mquant-w4a8"])
def test_a_model_spread_over_devices_runs(name: str) -> None:
    """The same device under two names, so that every tensor takes the way between devices."""
    batch, whole = a_batch(), build(name)
    layout = build("mquant-w4a8").fused.layout
    spread = build(name, device_map=spread_blocks(layout, ["cpu", "cpu:0"]))
    assert torch.equal(decoded(spread, batch, NEW_TOKENS), decoded(whole, batch, NEW_TOKENS))


def test_an_untouched_model_spreads_its_blocks() -> None:
    """Weights are where the map says; what a block reads comes there, and the last norm reads on the first device."""
    layout = build("mquant-w4a8").fused.layout
    runtime = build("bf16-eager", device_map=spread_blocks(layout, ["cpu", "meta"]))
    places = [
        {x.device.type for x in runtime.model.get_submodule(block.name).parameters()} for block in layout.text.blocks
    ]
    assert places == [{"cpu"}, {"meta"}]
    block = runtime.model.get_submodule(layout.text.blocks[1].name)
    (bring,) = block._forward_pre_hooks.values()
    (x,), kept = bring(block, (torch.ones(2),), {"mask": torch.ones(3), "past_key_values": torch.ones(4)})
    assert (x.device.type, kept["mask"].device.type, kept["past_key_values"].device.type) == ("meta", "meta", "cpu")


def test_memory_by_part() -> None:
    runtime = build("mquant-w4a8", torch.bfloat16)
    before = runtime.memory()
    assert (before.kv_cache_bytes, before.workspace_bytes) == (0, 0)
    assert before.weights_bytes == unique_tensor_bytes(runtime.model)
    batch = RuntimeInputs.from_batch(a_batch())
    runtime.prefill(batch)
    assert batch.num_tokens + DECODE_RESERVE < KV_BLOCK
    kv_bytes = 2 * 2 * 3 * 2 * KV_BLOCK * 8 * 2  # layers, keys and values, rows, heads, slots, width, bytes
    state_bytes = 3 * KV_BLOCK * (4 + 1) + 3 * 8
    after = runtime.memory()
    assert (after.kv_cache_bytes, after.workspace_bytes) == (kv_bytes, state_bytes)
    assert after.total_bytes == before.weights_bytes + kv_bytes + state_bytes
    runtime.reserve(1, KV_BLOCK + 1)
    assert runtime.memory().kv_cache_bytes == kv_bytes // 3 * 2


def test_real_and_padded_rows_are_told_apart() -> None:
    runtime, batch = build("mquant-w4a8", torch.float64), a_batch()
    longer = {name: torch.nn.functional.pad(x, (3, 0)) if x.shape[0] == 3 and "grid" not in name else x
              for name, x in batch.items()}  # fmt: skip
    found = real(longer, all_logits(runtime.model, longer))
    torch.testing.assert_close(found, real(batch, all_logits(runtime.model, batch)), rtol=0, atol=1e-9)
