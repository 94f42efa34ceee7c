"""The runtime's own operations against plain ones, and times by part."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fakes.runtimes import quantized_tiny
from fakes.tiny_qwen2_vl import tiny_batch, tiny_config, tiny_model
from mqbench.harness.runtime.attention import MIN_KEYS_PER_SPLIT, decode_attention, num_splits, stock_attention
from mqbench.harness.runtime.blocks import _windowed_attention
from mqbench.harness.runtime.build import build_runtime
from mqbench.harness.runtime.convert import runtime_of
from mqbench.harness.runtime.decoder import order_of
from mqbench.harness.runtime.interface import PARTS, RuntimeInputs
from mqbench.harness.runtime.linears import Float8Linear, FloatLinear, IntegerLinear, WeightOnlyLinear, merged
from mqbench.harness.runtime.parts import clock, part
from mqbench.harness.runtime.pointwise import RowNorm, activation_of
from mqbench.harness.runtime.site import FLOAT8_DTYPE, Float8Site, IntegerSite
from mqbench.harness.runtime.systems import SYSTEMS
from mqbench.kernels import api


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- attention


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    keys=st.sampled_from([5, 128, 256, 768]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_decoding_attends_to_every_valid_key(batch: int, kv_heads: int, group: int, keys: int, seed: int) -> None:
    q, k, v = random(batch, kv_heads * group, 1, 8, seed=seed), *random(2, batch, kv_heads, keys, 8, seed=seed + 1)
    valid = random(batch, keys, seed=seed + 2) > 0
    valid[:, 0] = True
    wide = (x.repeat_interleave(group, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *wide, valid[:, None, None])
    torch.testing.assert_close(decode_attention(q, k, v, valid), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("keys", "splits"), [(1, 1), (255, 1), (256, 2), (768, 4), (1024, 8), (8704, 16), (1 << 20, 16)]
)
def test_keys_are_split_into_equal_parts_that_are_long_enough(keys: int, splits: int) -> None:
    assert num_splits(keys) == splits
    assert keys % splits == 0
    assert splits == 1 or keys // splits >= MIN_KEYS_PER_SPLIT


def test_decoding_in_16_bits_does_not_round_scores() -> None:
    """Scores of 16-bit products would be off by up to 2^-9 of their size: far more than the output's own rounding."""
    q, k, v = 6 * random(2, 4, 1, 64), 6 * random(2, 2, 512, 64, seed=1), random(2, 2, 512, 64, seed=2)
    low = [x.bfloat16() for x in (q, k, v)]
    valid = torch.ones(2, 512, dtype=torch.bool)
    exact = decode_attention(*(x.double() for x in low), valid)
    assert (decode_attention(*low, valid) - exact).abs().max() < 0.02
    scores = (low[0].view(4, 2, 64) @ low[1].view(4, 512, 64).mT).double() / 8
    rounded = (scores.softmax(-1) @ low[2].double().view(4, 512, 64)).view(2, 4, 1, 64)
    assert (rounded - exact).abs().max() > 0.05


