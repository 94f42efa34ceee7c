"""A quantized model that became a runtime computes what the integer backend computed, by every way into it.

In float64 both compute the same to rounding errors of 1e-15, so a wrong scale, mask, position or slot shows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes.runtimes import all_logits, decoded, extended, generated, quantized_llama, quantized_tiny, real
from fakes.tiny_qwen2_vl import tiny_batch
from mqbench.harness import discover
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.standin.benchmarks import BENCHMARKS, split_examples
from mqbench.harness.models.standin.study import Scored, batches_of
from mqbench.harness.quant.integer import quant_linears, use_integer_backend
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.runtime.convert import runtime_of
from mqbench.harness.runtime.interface import RuntimeInputs
from mqbench.harness.runtime.systems import SYSTEMS, Engine, Order, System

NEW_TOKENS = 6
EXACT: dict[str, float] = {"rtol": 0, "atol": 1e-9}
STANDIN = "standin-qwen2-vl"
FOLDER = Path(__file__).parents[1] / "harness" / "models" / "standin" / "weights" / STANDIN

CASES = [
    ("none", "float", {}),
    ("rtn", "w8a8/w4a8", {}),
    ("rtn", "w8a8/w4a8", {"activations": "modality"}),
    ("rtn", "w5a6/w3a4", {"activations": "token"}),
    ("rtn", "float/w4a16-g20", {"zero_point": True}),
    ("smoothquant", "w8a8/w8a8", {}),
    ("awq", "float/w4a16-g16", {}),
    ("gptq", "w4a16-g20/w4a16", {}),
    ("quarot", "w4a8/w4a8", {"online_out_hadamard": True}),
    ("quarot", "w4a8/w4a8", {"activations": "token"}),
    ("mquant", "w8a8/w4a8", {"rms_rule": "any"}),
    ("mquant", "float/w4a8", {"rms_rule": "any"}),
    ("mquant", "w4a8/w4a8", {"rms_rule": "any", "activations": "token"}),
    ("mquant", "w4a8/w4a8", {"rms_rule": "any", "rms_side": "weight"}),
    ("mquant", "w4a8/w4a8", {"rms_rule": "any", "rms_side": "activation"}),
    ("mquant", "w4a16-g20/w4a16-g20", {"rms_rule": "any", "zero_point": True}),
]


@pytest.mark.parametrize(("method", "bits", "options"), CASES)
def test_same_logits_and_tokens_by_every_way(method: str, bits: str, options: dict[str, Any]) -> None:
    """Left-padded rows of two images each."""
    loaded, batch = quantized_tiny(method, bits, **options)
    expected, tokens = all_logits(loaded.model, batch), generated(loaded.model, batch, NEW_TOKENS)
    runtime = runtime_of(loaded)
    assert not quant_linears(loaded.model)
    torch.testing.assert_close(real(batch, all_logits(loaded.model, batch)), real(batch, expected), **EXACT)
    torch.testing.assert_close(runtime.prefill(RuntimeInputs.from_batch(batch)), expected[:, -1], **EXACT)
    runtime.reset()
    assert torch.equal(decoded(runtime, batch, NEW_TOKENS), tokens)
    assert torch.equal(generated(loaded.model, batch, NEW_TOKENS), tokens)
    if method == "mquant":
        assert torch.equal(generated(loaded.model, batch, NEW_TOKENS, cache_implementation="static"), tokens)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(
    ("method", "options"), [("mquant", {"rms_rule": "any"}), ("mquant", {"activations": "token"}), ("rtn", {})]
)
def test_in_lower_precision_rounding_is_all_that_differs(
    method: str, options: dict[str, Any], dtype: torch.dtype, largest: float
) -> None:
    """In float32 a single activation that fell on the other side of a level would show."""
    loaded, batch = quantized_tiny(method, "w8a8/w4a8", dtype, **options)
    expected = all_logits(loaded.model, batch)[:, -1].float()
    runtime = runtime_of(loaded)
    for found in (runtime.prefill(RuntimeInputs.from_batch(batch)), all_logits(loaded.model, batch)[:, -1]):
        assert (found.float() - expected).norm() <= largest * expected.norm()


def steps_of(loaded: LoadedModel, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits behind each decoded token, from whole passes without a cache."""
    rows = len(batch["input_ids"])
    parts = []
    for count in range(1, tokens.shape[1] + 1):
        longer = dict(batch)
        for name, tail in (
            ("input_ids", tokens[:, :count]),
            ("attention_mask", torch.ones(rows, count, dtype=torch.long)),
            ("mm_token_type_ids", torch.zeros(rows, count, dtype=torch.int32)),
        ):
            longer[name] = torch.cat([batch[name], tail], 1)
        parts.append(all_logits(loaded.model, longer)[:, -1])
    return torch.stack(parts, 1)


