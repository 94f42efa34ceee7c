"""AWQ's factors: scaling alone is exact; the search against llmcompressor and a slow reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fakes import tiny_llama
from fakes.awq import GROUPED, awq_session, llama_session, naive_rounded, weights_of
from fakes.sessions import logits
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines import awq_scale
from mqbench.baselines.awq_clip import round_weights_clipped
from mqbench.baselines.awq_scale import (
    ScalingGroup,
    common_module,
    scale_channels,
    scaling_candidates,
    scaling_groups,
    search_group,
)
from mqbench.harness.errors import CalibrationError, NonFiniteError
from mqbench.harness.quant.capture import visit_blocks
from mqbench.harness.quant.layout import Block, Part
from mqbench.harness.quant.method import open_session
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Session


@pytest.mark.parametrize("duo", [False, True])
def test_scaling_alone_leaves_outputs_unchanged_in_both_towers(duo: bool) -> None:
    session = awq_session(duo_scaling=duo)
    before = [logits(session.model, batch) for batch in session.batches]
    weights = weights_of(session)
    scale_channels(session)
    for batch, expected in zip(session.batches, before, strict=True):
        torch.testing.assert_close(logits(session.model, batch), expected, rtol=0, atol=1e-9)
    scaled = {
        session.part(name) for name, weight in weights.items() if not torch.equal(weight, session.linears[name].weight)
    }
    assert scaled == {Part.VISION, Part.TEXT}


@pytest.mark.parametrize("kv_heads", [6, 2], ids=["v -> o", "grouped-query"])
def test_scaling_alone_leaves_a_text_model_unchanged(kv_heads: int) -> None:
    model = tiny_llama.tiny_model(num_key_value_heads=kv_heads)
    batches = [tiny_llama.tiny_batch(seed=seed) for seed in range(2)]
    before = [logits(model, batch) for batch in batches]
    session = llama_session(model, batches)
    weights = weights_of(session)
    scale_channels(session)
    for batch, expected in zip(batches, before, strict=True):
        torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)
    name = session.layout.text.blocks[0].attention.out
    assert torch.equal(weights[name], session.linears[name].weight) is (kv_heads == 2)


def test_groups_are_those_of_the_paper() -> None:
    session = awq_session()
    assert session.layout.vision is not None
    vision, text = session.layout.vision.blocks[0], session.layout.text.blocks[0]
    v, t = vision.name, text.name
    assert scaling_groups(session, vision) == [
        ScalingGroup(f"{v}.norm1", None, (f"{v}.attn.qkv",), f"{v}.attn"),
        ScalingGroup(f"{v}.attn.qkv", slice(64, 96), (f"{v}.attn.proj",), None),
        ScalingGroup(f"{v}.norm2", None, (f"{v}.mlp.fc1",), None),
    ]
    attention = tuple(f"{t}.self_attn.{letter}_proj" for letter in "qkv")
    assert scaling_groups(session, text) == [
        ScalingGroup(f"{t}.input_layernorm", None, attention, f"{t}.self_attn"),
        ScalingGroup(f"{t}.post_attention_layernorm", None, (f"{t}.mlp.gate_proj", f"{t}.mlp.up_proj"), f"{t}.mlp"),
        ScalingGroup(f"{t}.mlp.up_proj", slice(0, 96), (f"{t}.mlp.down_proj",), None),
    ]


def test_common_module() -> None:
    assert common_module(["a.b.attn.q", "a.b.attn.out"]) == "a.b.attn"
    assert common_module(["a.b.attn.q", "a.b.attention.out"]) == "a.b"
    assert common_module(["a.q", "b.q"]) == ""


def test_queries_keys_fc2_and_projector_keep_their_weights() -> None:
    """v -> o divides the last third of a fused qkv alone; nothing divides exactly in front of fc2."""
    session = awq_session("w4a16-g16/float")
    weights = weights_of(session)
    block = session.layout.vision.blocks[0]  # type: ignore[union-attr]
    group = scaling_groups(session, block)[1]
    factors = torch.linspace(0.5, 2, 32, dtype=torch.float64)
    awq_scale.divide_source(session, group, factors)
    qkv = session.linears[block.attention.value].weight
    assert torch.equal(qkv[:64], weights[block.attention.value][:64])
    torch.testing.assert_close(qkv[64:] * factors[:, None], weights[block.attention.value][64:])
    scale_channels(session)
    for name in (block.mlp_out, *session.layout.projector, session.layout.patch_embed):
        assert name is not None and torch.equal(weights[name], session.linears[name].weight)


# --- against llmcompressor ---

Smooth = Callable[[nn.Module, Sequence[dict[str, Tensor]], bool | str, int], None]


@pytest.fixture
def llmcompressor_awq(monkeypatch: pytest.MonkeyPatch) -> Smooth:
    """Scales a LLaMA in place by llmcompressor's ``AWQModifier``, on the CPU.

    Its ``IntermediatesCache.pin_memory`` needs a GPU and only speeds up copies to it, so it does nothing here.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
        disable_quantization,
    )
    from llmcompressor.core import create_session
    from llmcompressor.modifiers.quantization.calibration import initialize_observer
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.awq.mappings import default_mappings
    from llmcompressor.pipelines.cache import IntermediatesCache

    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *args: None)
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=16)

    def run(model: nn.Module, batches: Sequence[dict[str, Tensor]], duo: bool | str, n_grid: int) -> None:
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
        model.apply(disable_quantization)
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                initialize_observer(module, "weight")
        modifier = AWQModifier(mappings=default_mappings, duo_scaling=duo, n_grid=n_grid)
        with create_session() as session, torch.no_grad():
            session.state.model = model
            modifier.on_initialize(session.state)
            modifier.on_calibration_start(session.state, None)
            for batch in batches:
                model(**batch, use_cache=False)
            modifier.on_sequential_epoch_end(session.state, None)
            modifier.on_calibration_end(session.state, None)

    return run


