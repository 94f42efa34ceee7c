"""SmoothQuant: exact before rounding, Eq. 4 by a naive oracle, and it does what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines.smoothquant import METHOD, channel_peaks, smooth, smoothable_norms, smoothing_factors
from mqbench.harness.quant.layout import Norm, Part
from mqbench.harness.quant.method import open_session
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Session


def session_of(vision: str = "w8a8", text: str = "w8a8", **options: Any) -> Session:
    model = tiny_model(torch.float64)
    batches = [tiny_batch(model, num_images=2, batch_size=3, seed=seed) for seed in range(2)]
    return open_session(model, tiny_layout(model), Recipe("smoothquant", vision, text, options=options), batches)


@torch.no_grad()
def logits_of(session: Session) -> list[Tensor]:
    return [session.model(**batch).logits[batch["attention_mask"].bool()] for batch in session.batches]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smoothing_alone_leaves_outputs_unchanged(alpha: float) -> None:
    session = session_of(alpha=alpha)
    before = logits_of(session)
    weights = {name: linear.weight.clone() for name, linear in session.linears.items()}
    smooth(session)
    for ours, expected in zip(logits_of(session), before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    for norm in smoothable_norms(session):
        assert not torch.allclose(session.linears[norm.readers[0]].weight, weights[norm.readers[0]], rtol=1e-3)


def norm_outputs(session: Session, norm: Norm) -> Tensor:
    """Rows of a norm's output over all batches, padding removed in the LLM."""
    rows: list[Tensor] = []
    handle = session.model.get_submodule(norm.name).register_forward_hook(lambda m, args, y: rows.append(y))
    is_text = session.part(norm.readers[0]) is Part.TEXT
    with torch.no_grad():
        for batch in session.batches:
            session.model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in session.batches]
    return torch.cat([y[mask] if is_text else y for y, mask in zip(rows, masks, strict=True)])


def test_factors_are_those_of_a_naive_eq_4() -> None:
    session = session_of()
    norms = smoothable_norms(session)
    outputs = [norm_outputs(session, norm) for norm in norms]
    modules = [session.model.get_submodule(norm.name) for norm in norms]
    gains = [module.weight.clone() for module in modules]
    biases = [module.bias.clone() if isinstance(module, nn.LayerNorm) else None for module in modules]
    weights = [[session.linears[name].weight.clone() for name in norm.readers] for norm in norms]
    smooth(session)
    for rows, gain, bias, readers, module in zip(outputs, gains, biases, weights, modules, strict=True):
        for j in range(len(gain)):
            weight_peak = max(weight[:, j].abs().max().item() for weight in readers)
            factor = rows[:, j].abs().max().item() ** 0.5 / weight_peak**0.5
            assert module.weight[j].item() == pytest.approx(gain[j].item() / factor, rel=1e-10)
            if bias is not None:
                assert module.bias[j].item() == pytest.approx(bias[j].item() / factor, rel=1e-10)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_factors_of_llmcompressor(alpha: float) -> None:
    """Its ``_calculate_smoothing_scales`` takes the full range max - min of activations and 2 max|W| of weights.

    For a range that is symmetric around 0 its factor is ours times 2^(2 alpha - 1): equal to Eq. 4, to rounding, at
    alpha = 0.5, a constant factor elsewhere.
    """
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    generator = torch.Generator().manual_seed(0)
    readers = [nn.Linear(24, 8, bias=False), nn.Linear(24, 5, bias=False)]
    for reader in readers:
        reader.weight.data = torch.randn(reader.weight.shape, generator=generator, dtype=torch.float64)
    peak = torch.rand(24, generator=generator, dtype=torch.float64).mul(4).exp()
    weight_peak = torch.cat([reader.weight for reader in readers]).abs().amax(0).detach()
    theirs = SmoothQuantModifier(smoothing_strength=alpha)._calculate_smoothing_scales(readers, 2 * peak).detach()
    ours = smoothing_factors(peak, weight_peak, alpha)
    torch.testing.assert_close(theirs, ours * 2 ** (2 * alpha - 1), rtol=1e-12, atol=0)


