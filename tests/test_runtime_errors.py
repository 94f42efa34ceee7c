"""What a runtime refuses, and that it says what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fakes.runtimes import quantized_llama, quantized_tiny
from fakes.tiny_llama import tiny_config as llama_config
from fakes.tiny_qwen2_vl import tiny_config
from mqbench.harness.errors import LayoutError, RequestError, UnknownNameError
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.qwen2_vl import qwen2_vl_layout
from mqbench.harness.quant.layout import Attention, Norm, NormPlace
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.runtime import systems
from mqbench.harness.runtime.build import build_runtime
from mqbench.harness.runtime.convert import runtime_of
from mqbench.harness.runtime.coverage import check_covered
from mqbench.harness.runtime.interface import RuntimeInputs
from mqbench.harness.runtime.systems import SYSTEMS, System


def loaded_tiny(bits: str = "w8a8/w4a8", **options: Any) -> LoadedModel:
    return quantized_tiny("rtn", bits, **options)[0]


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        ("w4a8/w8a16", {}, "weights of 8 bits are not packed; choose other bits"),
        ("w4a8/w4a8-g20", {}, "one scale per output channel; choose other bits"),
        ("w4a8/w4a8", {"quantize_tokens": "text"}, "only its text tokens"),
    ],
)
def test_what_cannot_run_in_integers(bits: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        runtime_of(loaded_tiny(bits, **options))


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("mquant-w4a8", r"runs 'model.visual.patch_embed.proj' as w4a8 per tensor, but the model has w8a8 per tensor"),
        ("w8a8-token", r"as w8a8 per token, but the model has w8a8 per tensor; quantize it for that system"),
        ("bf16-eager", r"as float, but the model has w8a8 per tensor"),
        ("bf16-graph", r"as float, but the model has w8a8 per tensor"),
        ("fp8-token", r"cannot run on cpu: needs float8 tensor cores; run it on a GPU"),
    ],
)
def test_a_system_that_the_model_is_not(system: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        runtime_of(loaded_tiny(activations="modality"), SYSTEMS[system])


def test_the_llm_is_looked_at_too() -> None:
    tensor = System("x", "x", "w8a8/w4a8", "tensor")
    with pytest.raises(RequestError, match="q_proj' as w4a8 per tensor, but the model has w4a8 per modality"):
        runtime_of(loaded_tiny(activations="modality"), tensor)


def test_a_quantized_kv_cache() -> None:
    loaded, _ = quantized_llama("quarot", "w4a8/w4a8", kv_bits=4)
    with pytest.raises(RequestError, match="has a quantized KV cache, which the runtime does not have; leave kv_bits"):
        runtime_of(loaded)


def test_a_family_that_nobody_declared() -> None:
    with pytest.raises(UnknownNameError, match="unknown model type of the runtime 'mistral'; known: llama, qwen2"):
        build_runtime(llama_config("mistral"), SYSTEMS["bf16-graph"], device="cpu")


def test_sliding_windows() -> None:
    config = llama_config("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(LayoutError, match="'llama' has sliding-window attention, which the runtime does not have"):
        build_runtime(config, SYSTEMS["bf16-graph"], device="cpu")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"norm_place": NormPlace.POST}, r"norms behind its branches \(vision\)"),
        ({"entry_norm": "x"}, r"a norm before its first block \(vision\)"),
        ({"final_norm": None}, r"readers of the bare residual stream \(vision\)"),
        ({"final_norm": Norm("x", ("y",), joint=True)}, "a projector other than norm, linear, activation, linear"),
    ],
)
def test_what_blocks_do_not_compute(changes: dict[str, Any], missing: str) -> None:
    layout = qwen2_vl_layout(tiny_config())
    assert layout.vision is not None
    with pytest.raises(LayoutError, match=f"'qwen2_vl' has {missing}, which the runtime does not have; take"):
        check_covered(replace(layout, vision=replace(layout.vision, **changes)), tiny_config().text_config)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"mlp_scale": "x"}, "LayerScale"),
        ({"experts": qwen2_vl_layout(tiny_config()).text.blocks[0].paths}, "experts"),
        ({"attention": Attention("v", (0, 8), "o", 8, 6, 2, value_period=32)}, "interleaved queries, keys and values"),
    ],
)
def test_what_an_llm_block_does_not_compute(changes: dict[str, Any], missing: str) -> None:
    layout = qwen2_vl_layout(tiny_config())
    first = replace(layout.text.blocks[0], **changes)
    text = replace(layout.text, blocks=(first, *layout.text.blocks[1:]))
    with pytest.raises(LayoutError, match=rf"'qwen2_vl' has {missing} \(text\), which the runtime does not have"):
        check_covered(replace(layout, text=text), tiny_config().text_config)


def test_a_device_map_with_a_wrong_name() -> None:
    with pytest.raises(RequestError, match=r"device_map names 'model.visual.blocks.0', which is no block of the LLM"):
        build_runtime(tiny_config(), SYSTEMS["mquant-w4a8"], device="cpu", device_map={"model.visual.blocks.0": "cpu"})


def test_unknown_activation_functions() -> None:
    config = tiny_config()
    config.vision_config.hidden_act = "relu"
    with pytest.raises(LayoutError, match=r"'model.visual.blocks.0.mlp' has no activation functions"):
        build_runtime(config, SYSTEMS["mquant-w4a8"], device="cpu")


# --- a runtime in use


@pytest.fixture
def runtime() -> Any:
    return build_runtime(tiny_config(), SYSTEMS["w4a8-tensor"], device="cpu", dtype=torch.float32)


def inputs(rows: int, tokens: int) -> RuntimeInputs:
    return RuntimeInputs(torch.full((rows, tokens), 5))


def test_decoding_comes_behind_a_prompt(runtime: Any) -> None:
    with pytest.raises(ValueError, match="nothing was prefilled; call prefill first"):
        runtime.decode(torch.tensor([1]))
    runtime.prefill(inputs(2, 3))
    with pytest.raises(ValueError, match=r"tokens must have shape \(2,\), got \(1,\)"):
        runtime.decode(torch.tensor([1]))
    runtime.reset()
    with pytest.raises(ValueError, match="nothing was prefilled"):
        runtime.decode(torch.tensor([1, 2]))


def test_a_full_cache(runtime: Any) -> None:
    runtime.reserve(1, 1)
    capacity = runtime.cache.num_tokens
    runtime.prefill(inputs(1, capacity - 1))
    with pytest.raises(ValueError, match="2 tokens do not fit the 1 free slots of the cache; reserve more"):
        runtime.prefill(inputs(1, 2))
    runtime.decode(torch.tensor([1]))
    with pytest.raises(ValueError, match=f"the cache is full with {capacity} tokens; reserve more, or reset it"):
        runtime.decode(torch.tensor([1]))


def test_other_rows_than_cached(runtime: Any) -> None:
    runtime.prefill(inputs(2, 3))
    with pytest.raises(ValueError, match="the cache holds 2 rows, got 3; reset it"):
        runtime.prefill(inputs(3, 3))
    runtime.reset()
    assert runtime.prefill(inputs(3, 3)).shape == (3, 64)


def test_a_prompt_that_was_prepared_for_another_cache(runtime: Any) -> None:
    prompt = runtime.prepare(inputs(2, 3))
    runtime.prefill(prompt)
    with pytest.raises(ValueError, match="prepared behind 0 tokens, the cache holds 3"):
        runtime.prefill(prompt)


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 1]]])
def test_padding_elsewhere_than_on_the_left(runtime: Any, mask: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="attention_mask must pad on the left"):
        runtime.prefill(RuntimeInputs(torch.full((1, 3), 5), torch.tensor(mask)))


# --- which devices a system can run on


def test_every_system_but_float8_runs_on_a_cpu() -> None:
    refused = {name for name, system in SYSTEMS.items() if system.runs_on("cpu") is not None}
    assert refused == {"fp8-token"}
    assert all(system.runs_on("meta") is None for system in SYSTEMS.values())


def test_other_devices_are_named() -> None:
    assert SYSTEMS["bf16-graph"].runs_on("mps") == "no kernels for device type 'mps'; take cpu or cuda"


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("bf16-eager", (7, 5), None),
        ("mquant-w4a8", (7, 5), "needs a GPU of compute capability 8.0 or newer, this one has 7.5"),
        ("mquant-w4a8", (8, 0), None),
        ("fp8-token", (8, 6), "needs a GPU of compute capability 8.9 or newer, this one has 8.6"),
        ("fp8-token", (9, 0), None),
    ],
)
def test_what_a_gpu_must_have(
    name: str, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(systems, "find_spec", lambda module: object())
    assert SYSTEMS[name].runs_on("cuda") == reason


def test_triton_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(systems, "find_spec", lambda module: None)
    assert SYSTEMS["mquant-w4a8"].runs_on("cuda") == "needs Triton; install triton"
    assert SYSTEMS["bf16-graph"].runs_on("cuda") is None


def test_systems_are_named_by_their_keys_and_make_sense() -> None:
    for name, system in SYSTEMS.items():
        assert system.name == name
        assert (system.order in (systems.Order.AIFS, systems.Order.SLICED)) <= (system.activations == "modality")
        assert (system.activations is None) <= (system.text_scheme.activations is None)
    assert [SYSTEMS[name].weights for name in ("bf16-eager", "awq-w4a16-g128", "mquant-w4a8", "fp8-token")] == [
        "BF16", "W4-g128", "W4", "FP8",
    ]  # fmt: skip
    assert replace(SYSTEMS["mquant-w4a8"], bits="float/w8a8").weights == "W8"


def test_quantized_modules_are_gone_after_conversion() -> None:
    loaded = loaded_tiny(activations="modality")
    runtime_of(loaded)
    assert not any(isinstance(module, QuantLinear) for module in loaded.model.modules())
