"""KV-cache quantization: the grid, the exact Hadamard on queries and keys, and every kind of forward pass."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fakes import tiny_llama, tiny_qwen2_vl
from fakes.sessions import session_for
from mqbench.baselines.awq import METHOD as AWQ
from mqbench.baselines.gptq import METHOD as GPTQ
from mqbench.baselines.quarot import METHOD as QUAROT
from mqbench.baselines.rtn import METHOD as RTN
from mqbench.baselines.smoothquant import METHOD as SMOOTHQUANT
from mqbench.harness.errors import LayoutError, UnknownNameError
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.quant import kv_cache
from mqbench.harness.quant.kv_cache import (
    QUANTIZED_KV_ATTENTION,
    QUANTIZER,
    KVQuantizer,
    kv_cache_steps,
    quantize_kv_cache,
    round_vectors,
)
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Strategy
from mqbench.harness.quant.serialize import load_quantized, read_saved, save_quantized
from mqbench.harness.quant.transforms import build_module
from mqbench.mquant.mquant import METHOD as MQUANT

FAMILIES = pytest.mark.parametrize("tiny", [tiny_llama, tiny_qwen2_vl], ids=["llama", "qwen2_vl"])
ALL = (RTN, SMOOTHQUANT, GPTQ, AWQ, QUAROT, MQUANT)
METHODS = pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)


def batch_for(tiny: ModuleType, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded rows, with two images each for a model that sees."""
    if tiny is tiny_llama:
        return tiny_llama.tiny_batch(seed=seed)
    return tiny_qwen2_vl.tiny_batch(model, num_images=2, batch_size=3, seed=seed)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits[batch["attention_mask"].bool()]


def quantized(tiny: ModuleType, method: StepMethod = RTN, bits: str = "float", **options: Any) -> nn.Module:
    """A tiny float64 model behind a method, by default nothing but its KV cache rounded."""
    model = tiny.tiny_model(torch.float64)
    batches = [] if bits == "float" else [batch_for(tiny, model, seed) for seed in (7, 8)]
    method.quantize(model, tiny.tiny_layout(model), Recipe(method.name, bits, bits, options=options), batches)
    return model


def relative_error(tiny: ModuleType, **how: Any) -> float:
    model = tiny.tiny_model(torch.float64)
    batch = batch_for(tiny, model)
    expected = logits(model, batch)
    return ((logits(quantized(tiny, **how), batch) - expected).norm() / expected.norm()).item()


