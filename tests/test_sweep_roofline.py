"""Limits against numbers worked out by hand and against torch's FLOP counter on the meta device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mqbench.harness.blueprint import load_blueprint
from mqbench.harness.blueprint_count import build_parts, visual_flops
from mqbench.harness.quant.scheme import scheme_named
from mqbench.harness.runtime.systems import SYSTEMS
from mqbench.harness.sweep.model import find_sweep_model
from mqbench.harness.sweep.protocol import Shape
from mqbench.harness.sweep.roofline import (
    BF16,
    FP8,
    INT8,
    Peaks,
    Precision,
    Product,
    decode_limit_ms,
    linear_product,
    precision_of,
    prefill_limit_ms,
    text_products,
    vision_products,
)

MODEL = find_sweep_model("qwen2-vl-7b", None, {})
CONFIG, RULES = MODEL.data, MODEL.rules
H100 = Peaks(3e12, {BF16: 700e12, INT8: 1400e12, FP8: 1400e12})
"""Round numbers of the size that such a GPU reaches; no measurement."""


def total_ops(products) -> float:  # type: ignore[no-untyped-def]
    return sum(one.ops * one.count for one in products)


def test_linear_by_hand() -> None:
    """10 rows through a 4-bit layer of 100 -> 30: int8 in, half-byte weights, bfloat16 out."""
    product = linear_product(10, 100, 30, Precision(INT8, 0.5, 1.0))
    assert product == Product(INT8, 2 * 10 * 100 * 30, 10 * 100 + 100 * 30 / 2 + 10 * 30 * 2)
    peaks = Peaks(bytes_s=100.0, ops_s={INT8: 1000.0})
    assert peaks.time_s(product) == max(60000 / 1000, 3100 / 100)
    assert peaks.time_s(replace(product, kind=FP8)) is None


@pytest.mark.parametrize(
    ("bits", "float8", "expected"),
    [
        ("float", False, Precision(BF16, 2.0, 2.0)),
        ("w4a8", False, Precision(INT8, 0.5, 1.0)),
        ("w8a8", False, Precision(INT8, 1.0, 1.0)),
        ("w4a16-g128", False, Precision(BF16, 0.5, 2.0)),
        ("float", True, Precision(FP8, 1.0, 1.0)),
    ],
)
def test_precision_of_schemes(bits: str, float8: bool, expected: Precision) -> None:
    assert precision_of(scheme_named(bits), float8) == expected


def test_vision_operations_are_those_that_torch_counts() -> None:
    """The blueprint's own count runs transformers' tower and merger on the meta device."""
    counted = visual_flops(load_blueprint("qwen2-vl-7b"), 840)
    products = list(vision_products(Shape(840), RULES, CONFIG, Precision()))
    assert total_ops(products) == counted.linear + counted.attention
    assert total_ops(products[-1:]) == counted.attention, "all pairs of patches"


def test_text_operations_are_those_that_torch_counts() -> None:
    """Without attention, of which half the square counts, and with one row through the output head."""
    from torch.utils.flop_counter import FlopCounterMode

    llm = build_parts(load_blueprint("qwen2-vl-7b")).llm.model
    tokens, mask = (torch.empty(1, 415, dtype=torch.long, device="meta"), torch.empty(1, 1, 415, 415, device="meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llm(input_ids=tokens, attention_mask=mask, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "bmm" in str(op))
    linear = counter.get_total_flops() - attention
    *linears, pairs, head = text_products(Shape(560), RULES, CONFIG, Precision(), 0, None)
    assert total_ops(linears) == linear
    assert head.ops == 2 * 3584 * 152064
    whole_square = 4 * 415 * 415 * 3584 * 28
    assert pairs.ops * pairs.count == pytest.approx(whole_square * 416 / 830)


def test_prefill_limits_order_the_systems() -> None:
    limits = {name: prefill_limit_ms(Shape(840), RULES, CONFIG, SYSTEMS[name], H100) for name in SYSTEMS}
    assert limits["bf16-eager"] == limits["bf16-graph"]
    assert limits["mquant-w4a8"] == limits["w4a8-token"] == limits["w4a8-tensor"]
    assert limits["mquant-w4a8"] < limits["w8a8-token"] * 1.001 < limits["awq-w4a16-g128"] * 1.001
    # 915 tokens through 6.5 billion weights and 3600 patches: 12 + 6 + 0.2 tera-operations at 700 per second.
    assert 20 < limits["bf16-graph"] < 35
    assert 1.4 < limits["bf16-graph"] / limits["mquant-w4a8"] < 2.0, "attention stays in bfloat16"


def test_limits_lack_rates_that_were_not_measured() -> None:
    peaks = Peaks(3e12, {BF16: 700e12, INT8: 1400e12})
    assert prefill_limit_ms(Shape(840), RULES, CONFIG, SYSTEMS["fp8-token"], peaks) is None
    assert decode_limit_ms(Shape(840, decode_tokens=4), RULES, CONFIG, SYSTEMS["fp8-token"], peaks) is None


def test_decoding_is_bound_by_the_bandwidth() -> None:
    """At batch 1: the LLM's 6.53 billion weights, the output head and 2 * 28 * 512 numbers of cache per token."""
    shape = Shape(2240, text_tokens=60, text_before=10, decode_tokens=512)
    linear = 28 * (3584 * 4608 + 3584 * 3584 + 3584 * 37888 + 18944 * 3584)
    head, cache = 3584 * 152064, 2 * 28 * 512 * (6460 + 513 / 2)
    for name, num_bytes in (("bf16-graph", 2.0), ("w8a8-token", 1.0), ("mquant-w4a8", 0.5)):
        expected_ms = (linear * num_bytes + 2 * head + 2 * cache) / 3e12 * 1e3
        limit = decode_limit_ms(shape, RULES, CONFIG, SYSTEMS[name], H100)
        assert limit == pytest.approx(expected_ms, rel=2e-3)


def test_turns_pay_for_what_came_before() -> None:
    """The second turn attends to the first one's cache, and nothing else changes."""
    one = Shape(2240, text_tokens=60, text_before=10, decode_tokens=512)
    two = replace(one, turns=2)
    first, both = (prefill_limit_ms(shape, RULES, CONFIG, SYSTEMS["bf16-graph"], H100) for shape in (one, two))
    more_ms = 4 * 6460 * 6972 * 3584 * 28 / 700e12 * 1e3
    assert first is not None and both == pytest.approx(2 * first + more_ms, rel=1e-3)


def test_batch_counts_rows_without_padding() -> None:
    shape = Shape(280, text_tokens=60, text_before=10, text_step=50, batch=4)
    linears = list(text_products(shape, RULES, CONFIG, Precision(), 0, None))
    assert linears[0].ops == 2 * (160 + 210 + 260 + 310) * 3584 * 4608


def test_tied_sizes_come_from_the_configuration() -> None:
    small = find_sweep_model("qwen2-vl-7b", None, {"text_config.num_hidden_layers": 14})
    whole, half = (
        prefill_limit_ms(Shape(840), RULES, json.loads(model.config), SYSTEMS["bf16-graph"], H100)
        for model in (MODEL, small)
    )
    assert whole is not None and half is not None and half < 0.75 * whole
