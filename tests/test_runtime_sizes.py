"""What the real models weigh under each system, without a byte of them: built on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2VLConfig

from mqbench.harness.runtime.build import build_runtime
from mqbench.harness.runtime.interface import RuntimeInputs
from mqbench.harness.runtime.linears import Float8Linear, FloatLinear
from mqbench.harness.runtime.systems import SYSTEMS, System
from mqbench.kernels.hadamard import padded_size

QWEN2_VL = {
    "2b": {"width": 1536, "inner": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "vocabulary": 151936},
    "7b": {"width": 3584, "inner": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocabulary": 152064},
    "72b": {"width": 8192, "inner": 29568, "layers": 80, "heads": 64, "kv_heads": 8, "vocabulary": 152064},
}
CHECKPOINT_7B_BYTES = 16_582_751_232
CHECKPOINT_BYTES = {"2b": 2 * 2_208_985_600, "7b": CHECKPOINT_7B_BYTES, "72b": 2 * 73_405_560_320}
"""Of the released checkpoints in bfloat16; ``harness/blueprints`` says where these numbers come from."""
TIED = ("2b",)
VISION_WIDTH, VISION_INNER, VISION_LAYERS, PATCH = 1280, 5120, 32, 3 * 2 * 14 * 14
ROTARY_BYTES = 2 * 4 * (64 + 20)
"""Frequencies of both rotary embeddings, kept twice in float32."""


def real_config(size: str, layers: int | None = None) -> Qwen2VLConfig:
    llm = QWEN2_VL[size]
    return Qwen2VLConfig(
        vision_config={"hidden_size": llm["width"], "depth": layers or VISION_LAYERS, "embed_dim": VISION_WIDTH},
        text_config={
            "hidden_size": llm["width"],
            "intermediate_size": llm["inner"],
            "num_hidden_layers": layers or llm["layers"],
            "num_attention_heads": llm["heads"],
            "num_key_value_heads": llm["kv_heads"],
            "vocab_size": llm["vocabulary"],
            "tie_word_embeddings": size in TIED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        tie_word_embeddings=size in TIED,
    )


def linears_of(size: str) -> dict[str, list[tuple[int, int, int, bool]]]:
    """(outputs, inputs, how many, bias) by part; the last of a tower's four stands behind an online Hadamard."""
    llm = QWEN2_VL[size]
    width, inner, layers = llm["width"], llm["inner"], llm["layers"]
    qkv = width + 2 * 128 * llm["kv_heads"]
    return {
        "vision": [
            (3 * VISION_WIDTH, VISION_WIDTH, VISION_LAYERS, True),
            (VISION_WIDTH, VISION_WIDTH, VISION_LAYERS, True),
            (VISION_INNER, VISION_WIDTH, VISION_LAYERS, True),
            (VISION_WIDTH, VISION_INNER, VISION_LAYERS, True),
        ],
        "other": [
            (VISION_WIDTH, PATCH, 1, False),
            (4 * VISION_WIDTH, 4 * VISION_WIDTH, 1, True),
            (width, 4 * VISION_WIDTH, 1, True),
        ],
        "llm": [(qkv, width, layers, True), (width, width, layers, False), (2 * inner, width, layers, False),
                (width, inner, layers, False)],
    }  # fmt: skip


def expected_w4a8_bytes(size: str) -> int:
    """Half a byte a weight, a float32 scale and perhaps a bfloat16 bias an output, a rank-1 column behind each
    Hadamard, one static scale an input (two in the LLM), embedding and head in bfloat16."""
    embeddings = 1 if size in TIED else 2
    total = embeddings * 2 * QWEN2_VL[size]["vocabulary"] * QWEN2_VL[size]["width"] + ROTARY_BYTES
    for part, linears in linears_of(size).items():
        for index, (outputs, inputs, count, bias) in enumerate(linears):
            is_transformed = index == 3
            columns = padded_size(inputs) if is_transformed else inputs
            each = outputs * columns // 2 + 4 * outputs + 2 * outputs * (bias + is_transformed)
            total += count * (each + (8 if part == "llm" else 4))
    return total