@pytest.mark.parametrize("lengths", [[6], [3, 3], [1, 2, 3], [4, 2]])
def test_patches_attend_within_their_window(lengths: list[int]) -> None:
    q, k, v = random(3, 6, 2, 4)
    edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
    same = torch.zeros(6, 6, dtype=torch.bool)
    for start, stop in pairwise(edges):
        same[start:stop, start:stop] = True
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    expected = stock_attention(*heads, mask=same)[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(_windowed_attention(q, k, v, lengths), expected, rtol=0, atol=1e-12)


@given(st.lists(st.sampled_from("pvt"), min_size=1, max_size=12))
def test_visual_tokens_come_first_and_padding_stays(kinds: list[str]) -> None:
    visual = torch.tensor([[kind == "v" for kind in kinds]])
    valid = torch.tensor([[kind != "p" for kind in kinds]])
    order = order_of(visual, valid)[0].tolist()
    tokens = [kinds[index] for index in order]
    assert sorted(order) == list(range(len(kinds)))
    assert [kind == "p" for kind in tokens] == [kind == "p" for kind in kinds]
    assert "".join(tokens).replace("p", "") == "v" * kinds.count("v") + "t" * kinds.count("t")
    for kind in "vt":
        moved = [index for index in order if kinds[index] == kind]
        assert moved == sorted(moved)
    if "p" not in kinds:
        assert order_of(visual)[0].tolist() == order


# --- linears


def integer(rows: int, seed: int, bits: int = 4, bias: bool = True) -> IntegerLinear:
    levels = torch.randint(-8, 8, (rows, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    weight = api.pack_int4(levels) if bits == 4 else levels
    return IntegerLinear(
        weight, random(rows, seed=seed).abs(), torch.float64, random(rows, seed=seed) if bias else None
    )


def test_merged_linears_are_their_outputs_side_by_side() -> None:
    x = IntegerSite(8)(random(5, 16))
    parts = [integer(3, 1), integer(4, 2, bias=False), integer(2, 3)]
    one = merged(parts)
    assert one is not None
    torch.testing.assert_close(one(x), torch.cat([part(x) for part in parts], -1), rtol=0, atol=1e-12)
    floats = [FloatLinear(random(rows, 16, seed=rows)) for rows in (3, 4)]
    both = merged(floats)
    assert both is not None and both.bias is None
    torch.testing.assert_close(both(random(5, 16)), torch.cat([one(random(5, 16)) for one in floats], -1))


def test_what_cannot_be_merged_is_not() -> None:
    assert merged([integer(3, 1), integer(3, 2, bits=8)]) is None
    assert merged([integer(3, 1), FloatLinear(random(3, 16))]) is None
    split = integer(3, 1)
    split.w0 = random(3)
    assert merged([split, integer(3, 2)]) is None
    packed, scale = torch.zeros(3, 8, dtype=torch.uint8), random(3, 2)
    groups = [WeightOnlyLinear(packed, scale, zero, 8) for zero in (None, scale)]
    assert merged(groups) is None
    assert merged(groups[:1]) is groups[0]


def test_float8_rows_and_weights_are_close_to_the_product() -> None:
    x, weight = random(8, 64, dtype=torch.float32), random(32, 64, seed=1, dtype=torch.float32)
    x[3] = 0
    scale = weight.abs().amax(1) / torch.finfo(FLOAT8_DTYPE).max
    linear = Float8Linear((weight / scale[:, None]).to(FLOAT8_DTYPE), scale, torch.bfloat16, torch.ones(32).bfloat16())
    found, expected = linear(Float8Site()(x)).float(), x @ weight.T + 1
    assert (found - expected).norm() / expected.norm() < 0.05  # E4M3 has three bits: 2^-4 at most an operand
    assert torch.equal(found[3], torch.ones(32))


def test_norms_and_activations_that_nobody_knows() -> None:
    assert activation_of(nn.ReLU()) is None
    assert activation_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    norm = RowNorm.from_module(nn.LayerNorm(8, eps=0.5), "x")
    torch.testing.assert_close(norm(random(3, 8).float()), F.layer_norm(random(3, 8).float(), (8,), eps=0.5))


# --- parts


def test_times_by_part_add_up_to_the_pass() -> None:
    now = iter([10.0, 11.0, 13.0, 16.0, 16.0, 20.0])
    with pytest.MonkeyPatch.context() as patch, clock(torch.device("cpu")) as parts:
        patch.setattr("time.perf_counter", lambda: next(now))
        for name in ("llm gemm", "quantize and norm", "llm gemm"):
            with part(name):
                pass
    times = parts.milliseconds()
    assert tuple(times) == PARTS
    assert {name: ms for name, ms in times.items() if ms} == {
        "llm gemm": 5000, "quantize and norm": 3000, "other": 2000,
    }  # fmt: skip
    assert sum(times.values()) == 10000


@pytest.mark.parametrize("name", ["bf16-eager", "bf16-graph", "mquant-w4a8", "w4a8-msq"])
def test_a_pass_has_every_part(name: str) -> None:
    runtime = build_runtime(tiny_config(), SYSTEMS[name], device="cpu", dtype=torch.float32)
    batch = RuntimeInputs.from_batch(tiny_batch(tiny_model(torch.float32), num_images=2, batch_size=2))
    expected = runtime.prefill(batch)
    runtime.reset()
    with runtime.instrumented() as parts, torch.profiler.profile() as profile:
        assert torch.equal(runtime.prefill(batch), expected)
    assert all(ms > 0 for ms in parts.milliseconds().values())
    named = {event.key for event in profile.key_averages() if event.key.startswith("mqbench:")}
    assert named >= {f"mqbench:{name}" for name in PARTS if name != "other"}
    runtime.reset()
    count = len(parts._ranges)
    runtime.prefill(batch)
    assert len(parts._ranges) == count  # the clock is closed


def test_modules_are_told_apart_by_name() -> None:
    loaded, _ = quantized_tiny("none", "float")
    runtime = runtime_of(loaded, SYSTEMS["bf16-eager"])
    blocks = "model.visual.blocks.0", "model.language_model.layers.1"
    found = {
        name: runtime.part_of(name)
        for name in (f"{blocks[0]}.attn.qkv", f"{blocks[0]}.attn", f"{blocks[0]}.mlp.act", f"{blocks[0]}.norm2",
                     "model.visual.merger.mlp.2", f"{blocks[1]}.mlp.down_proj", f"{blocks[1]}.self_attn", "lm_head",
                     "model.visual.patch_embed.proj", "model.language_model.embed_tokens")
    }  # fmt: skip
    assert list(found.values()) == [
        "vision gemm", "vision attention", "quantize and norm", "quantize and norm", "projector", "llm gemm",
        "llm attention", "llm gemm", "vision gemm", "other",
    ]  # fmt: skip


def test_modules_of_the_runtime_are_told_apart_by_name() -> None:
    runtime = build_runtime(tiny_config(), SYSTEMS["mquant-w4a8"], device="meta")
    vision, text = "model.visual", "model.language_model.layers.1"
    names = (f"{vision}.blocks.0.qkv", f"{vision}.merger.projection_out.linears.0", f"{vision}.merger.norm",
             f"{vision}.patch_embed.projection", f"{text}.mlp_in.sites.0", f"{text}.mlp_in.linears.0", text,
             "lm_head.projection", "model.language_model.norm", "model.language_model.embed_tokens")  # fmt: skip
    assert [runtime.part_of(name) for name in names] == [
        "vision gemm", "projector", "quantize and norm", "vision gemm", "quantize and norm", "llm gemm", "other",
        "llm gemm", "quantize and norm", "other",
    ]  # fmt: skip