@pytest.mark.parametrize("order", [Order.AIFS, Order.ORIGINAL, Order.SLICED])
def test_turns_and_steps_in_between_match_one_long_pass(order: Order) -> None:
    """A padded turn with images, decoded tokens, another padded turn with images, decoded tokens."""
    loaded, batch = quantized_tiny("mquant", "w8a8/w4a8", rms_rule="any")
    more = tiny_batch(loaded.model, num_images=1, batch_size=3, seed=11)
    said = torch.tensor([[5, 6], [7, 8], [9, 10]])
    answer = {"input_ids": said, "attention_mask": torch.ones_like(said)}
    middle = {name: torch.cat([answer[name], more[name]], 1) for name in answer} | {
        "mm_token_type_ids": torch.cat([torch.zeros(3, 2, dtype=torch.int32), more["mm_token_type_ids"]], 1),
        "pixel_values": more["pixel_values"],
        "image_grid_thw": more["image_grid_thw"],
    }
    whole = extended(batch, middle)
    tail = torch.tensor([[20, 21], [22, 23], [24, 25]])
    steps = torch.cat([all_logits(loaded.model, whole)[:, -1:], steps_of(loaded, whole, tail)], 1)
    runtime = runtime_of(loaded, mquant_system(order))
    runtime.reserve(3, 100)
    for _ in range(2):  # an emptied cache is as good as a new one
        runtime.prefill(RuntimeInputs.from_batch(batch))
        for column in said.T:
            runtime.decode(column)
        found = [runtime.prefill(RuntimeInputs.from_batch(more))]
        found += [runtime.decode(column).clone() for column in tail.T]
        torch.testing.assert_close(torch.stack(found, 1), steps, **EXACT)
        runtime.reset()


def test_float_systems_agree_over_turns() -> None:
    """Transformers' own model and cache beside the runtime's blocks and cache."""
    found = []
    for name in ("bf16-eager", "bf16-graph"):
        loaded, batch = quantized_tiny("none", "float")
        more = tiny_batch(loaded.model, num_images=1, batch_size=3, seed=11)
        runtime = runtime_of(loaded, SYSTEMS[name])
        runtime.reserve(3, 100)
        logits = [runtime.prefill(runtime.prepare(RuntimeInputs.from_batch(batch))).clone()]
        logits += [
            runtime.decode(torch.tensor([5, 6, 7])).clone(),
            runtime.prefill(RuntimeInputs.from_batch(more)).clone(),
        ]
        logits += [runtime.decode(torch.tensor([8, 9, 10]))]
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[1], found[0], **EXACT)


def mquant_system(order: Order) -> System:
    return replace(SYSTEMS["mquant-w4a8"], bits="w8a8/w4a8", order=order)


def test_orders_agree() -> None:
    """AIFS, rows with a scale each and rows gathered by modality are one function."""
    found = []
    for order in Order:
        loaded, batch = quantized_tiny("mquant", "w8a8/w4a8", rms_rule="any")
        runtime = runtime_of(loaded, mquant_system(order))
        tokens = decoded(runtime, batch, NEW_TOKENS)
        through_transformers = real(batch, all_logits(loaded.model, batch))
        found.append((runtime.decode(tokens[:, -1]), through_transformers, tokens))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **EXACT)


@pytest.mark.parametrize("bits", ["w8a8/w8a8", "w4a8/w4a8"])
def test_unfused_dynamic_quantization_agrees_with_fused(bits: str) -> None:
    found = []
    for fused in (True, False):
        loaded, batch = quantized_tiny("mquant", bits, rms_rule="any", activations="token")
        runtime = runtime_of(loaded, replace(SYSTEMS["w4a8-token"], bits=bits, fused=fused))
        assert runtime.model.get_submodule(loaded.layout.text.blocks[0].name).qkv.is_merged is fused
        found.append(decoded(runtime, batch, NEW_TOKENS))
        found.append(runtime.decode(found[0][:, -1]))
    torch.testing.assert_close(found[3], found[1], **EXACT)
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("engine", Engine)
def test_on_a_cpu_every_engine_runs_eagerly(engine: Engine) -> None:
    loaded, batch = quantized_tiny("rtn", "w8a8/w8a8", torch.float32)
    expected = all_logits(loaded.model, batch)[:, -1]
    runtime = runtime_of(loaded, System("x", "x", "w8a8/w8a8", "tensor", engine=engine))
    torch.testing.assert_close(runtime.prefill(RuntimeInputs.from_batch(batch)), expected, rtol=0, atol=1e-4)


def test_linears_whose_scales_differ_stay_apart() -> None:
    loaded, batch = quantized_tiny("rtn", "w8a8/w8a8")
    first, second = loaded.layout.text.blocks
    value = quant_linears(loaded.model)[first.attention.value]
    assert value.input_quantizer is not None
    value.input_quantizer.scale = 1.5 * value.input_quantizer.scale
    expected = all_logits(loaded.model, batch)
    runtime = runtime_of(loaded)
    assert not runtime.model.get_submodule(first.name).qkv.is_merged
    assert runtime.model.get_submodule(second.name).qkv.is_merged
    torch.testing.assert_close(runtime.prefill(RuntimeInputs.from_batch(batch)), expected[:, -1], **EXACT)