def with_positions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Text inputs with positions that count from each row's first token, as ``generate`` gives them.

    LLaMA counts padding when it is given none. That changes nothing in floating point, where only differences of
    positions matter, but keys are rounded behind their rotary embedding.
    """
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


# --- the grid -------------------------------------------------------------------------------------------------------


def naive_round(vector: list[float], num_bits: int, clip: float) -> list[float]:
    """QuaRot's rule for one vector, in Python's own floats."""
    low, high = clip * min(0.0, *vector), clip * max(0.0, *vector)
    if low == high:
        return [0.0] * len(vector)
    top = 2**num_bits - 1
    scale = (high - low) / top
    zero_point = round(-low / scale)
    levels = [min(max(round(value / scale) + zero_point, 0), top) for value in vector]
    return [(level - zero_point) * scale for level in levels]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(2, 9)),
    num_bits=st.integers(2, 8),
    clip=st.sampled_from([1.0, 0.95, 0.8]),
    offset=st.sampled_from([-5.0, 0.0, 5.0]),
    seed=st.integers(0, 999),
)
def test_rounding_equals_a_naive_one(
    shape: tuple[int, ...], num_bits: int, clip: float, offset: float, seed: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    rounded = round_vectors(x, QuantArgs(num_bits, symmetric=False, strategy=Strategy.CHANNEL), clip)
    expected = [naive_round(vector, num_bits, clip) for vector in x.flatten(0, -2).tolist()]
    torch.testing.assert_close(rounded.flatten(0, -2), torch.tensor(expected, dtype=x.dtype), rtol=0, atol=1e-12)


def test_a_vector_of_zeros_stays() -> None:
    zeros = torch.zeros(1, 2, 3, 4)
    assert torch.equal(round_vectors(zeros, QuantArgs(4, symmetric=False, strategy=Strategy.CHANNEL)), zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    args = QuantArgs(4, symmetric=False, strategy=Strategy.CHANNEL)
    assert torch.equal(round_vectors(x, args), round_vectors(x.float(), args).to(dtype))


def test_a_tokens_grid_depends_on_no_other_token() -> None:
    quantizer = KVQuantizer(3, rotate=True)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 6, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    whole = quantizer(query, key, value)
    for token in range(6):
        alone = quantizer(*(x[:, 1:, token : token + 1] for x in (query, key, value)))
        for one, all_tokens in zip(alone, whole, strict=True):
            torch.testing.assert_close(one, all_tokens[:, 1:, token : token + 1], rtol=0, atol=1e-12)


def test_clip_of_quarot_pays_at_4_bits_only() -> None:
    """Why ``kv_clip`` is 1 by default: 0.95 lowers the error of wide heads at 4 bits a little, at 8 it triples."""
    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))

    def error(num_bits: int, clip: float) -> float:
        args = QuantArgs(num_bits, symmetric=False, strategy=Strategy.CHANNEL)
        return (round_vectors(x, args, clip) - x).norm().item()

    assert 0.94 < error(4, 0.95) / error(4, 1.0) < 0.99
    assert 2.5 < error(8, 0.95) / error(8, 1.0) < 3.5


# --- in a model -----------------------------------------------------------------------------------------------------


@FAMILIES
def test_hadamard_on_queries_and_keys_changes_nothing(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model(torch.float64)
    batch = batch_for(tiny, model)
    expected = logits(model, batch)
    seen: list[Tensor] = []
    monkeypatch.setattr(kv_cache, "round_vectors", lambda x, args, clip: seen.append(x) or x)
    session = session_for(model, tiny.tiny_layout(model), kv_bits=4)
    quantize_kv_cache(session, rotate=True)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)
    rotated = seen[0].clone()
    seen.clear()
    for block in session.layout.text.blocks:
        model.get_submodule(block.attention.out.rpartition(".")[0]).kv_quantizer.rotate = False
    logits(model, batch)
    assert not torch.allclose(rotated, seen[0])  # the keys were rotated


@FAMILIES
@METHODS
def test_error_falls_with_bits(tiny: ModuleType, method: StepMethod) -> None:
    errors = [relative_error(tiny, method=method, kv_bits=num_bits) for num_bits in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert 1e-5 < errors[-1] < 0.01


@FAMILIES
def test_no_kv_bits_leaves_the_model_alone(tiny: ModuleType) -> None:
    model = quantized(tiny, kv_bits=None)
    assert model.get_submodule(tiny.tiny_layout(model).text_root).config._attn_implementation == "sdpa"
    assert not any(isinstance(module, KVQuantizer) for module in model.modules())
    assert relative_error(tiny, kv_bits=None) < 1e-12
    assert kv_cache_steps(Recipe("rtn")) == ()


@pytest.mark.parametrize("rotate", [False, True])
def test_equals_rounding_where_quarot_does(rotate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """QuaRot's code rounds keys behind the rotary function and values behind v_proj, before the cache: once."""
    model, reference = tiny_llama.tiny_model(), tiny_llama.tiny_model()
    batch = tiny_llama.tiny_batch()
    quantize_kv_cache(session_for(model, tiny_llama.tiny_layout(model), kv_bits=3, kv_clip=0.95), rotate)
    ours, ours_next = prefill_and_step(model, batch)
    _round_like_quarot(reference, monkeypatch, rotate, num_bits=3, clip=0.95)
    theirs, theirs_next = prefill_and_step(reference, batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours_next, theirs_next, rtol=0, atol=1e-9)


def _round_like_quarot(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, rotate: bool, num_bits: int, clip: float
) -> None:
    from scipy.linalg import hadamard

    original = modeling_llama.apply_rotary_pos_emb
    matrix = torch.tensor(hadamard(8), dtype=torch.float64) / 8**0.5

    def rounded(x: Tensor) -> Tensor:
        vectors = [naive_round(vector, num_bits, clip) for vector in x.reshape(-1, 8).tolist()]
        return torch.tensor(vectors, dtype=x.dtype).view(x.shape)

    def rotary(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        query, key = original(query, key, *args, **kwargs)
        return (query @ matrix, rounded(key @ matrix)) if rotate else (query, rounded(key))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, output: rounded(output))