def weights_bytes(size: str, system: System) -> int:
    return build_runtime(real_config(size), system, device="meta").memory().weights_bytes


@pytest.mark.parametrize("size", QWEN2_VL)
def test_the_real_models_in_w4a8_weigh_what_they_should(size: str) -> None:
    assert weights_bytes(size, SYSTEMS["mquant-w4a8"]) == expected_w4a8_bytes(size)


@pytest.mark.parametrize("size", QWEN2_VL)
def test_the_real_models_in_bfloat16_weigh_what_their_checkpoints_do(size: str) -> None:
    for name in ("bf16-eager", "bf16-graph"):
        assert weights_bytes(size, SYSTEMS[name]) == CHECKPOINT_BYTES[size] + ROTARY_BYTES


def test_integer_heads_of_the_real_7b() -> None:
    head = QWEN2_VL["7b"]["vocabulary"] * QWEN2_VL["7b"]["width"]
    scales = 4 * QWEN2_VL["7b"]["vocabulary"]
    for bits, saved in ((8, head), (4, head + head // 2)):
        found = weights_bytes("7b", replace(SYSTEMS["mquant-w4a8"], head_bits=bits))
        assert found == expected_w4a8_bytes("7b") - saved + scales


def test_awq_of_the_real_7b() -> None:
    """Nothing in 16 bits but embedding, head, norms, biases and the vision tower; a scale and a zero point a group."""
    llm = linears_of("7b")["llm"]
    saved = sum(count * outputs * (2 * inputs - inputs // 2 - 8 * (inputs // 128)) for outputs, inputs, count, _ in llm)
    assert weights_bytes("7b", SYSTEMS["awq-w4a16-g128"]) == CHECKPOINT_7B_BYTES + ROTARY_BYTES - saved


@pytest.mark.parametrize("name", ["mquant-w4a8", "w4a8-msq", "awq-w4a16-g128", "bf16-graph"])
def test_a_pass_with_the_shapes_of_the_real_7b_asks_the_device_for_nothing(name: str) -> None:
    """Tensors on the meta device have no values: whoever waits for one fails here, as it would in a CUDA graph."""
    runtime = build_runtime(real_config("7b", layers=2), SYSTEMS[name], device="meta")
    side = 840 // 14
    marked = [1, 2, 151652, *[151655] * (side // 2) ** 2, 151653, 3, 4]
    ids = torch.tensor([marked, [0, *marked[1:]]])
    inputs = RuntimeInputs(
        ids,
        torch.tensor([[1] * len(marked), [0] + [1] * (len(marked) - 1)]),
        torch.empty(2 * side**2, PATCH, device="meta"),
        torch.tensor([[1, side, side]] * 2),
        (ids == 151655).int(),
    )
    runtime.reserve(2, 4096)
    assert runtime.prefill(inputs).shape == (2, QWEN2_VL["7b"]["vocabulary"])
    assert runtime.decode(torch.tensor([5, 6])).shape == (2, QWEN2_VL["7b"]["vocabulary"])
    assert runtime.prefill(inputs).device.type == "meta"


def test_float8_of_the_real_7b() -> None:
    """Every linear but the patch embedding, whose 1176 inputs 16 does not divide."""
    fused = build_runtime(real_config("7b"), SYSTEMS["fp8-token"], device="meta").fused  # type: ignore[attr-defined]
    assert isinstance(fused.patch_embed.projection.linears[0], FloatLinear)
    blocks = (*fused.vision_blocks, *fused.decoder.blocks)
    assert all(isinstance(block.mlp_out.linears[0], Float8Linear) for block in blocks)
    assert isinstance(fused.projector.projection_in.linears[0], Float8Linear)