@pytest.mark.parametrize("options", [{}, {"activations": "token"}, {"online_hadamard": False}])
def test_a_text_only_model(options: dict[str, Any]) -> None:
    loaded, batch = quantized_llama("quarot", "w4a8/w4a8", **options)
    expected, tokens = all_logits(loaded.model, batch), generated(loaded.model, batch, NEW_TOKENS)
    runtime = runtime_of(loaded)
    torch.testing.assert_close(real(batch, all_logits(loaded.model, batch)), real(batch, expected), **EXACT)
    assert torch.equal(decoded(runtime, batch, NEW_TOKENS), tokens)
    assert torch.equal(generated(loaded.model, batch, NEW_TOKENS), tokens)


def test_text_rows_and_an_unpadded_row_alone() -> None:
    loaded, _ = quantized_tiny("mquant", "w8a8/w4a8", rms_rule="any")
    mixed = tiny_batch(loaded.model, num_images=2, batch_size=3, seed=3, text_rows=1)
    alone = tiny_batch(loaded.model, num_images=1, batch_size=1, seed=4)
    text = tiny_batch(loaded.model, batch_size=2, seed=5, text_rows=2)
    expected = [all_logits(loaded.model, batch) for batch in (mixed, alone, text)]
    runtime = runtime_of(loaded)
    for batch, logits in zip((mixed, alone, text), expected, strict=True):
        torch.testing.assert_close(real(batch, all_logits(loaded.model, batch)), real(batch, logits), **EXACT)
        torch.testing.assert_close(runtime.prefill(RuntimeInputs.from_batch(batch)), logits[:, -1], **EXACT)
        runtime.reset()


def test_a_prompt_that_ends_in_an_image() -> None:
    """Under AIFS its last token is not the last one that ran."""
    loaded, batch = quantized_tiny("mquant", "w8a8/w4a8", rms_rule="any")
    batch = tiny_batch(loaded.model, num_images=1, batch_size=1, seed=4)
    keep = int(batch["mm_token_type_ids"][0].nonzero()[-1]) + 1
    batch = {name: x[:, :keep] if x.shape[0] == 1 and name != "image_grid_thw" else x for name, x in batch.items()}
    expected = all_logits(loaded.model, batch)[:, -1]
    runtime = runtime_of(loaded)
    torch.testing.assert_close(runtime.prefill(RuntimeInputs.from_batch(batch)), expected, **EXACT)


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.02), (4, 0.3)])
def test_integer_heads_are_close_to_the_float_head(bits: int, largest: float) -> None:
    loaded, batch = quantized_tiny("mquant", "w8a8/w4a8", torch.float32, rms_rule="any")
    expected = all_logits(loaded.model, batch)[:, -1]
    runtime = runtime_of(loaded, replace(mquant_system(Order.AIFS), head_bits=bits))
    found = runtime.prefill(RuntimeInputs.from_batch(batch))
    assert 1e-4 < (found - expected).norm() / expected.norm() < largest
    assert runtime.model.lm_head.projection.linears[0].packed is (bits == 4)


# --- the shipped stand-in, as VLMEvalKit would run it


def standin(dtype: torch.dtype) -> tuple[LoadedModel, list[dict[str, Tensor]]]:
    """The stand-in in MQuant's W4A8, in integers, and a prompt of every benchmark."""
    loaded = discover.find_model(STANDIN).load(FOLDER, "cpu", dtype)
    drawn = [row for entry in BENCHMARKS for row in split_examples(entry)["calibration"][:2]]
    items = [batches_of([row], loaded.processor.tokenizer, loaded.model)[0] for row in drawn]
    for item in items:
        for name, x in item.batch.items():
            item.batch[name] = x.to(dtype) if x.is_floating_point() else x
    recipe = Recipe("mquant", "w4a8", "w4a8", 0, {"rounding": "rtn"})
    calibration = [item.batch for item in items]
    discover.find_method("mquant").quantize(loaded.model, loaded.layout, recipe, calibration)
    assert use_integer_backend(loaded.model).complete
    return loaded, [prompt_of(item) for item in items[::2]]


def prompt_of(item: Scored) -> dict[str, Tensor]:
    """One row without its answer."""
    prompt = int((item.labels[0] != -100).nonzero()[0])
    tokens = item.batch["input_ids"].shape
    return {name: x[:, :prompt] if x.shape == tokens else x for name, x in item.batch.items()}


def test_the_adapter_answers_on_a_runtime_as_before() -> None:
    """``mqbench eval`` and VLMEvalKit call the adapter; nothing else is needed to run them on the fused blocks."""
    loaded, prompts = standin(torch.float64)
    adapter = discover.find_model(STANDIN)
    expected = [adapter.generate(loaded, batch, 5) for batch in prompts]
    assert sum(map(len, (answer for answers in expected for answer in answers))) > len(prompts)
    logits = [all_logits(loaded.model, batch)[:, -1] for batch in prompts]
    runtime = runtime_of(loaded, SYSTEMS["mquant-w4a8"])
    assert [adapter.generate(loaded, batch, 5) for batch in prompts] == expected
    for batch, last in zip(prompts, logits, strict=True):
        torch.testing.assert_close(runtime.prefill(RuntimeInputs.from_batch(batch)), last, rtol=0, atol=1e-6)
        runtime.reset()