@torch.no_grad()
def prefill_and_step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of a prefill, then of two more tokens one by one on its cache."""
    output = model(**with_positions(batch), use_cache=True)
    mask, steps = batch["attention_mask"], []
    for token in (5, 9):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
        step = model(
            input_ids=torch.full((len(mask), 1), token),
            attention_mask=mask,
            position_ids=mask.cumsum(1)[:, -1:] - 1,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        steps.append(step.logits)
    return output.logits[batch["attention_mask"].bool()], torch.cat(steps, 1)


@pytest.mark.parametrize("method", [RTN, QUAROT], ids=lambda method: method.name)
@pytest.mark.parametrize("num_bits", [2, 4])
def test_decoding_on_a_cache_equals_one_pass(method: StepMethod, num_bits: int) -> None:
    model = quantized(tiny_llama, method, kv_bits=num_bits)
    batch = tiny_llama.tiny_batch()
    _, steps = prefill_and_step(model, batch)
    longer = _appended(batch, torch.tensor([[5, 9]]).expand(len(steps), 2))
    with torch.no_grad():
        whole = model(**with_positions(longer)).logits[:, -2:]
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-9)


@FAMILIES
@pytest.mark.parametrize("method", [RTN, QUAROT, MQUANT], ids=lambda method: method.name)
@torch.no_grad()
def test_generate_equals_whole_passes(tiny: ModuleType, method: StepMethod) -> None:
    """Greedy answers on a cache, in left-padded batches (with reordered images), are those of a pass per token."""
    model = quantized(tiny, method, kv_bits=3)
    batch = batch_for(tiny, model)
    answers = model.generate(**batch, max_new_tokens=5, min_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    for _ in range(5):
        inputs = with_positions(batch) if tiny is tiny_llama else batch
        best = model(**inputs, use_cache=False).logits[:, -1].double()
        best[:, model.generation_config.eos_token_id] = -torch.inf
        batch = _appended(batch, best.argmax(-1, keepdim=True))
    assert torch.equal(answers, batch["input_ids"][:, -5:])


def _appended(batch: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": 0 * tokens}
    return {
        name: torch.cat([tensor, columns[name].to(tensor.dtype)], 1) if name in columns else tensor
        for name, tensor in batch.items()
    }


@FAMILIES
def test_padding_changes_nothing(tiny: ModuleType) -> None:
    model = quantized(tiny, QUAROT, kv_bits=3)
    if tiny is tiny_qwen2_vl:
        batch = tiny_qwen2_vl.tiny_batch(model, num_images=0, batch_size=3)
    else:
        batch = tiny_llama.tiny_batch()
    rows = logits(model, with_positions(batch)).split(batch["attention_mask"].sum(1).tolist())
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = ids[mask.bool()][None]
        expected = logits(model, {"input_ids": alone, "attention_mask": torch.ones_like(alone)})
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-9)


def test_reordered_tokens_change_nothing() -> None:
    batch = batch_for(tiny_qwen2_vl, tiny_qwen2_vl.tiny_model())
    plain, reordered = (
        logits(quantized(tiny_qwen2_vl, MQUANT, kv_bits=3, aifs=switch), batch) for switch in (False, True)
    )
    torch.testing.assert_close(reordered, plain, rtol=0, atol=1e-9)


def test_the_vision_tower_and_other_models_keep_their_attention() -> None:
    model, other = quantized(tiny_qwen2_vl, kv_bits=4), tiny_qwen2_vl.tiny_model()
    assert model.model.language_model.config._attn_implementation == QUANTIZED_KV_ATTENTION
    assert model.model.visual.config._attn_implementation == "sdpa"
    assert other.model.language_model.config._attn_implementation == "sdpa"
    names = {name for name, module in model.named_modules() if isinstance(module, KVQuantizer)}
    assert names == {f"model.language_model.layers.{index}.self_attn.{QUANTIZER}" for index in range(2)}


@METHODS
@FAMILIES
def test_report_and_rotation_of_every_method(tiny: ModuleType, method: StepMethod) -> None:
    model = tiny.tiny_model(torch.float64)
    batches = [batch_for(tiny, model, seed) for seed in (7, 8)]
    recipe = Recipe(method.name, "w8a8", "w4a8", options={"kv_bits": 4, "kv_clip": 0.95})
    report = method.quantize(model, tiny.tiny_layout(model), recipe, batches)
    assert report.kv_bits == 4
    assert "quantize_kv_cache" in report.step_s
    quantizers = [module for module in model.modules() if isinstance(module, KVQuantizer)]
    assert {(q.args.num_bits, q.clip, q.rotate) for q in quantizers} == {(4, 0.95, method in (QUAROT, MQUANT))}
    assert torch.isfinite(logits(model, batches[0])).all()


def test_without_online_hadamard_keys_are_not_rotated() -> None:
    model = quantized(tiny_llama, QUAROT, kv_bits=4, online_hadamard=False)
    assert not any(module.rotate for module in model.modules() if isinstance(module, KVQuantizer))


def test_rotation_helps_keys_with_outliers() -> None:
    """A few large key channels, which a Hadamard spreads: the reason for QuaRot's transform."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 32, generator=generator) for _ in range(3))
    key[..., 3] *= 30
    query[..., 3] /= 30
    exact = query @ key.mT
    plain, rotated = (
        (q @ k.mT - exact).norm() for q, k, _ in (KVQuantizer(4, rotate=on)(query, key, value) for on in (False, True))
    )
    assert rotated < plain