def test_llmcompressor_smooths_the_same_model_nearly_alike() -> None:
    """Its hooks, factors and application on our norms and calibration data, without padding, at alpha = 0.5.

    Close, not equal: per channel its factor is ours times sqrt((max - min) / (2 max|X|)), which is at most 1 and at
    least sqrt(1/2) where a channel changes sign. That ratio is exact.
    """
    from llmcompressor.modifiers.transform.smoothquant.base import SmoothQuantMapping, SmoothQuantModifier

    ours, theirs = session_of(), session_of()
    for session in (ours, theirs):
        session.batches = [tiny_batch(session.model, num_images=2, batch_size=1, seed=seed) for seed in range(3)]
    norms = smoothable_norms(ours)
    outputs = [norm_outputs(ours, norm) for norm in norms]
    modifier = SmoothQuantModifier(smoothing_strength=0.5)
    modifier.scales_ = {}
    modifier.resolved_mappings_ = [
        SmoothQuantMapping(
            norm.name, theirs.model.get_submodule(norm.name), [theirs.linears[name] for name in norm.readers]
        )
        for norm in norms
    ]
    modifier._setup_scale_hooks()
    theirs.run_calibration()
    modifier._apply_smoothing(theirs.model)
    modifier.remove_hooks()
    smooth(ours)
    for norm, rows in zip(norms, outputs, strict=True):
        low, high = rows.aminmax(dim=0)
        ratio = ((high - low) / (2 * rows.abs().amax(0))).sqrt()
        # In float64 but for a floor that it keeps in float32 and that is not reached.
        gains = [session.model.get_submodule(norm.name).weight for session in (ours, theirs)]
        torch.testing.assert_close(gains[1] * ratio, gains[0], rtol=1e-9, atol=0)
        for name in norm.readers:
            torch.testing.assert_close(
                theirs.linears[name].weight, ours.linears[name].weight * ratio, rtol=1e-9, atol=1e-15
            )


def test_half_alpha_makes_activation_and_weight_peaks_equal() -> None:
    session = session_of()
    smooth(session)
    for norm in smoothable_norms(session):
        activation = norm_outputs(session, norm).abs().amax(0)
        weight = torch.stack([session.linears[name].weight.abs().amax(0) for name in norm.readers]).amax(0)
        torch.testing.assert_close(activation, weight, rtol=1e-9, atol=0)


def test_norms_of_both_towers_are_smoothed_and_final_norms_are_not() -> None:
    session = session_of()
    layout = session.layout
    names = {norm.name for norm in smoothable_norms(session)}
    blocks = [block for tower in layout.towers for block in tower.blocks]
    assert names == {norm.name for block in blocks for norm in (block.attention_norm, block.mlp_norm)}


@pytest.mark.parametrize(("vision", "text", "part"), [("w8a8", "w4a16", Part.VISION), ("float", "w4a8", Part.TEXT)])
def test_only_towers_with_quantized_activations_are_smoothed(vision: str, text: str, part: Part) -> None:
    session = session_of(vision, text)
    assert {session.part(norm.readers[0]) for norm in smoothable_norms(session)} == {part}


def test_dead_channels_are_clamped() -> None:
    factors = smoothing_factors(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    torch.testing.assert_close(factors, torch.tensor([1e-5**0.5, 2 / 1e-5**0.5, 2.0]))


def test_channel_peaks_ignore_padding() -> None:
    session = session_of()
    norm = session.layout.text.blocks[1].mlp_norm
    expected = norm_outputs(session, norm).abs().amax(0)
    assert torch.equal(channel_peaks(session, [norm.readers[0]])[norm.readers[0]], expected)


def test_outlier_channels_cost_less_than_with_rtn() -> None:
    """Gains that blow up a few channels of each LLM norm, undone in the weights: the case SmoothQuant is made for."""
    from mqbench.baselines.rtn import METHOD as RTN

    errors = {}
    for method in (RTN, METHOD):
        model = tiny_model(torch.float64)
        layout = tiny_layout(model)
        for norm in (norm for block in layout.text.blocks for norm in (block.attention_norm, block.mlp_norm)):
            model.get_submodule(norm.name).weight.data[:3] *= 60
            for name in norm.readers:
                model.get_submodule(name).weight.data[:, :3] /= 60
        batches = [tiny_batch(model, num_images=1, batch_size=4, seed=seed) for seed in range(4)]
        with torch.no_grad():
            expected = [model(**batch).logits for batch in batches]
            method.quantize(model, layout, Recipe(method.name, "float", "w8a8"), batches)
            errors[method.name] = sum(
                (model(**batch).logits - logits)[batch["attention_mask"].bool()].square().sum().item()
                for batch, logits in zip(batches, expected, strict=True)
            )
    assert errors["smoothquant"] < 0.2 * errors["rtn"]