def outlier_llama(seed: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A LLaMA with two channels of large inputs behind every norm, so that scaling pays."""
    model: nn.Module = tiny_llama.tiny_model(dtype, seed, num_key_value_heads=kv_heads)
    model.set_attn_implementation("eager")  # type: ignore[operator]  # as llmcompressor calibrates
    for block in tiny_llama.tiny_layout(model).text.blocks:
        for norm in (block.attention_norm, block.mlp_norm):
            model.get_submodule(norm.name).weight.data[:2] *= 20
            for name in norm.readers:
                model.get_submodule(name).weight.data[:, :2] /= 20
    return model


def unpadded_batches() -> list[dict[str, Tensor]]:
    """llmcompressor counts padding too, so there is none."""
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(3, tiny_llama.VOCABULARY, (4, 12), generator=generator) for _ in range(3)]
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]


@pytest.mark.parametrize(("seed", "kv_heads"), [(0, 6), (1, 6), (2, 2)])
def test_factors_equal_llmcompressor(
    llmcompressor_awq: Smooth, monkeypatch: pytest.MonkeyPatch, seed: int, kv_heads: int
) -> None:
    """Expected equal: the ratio chosen for every group, hence every norm gain and weight, to float32's 1e-5.

    Only close, because llmcompressor sums mean|X| in float32 where we have float64, and because v -> o and up -> down
    come from X^T X here and from the rows there. Its grid ends at ratio 1, so ours does here.
    """
    monkeypatch.setattr(awq_scale, "RATIOS", tuple(step / 20 for step in range(21)))
    ours, theirs = outlier_llama(seed, kv_heads), outlier_llama(seed, kv_heads)
    before = copy.deepcopy(ours.state_dict())
    llmcompressor_awq(theirs, unpadded_batches(), False, 21)
    scale_channels(llama_session(ours, unpadded_batches()))
    assert_same_parameters(ours, theirs)
    changed = [name for name, value in ours.state_dict().items() if not torch.allclose(value, before[name], rtol=1e-3)]
    assert len(changed) >= 10


@pytest.mark.parametrize("seed", [0, 1])
def test_duo_scaling_equals_llmcompressor(
    llmcompressor_awq: Smooth, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """As above; llmcompressor also tries s = 1, which AutoAWQ does not and which never wins here."""
    monkeypatch.setattr(awq_scale, "RATIOS", tuple(step / 20 for step in range(21)))
    ours, theirs = outlier_llama(seed, 6), outlier_llama(seed, 6)
    llmcompressor_awq(theirs, unpadded_batches(), True, 22)
    scale_channels(llama_session(ours, unpadded_batches(), duo_scaling=True))
    assert_same_parameters(ours, theirs)


def assert_same_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, expected[name].to(value.dtype), rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("seed", [0, 1])
def test_levels_equal_llmcompressor(llmcompressor_awq: Smooth, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Scaled by each side, rounded by its own quantizer: the same levels but for one weight in ten thousand.

    Factors that differ by 1e-7 may put a weight on the other side of a rounding boundary; measured: none of 46080.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    monkeypatch.setattr(awq_scale, "RATIOS", tuple(step / 20 for step in range(21)))
    ours, theirs = outlier_llama(seed, 6, torch.float32), outlier_llama(seed, 6, torch.float32)
    llmcompressor_awq(theirs, unpadded_batches(), False, 21)
    session = llama_session(ours, unpadded_batches(), clip=False)
    scale_channels(session)
    round_weights_clipped(session)
    different, total = 0, 0
    for name, linear in session.linears.items():
        module = theirs.get_submodule(name)
        groups = module.weight.detach().view(len(module.weight), -1, 16)
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights)
        shifted = torch.round(groups / scale[..., None] + zero_point[..., None]).clamp(-8, 7) - zero_point[..., None]
        assert linear.weight_zero_point is not None and linear.weight_scale is not None
        ours_levels = (linear.weight.view_as(groups) / linear.weight_scale[..., None]).round()
        different += int((ours_levels != shifted).sum())
        total += ours_levels.numel()
        torch.testing.assert_close(linear.weight_scale, scale, rtol=1e-5, atol=0)
    assert total == 46080 and different <= 4


# --- against a slow float64 reference ---


@torch.no_grad()
def naive_errors(session: Session, group: ScalingGroup) -> list[float]:
    """The error of every ratio: whole-model forward passes, outputs of the inspected module, padding left out."""
    is_text = session.part(group.readers[0]) is Part.TEXT
    masks = [batch["attention_mask"].bool() if is_text else slice(None) for batch in session.batches]
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    def rows_of(module: str, of_input: bool = False) -> list[Tensor]:
        seen.clear()
        hook = (lambda m, args, output: seen.append(args[0])) if of_input else keep
        handle = session.model.get_submodule(module).register_forward_hook(hook)
        for batch in session.batches:
            session.model(**batch)
        handle.remove()
        return [rows[mask] for rows, mask in zip(seen, masks, strict=True)]

    magnitude = torch.cat(rows_of(group.readers[0], of_input=True)).abs().mean(0)
    inspected = group.inspected or group.readers[0]
    expected = torch.cat(rows_of(inspected))
    weights = {name: session.linears[name].weight.data for name in group.readers}
    errors = []
    for step in range(20):
        factors = magnitude.pow(step / 20).clamp_min(1e-4)
        factors = factors / (factors.max() * factors.min()).sqrt()
        for name, weight in weights.items():
            session.linears[name].weight.data = naive_rounded(weight * factors, 16) / factors
        errors.append((torch.cat(rows_of(inspected)) - expected).square().sum(1).mean().item())
    for name, weight in weights.items():
        session.linears[name].weight.data = weight
    return errors


def test_every_error_is_that_of_a_slow_float64_reference() -> None:
    """Every group of both towers' first blocks, fused qkv and padding included: all 20 errors, hence the choice."""
    session = awq_session()
    compared = 0

    def visit(block: Block, calls: Any) -> None:
        nonlocal compared
        for group in scaling_groups(session, block) if block.name.endswith(".0") else []:
            choice = search_group(session, group, block, calls)
            expected = naive_errors(session, group)
            assert choice.errors == pytest.approx(expected, rel=1e-8)
            assert choice.position == expected.index(min(expected))
            compared += 1

    for tower in session.layout.towers:
        visit_blocks(session, tower, visit)
    assert compared == 6


def test_candidates_by_hand() -> None:
    """mean|X| = (4, 1, 0): no scaling at r = 0, then the square root with the clamp; the range's middle is 1."""
    candidates = scaling_candidates(torch.tensor([4.0, 1.0, 0.0]))
    assert len(candidates) == 20 and torch.equal(candidates[0], torch.ones(3))
    torch.testing.assert_close(candidates[10], torch.tensor([2.0, 1.0, 1e-4]) / (2e-4**0.5))
    duo = scaling_candidates(torch.tensor([4.0, 1.0]), torch.tensor([0.25, 1.0]))[10]
    raw = torch.tensor([2 / (0.5 + 1e-4), 1 / (1 + 1e-4)])
    torch.testing.assert_close(duo, raw / (raw[0] * raw[1]).sqrt())


def test_first_of_equals_wins_and_nan_never_does() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    candidates = scaling_candidates(torch.ones(16).cumsum(0))

    def position(*errors: float) -> int:
        remaining = iter(errors)
        return awq_scale.choose(candidates, [weight], GROUPED, lambda rounded: next(remaining), "fc").position

    assert position(*[1.0] * 20) == 0
    assert position(float("nan"), float("inf"), 2.0, *[1.0] * 17) == 3
    with pytest.raises(NonFiniteError, match="behind 'fc' are NaN or Inf"):
        position(*[float("nan")] * 20)


def test_no_image_is_an_error_when_the_vision_tower_is_to_be_scaled() -> None:
    model = tiny_model(torch.float64)
    session = open_session(
        model,
        tiny_layout(model),
        Recipe("awq", "w4a16", "w4a16"),
        [tiny_batch(model, num_images=0)],
    )
    with pytest.raises(CalibrationError, match="no calibration sample reaches"):
        scale_channels(session)


def test_nan_activation_names_the_layer() -> None:
    session = awq_session()
    session.batches[0]["pixel_values"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"input of '.*attn\.qkv'"):
        scale_channels(session)