# --- saving and refusing --------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("method", [RTN, QUAROT, MQUANT], ids=lambda method: method.name)
def test_a_saved_model_has_its_quantized_cache_back(tiny: ModuleType, method: StepMethod, tmp_path: Path) -> None:
    model = tiny.tiny_model(torch.float32)
    batches = [batch_for(tiny, model, seed) for seed in (7, 8)]
    recipe = Recipe(method.name, "w8a8", "w4a8", options={"kv_bits": 3, "kv_clip": 0.9})
    report = method.quantize(model, tiny.tiny_layout(model), recipe, batches)
    save_quantized(model, report, recipe, tmp_path, "tiny")
    fresh = tiny.tiny_model(torch.float32, seed=1)
    load_quantized(tmp_path, LoadedModel("tiny", fresh, None, tiny.tiny_layout(fresh)), method.restore)
    assert torch.equal(logits(fresh, batches[0]), logits(model, batches[0]))
    assert read_saved(tmp_path).report.kv_bits == 3


def test_config_round_trip() -> None:
    config = KVQuantizer(5, 0.9, True).config()
    rebuilt = build_module(config)
    assert isinstance(rebuilt, KVQuantizer)
    assert rebuilt.config() == config
    assert str(rebuilt) == "KVQuantizer(5 bits, clip=0.9, rotate=True)"


@pytest.mark.parametrize("num_bits", [1, 9, "4", True])
@METHODS
def test_bits_out_of_range(method: StepMethod, num_bits: object) -> None:
    with pytest.raises(UnknownNameError, match="kv_bits"):
        quantized(tiny_llama, method, kv_bits=num_bits)


def test_another_attention_is_refused() -> None:
    model = tiny_llama.tiny_model()
    model.config._attn_implementation = "eager"
    with pytest.raises(LayoutError, match="needs 'sdpa' attention, not 'eager'"):
        quantize_kv_cache(session_for(model, tiny_llama.tiny_layout(model), kv_bits=4))


def test_a_width_without_hadamard_matrix_is_refused() -> None:
    model = tiny_llama.tiny_model(hidden_size=36, num_attention_heads=6, head_dim=6)
    session = session_for(model, tiny_llama.tiny_layout(model), kv_bits=4)
    with pytest.raises(LayoutError, match="no Hadamard matrix of head_dim 6 is known; set online_hadamard=false"):
        quantize_kv_cache(session, rotate=True)
    quantize_kv_cache(session)
