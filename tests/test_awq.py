"""AWQ as a method: it runs at every kind of bit setting and does what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes.awq import awq_session
from fakes.sessions import logits, sqnr_db
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines.awq import METHOD
from mqbench.baselines.awq_clip import round_weights_clipped
from mqbench.baselines.rtn import METHOD as RTN
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.serialize import load_quantized, save_quantized


@pytest.mark.parametrize("bits", ["float/w4a16-g16", "w4a16-g16/w4a16-g16", "w8a8/w4a8-g16", "w4a16/w3a16-g20"])
def test_method_runs_at_every_kind_of_bit_setting(bits: str) -> None:
    model = tiny_model(torch.float32)
    batches = [tiny_batch(model, num_images=2, batch_size=3, seed=seed) for seed in range(2)]
    report = METHOD.quantize(model, tiny_layout(model), Recipe("awq", *parse_bits(bits)), batches)
    vision = {layer.weight_num_bits for layer in report.layers.values() if layer.part == Part.VISION}
    assert vision == {None if bits.startswith("float") else int(bits[1])}
    assert torch.isfinite(logits(model, batches[0])).all()


def test_dynamic_activations() -> None:
    model = tiny_model(torch.float32)
    batches = [tiny_batch(model, num_images=1, batch_size=3)]
    recipe = Recipe("awq", "w4a8", "w4a8-g16", options={"activations": "token"})
    report = METHOD.quantize(model, tiny_layout(model), recipe, batches)
    assert {layer.activation_num_bits for layer in report.layers.values()} == {8}


def test_a_bfloat16_model_stays_in_bfloat16() -> None:
    model = tiny_model(torch.bfloat16)
    batches = [tiny_batch(model, num_images=1, batch_size=3)]
    METHOD.quantize(model, tiny_layout(model), Recipe("awq", "w4a16-g16", "w4a16-g16"), batches)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model, batches[0]).dtype == torch.bfloat16


def test_saved_and_loaded_model_answers_to_the_last_bit(tmp_path: Path) -> None:
    """Scaled norms, clipped asymmetric grids and a shorter last group all come back."""
    model, fresh = tiny_model(torch.float32), tiny_model(torch.float32)
    batches = [tiny_batch(model, num_images=1, batch_size=3)]
    recipe = Recipe("awq", "w4a16-g20", "w4a16-g20")
    report = METHOD.quantize(model, tiny_layout(model), recipe, batches)
    save_quantized(model, report, recipe, tmp_path, "tiny")
    load_quantized(tmp_path, LoadedModel("tiny", fresh, None, tiny_layout(fresh)))
    assert torch.equal(logits(fresh, batches[0]), logits(model, batches[0]))


def test_grids_are_asymmetric_unless_asked_otherwise() -> None:
    for options, asymmetric in (({}, True), ({"zero_point": False}, False)):
        session = awq_session("float/w4a16-g16", **options)
        round_weights_clipped(session)
        text = [linear for name, linear in session.linears.items() if session.part(name) is Part.TEXT]
        assert all((linear.weight_zero_point is not None) is asymmetric for linear in text)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outlier_channels_cost_less_than_with_rtn(seed: int) -> None:
    """On unseen data. Measured gains for seeds 0, 1, 2: 8.8, 7.4 and 7.9 dB, of which the clip search 0.7, 1.1, 0.5."""
    rtn = sqnr_db(RTN, "w4a16-g16", seed, zero_point=True)
    assert sqnr_db(METHOD, "w4a16-g16", seed) > rtn + 5


@pytest.mark.parametrize("options", [{"clip": False}, {"duo_scaling": True}], ids=["no clip", "duo scaling"])
def test_named_variants_differ_and_beat_rtn_too(options: dict[str, bool]) -> None:
    """Measured for seed 0: RTN 7.1 dB, AWQ 15.9, no clip 15.3, duo scaling 16.3."""
    variant = sqnr_db(METHOD, "w4a16-g16", 0, **options)
    assert variant > sqnr_db(RTN, "w4a16-g16", 0, zero_point=True) + 5
    assert variant != sqnr_db(METHOD, "w4a16-g16", 0)
