"""Activation quantizers and their scales against ranges computed from plain forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.errors import CalibrationError, NonFiniteError, UnknownNameError
from mqbench.harness.quant.activation import InputQuantizer, fake_quantize
from mqbench.harness.quant.calibrate import attach_input_quantizers, calibrate_activations, round_weights_rtn
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.method import open_session
from mqbench.harness.quant.modality import ModalityContext
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Strategy
from mqbench.harness.quant.session import Session


def session_of(vision: str = "w8a8", text: str = "w8a8", num_images: int = 1, **options: Any) -> Session:
    model = tiny_model(torch.float64)
    batches = [tiny_batch(model, num_images=num_images, batch_size=3, seed=seed) for seed in range(2)]
    return open_session(model, tiny_layout(model), Recipe("test", vision, text, options=options), batches)


def naive_peaks(session: Session) -> dict[str, tuple[float, float]]:
    """max|input| over text and over visual rows of each linear (vision tower: all rows count as text)."""
    peaks: dict[str, tuple[float, float]] = {}
    for batch in session.batches:
        valid = batch["attention_mask"].bool()
        visual = batch["input_ids"] == session.layout.image_token_id

        def keep(
            module: nn.Module, args: tuple[Tensor], text: Tensor = valid & ~visual, visual: Tensor = visual
        ) -> None:
            seen = (args[0].abs().max().item(), 0.0)
            if session.part(module.name) is Part.TEXT:
                seen = (args[0][text].abs().max().item(), args[0][visual].abs().max().item())
            old = peaks.get(module.name, (0.0, 0.0))
            peaks[module.name] = (max(old[0], seen[0]), max(old[1], seen[1]))

        handles = [linear.register_forward_pre_hook(keep) for linear in session.linears.values()]
        with torch.no_grad():
            session.model(**batch)
        for handle in handles:
            handle.remove()
    return peaks


def test_tensor_scales_cover_both_modalities_without_padding() -> None:
    session = session_of()
    expected = naive_peaks(session)
    attach_input_quantizers(session)
    calibrate_activations(session)
    for name, peaks in expected.items():
        assert session.report.layers[name].scales == {"tensor": pytest.approx(max(peaks) / 127, rel=1e-12)}


def test_modality_scales_are_separate_in_the_llm_only() -> None:
    session = session_of(activations="modality")
    expected = naive_peaks(session)
    attach_input_quantizers(session)
    calibrate_activations(session)
    for name, (text, visual) in expected.items():
        scales = session.report.layers[name].scales
        if session.part(name) is Part.TEXT:
            assert scales == {"text": pytest.approx(text / 127), "visual": pytest.approx(visual / 127)}
        else:
            assert scales == {"tensor": pytest.approx(text / 127)}


@pytest.mark.parametrize("strategy", ["tensor", "modality", "token"])
@pytest.mark.parametrize("tokens", ["visual", "text"])
def test_other_tokens_stay_in_floating_point(tokens: str, strategy: str) -> None:
    """In the LLM: the other modality's rows pass unchanged and widen no shared scale. Elsewhere all is rounded."""
    session = session_of(activations=strategy, quantize_tokens=tokens)
    peaks = naive_peaks(session)
    attach_input_quantizers(session)
    calibrate_activations(session)
    batch = session.batches[0]
    visual = batch["input_ids"] == session.layout.image_token_id
    rounded = visual if tokens == "visual" else ~visual
    for name, (x, y) in inputs_and_outputs(session, batch).items():
        quantizer = session.linears[name].input_quantizer
        if session.part(name) is not Part.TEXT:
            assert quantizer.tokens == "all" and not torch.equal(x, y)
            continue
        assert torch.equal(x[~rounded], y[~rounded]), name
        assert not torch.equal(x[rounded], y[rounded]), name
        if strategy == "tensor":
            assert quantizer.scale.item() == pytest.approx(peaks[name][tokens == "visual"] / 127, rel=1e-12)
            assert torch.equal(y[rounded], fake_quantize(x[rounded], quantizer.scale[0], quantizer.args))


@pytest.mark.parametrize("strategy", ["tensor", "token"])
def test_a_chunk_of_text_is_all_of_one_modality(strategy: str) -> None:
    """Decoding: nothing is rounded under ``visual``, everything under ``text``."""
    for tokens in ("visual", "text"):
        session = session_of(activations=strategy, quantize_tokens=tokens)
        attach_input_quantizers(session)
        calibrate_activations(session)
        batch = tiny_batch(session.model, num_images=0)
        for name, (x, y) in inputs_and_outputs(session, batch).items():
            assert torch.equal(x, y) is (tokens == "visual"), name


def test_visual_tokens_alone_need_images() -> None:
    session = session_of(vision="float", num_images=0, quantize_tokens="visual")
    attach_input_quantizers(session)
    with pytest.raises(CalibrationError, match=r"layers\.0\..*' saw no calibration data"):
        calibrate_activations(session)


def test_percentile_is_read_from_the_recipe() -> None:
    scales = {}
    for percentile in (0.99999, 0.9):
        session = session_of(observer="percentile", percentile=percentile)
        attach_input_quantizers(session)
        calibrate_activations(session)
        scales[percentile] = {name: layer.scales["tensor"] for name, layer in session.report.layers.items()}
    assert all(scales[0.9][name] < 0.8 * scale for name, scale in scales[0.99999].items())


def test_sixteen_bit_grid_is_finer_than_eight() -> None:
    """Table 1's INT16: rounded, but by no more than half a step of max / 32767."""
    session = session_of(vision="w16a16int", text="w16a16int")
    peaks = naive_peaks(session)
    attach_input_quantizers(session)
    calibrate_activations(session)
    for name, (x, y) in inputs_and_outputs(session, session.batches[0]).items():
        scale = session.linears[name].input_quantizer.scale.item()
        assert session.report.layers[name].activation_num_bits == 16
        assert scale == pytest.approx(max(peaks[name]) / 32767, rel=1e-12)
        assert 0 < (x - y).abs().max() <= 0.5 * scale * (1 + 1e-6), name


def inputs_and_outputs(session: Session, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each input quantizer gets and gives in one forward pass, without the rows of padding."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(module: InputQuantizer, args: tuple[Tensor], y: Tensor) -> None:
        x = args[0]
        if session.part(module.name) is Part.TEXT:
            valid = batch["attention_mask"].bool()[..., None]
            x, y = x * valid, y * valid
        seen[module.name] = (x, y)

    handles = [linear.input_quantizer.register_forward_hook(keep) for linear in session.linears.values()]
    with torch.no_grad():
        session.model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def test_padding_content_changes_no_scale() -> None:
    first, second = session_of(), session_of()
    for batch in second.batches:
        batch["input_ids"][~batch["attention_mask"].bool()] = 17
    for session in (first, second):
        attach_input_quantizers(session, "modality")
        calibrate_activations(session)
    assert any((~batch["attention_mask"].bool()).any() for batch in first.batches)
    for name, layer in first.report.layers.items():
        assert layer.scales == pytest.approx(second.report.layers[name].scales, rel=1e-9)


def test_token_strategy_is_dynamic_everywhere_and_reads_no_data() -> None:
    session = session_of(activations="token")
    session.batches = []
    attach_input_quantizers(session)
    calibrate_activations(session)
    for name, linear in session.linears.items():
        assert linear.input_quantizer is not None and linear.input_quantizer.args.dynamic
        assert session.report.layers[name].scales == {} and session.report.layers[name].activation_num_bits == 8


def test_weight_only_scheme_gets_no_quantizer() -> None:
    session = session_of(vision="w4a16", text="w8a8")
    attach_input_quantizers(session)
    calibrate_activations(session)
    for name, linear in session.linears.items():
        assert (linear.input_quantizer is None) is (session.part(name) is not Part.TEXT)


def test_round_weights_rtn_reports_bits_and_error() -> None:
    session = session_of(vision="float", text="w4a8")
    before = {name: linear.weight.clone() for name, linear in session.linears.items()}
    round_weights_rtn(session)
    for name, linear in session.linears.items():
        layer = session.report.layers[name]
        error = ((linear.weight - before[name]).norm() / before[name].norm()).item()
        is_text = session.part(name) is Part.TEXT
        assert layer.weight_num_bits == (4 if is_text else None)
        assert (layer.weight_error or 0.0) == pytest.approx(error, rel=1e-9) and (error > 0.01) is is_text


def test_calibration_needs_data_that_reaches_every_layer() -> None:
    session = session_of(num_images=0)
    attach_input_quantizers(session)
    with pytest.raises(CalibrationError, match=r"patch_embed\.proj' saw no calibration data"):
        calibrate_activations(session)


def test_nan_activation_names_the_layer() -> None:
    session = session_of()
    session.batches[1]["pixel_values"][0, 0] = float("inf")
    attach_input_quantizers(session)
    with pytest.raises(NonFiniteError, match=r"input of '.*patch_embed\.proj'"):
        calibrate_activations(session)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'modality'"):
        attach_input_quantizers(session_of(activations="modalty"))
    with pytest.raises(UnknownNameError, match="did you mean 'percentile'"):
        attach_input_quantizers(session_of(observer="percentil"))


def test_modality_quantizer_rounds_each_row_with_its_own_scale() -> None:
    context = ModalityContext()
    quantizer = InputQuantizer("fc", QuantArgs(8, strategy=Strategy.MODALITY), context)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    context.visual = torch.rand(2, 5, generator=generator) > 0.5
    x[context.visual] *= 50
    quantizer.observing = True
    assert torch.equal(quantizer(x), x)
    quantizer.freeze()
    text, visual = quantizer.scale.tolist()
    y = quantizer(x)
    for row in range(2):
        for token in range(5):
            scale = visual if context.visual[row, token] else text
            assert torch.equal(y[row, token], (x[row, token] / scale).round().clamp(-128, 127) * scale)
    context.clear()
    assert torch.equal(quantizer(x[:, :1]), fake_quantize(x[:, :1], quantizer.scale[0], quantizer.args))


def test_static_and_dynamic_equal_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization import fake_quantize as oracle

    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    scale = x.abs().max() / 127
    theirs = QuantizationArgs(num_bits=8, symmetric=True, strategy="tensor")
    assert torch.equal(fake_quantize(x, scale, QuantArgs(8)), oracle(x, scale.view(1), torch.zeros(1), theirs))
    dynamic = InputQuantizer("fc", QuantArgs(8, strategy=Strategy.TOKEN, dynamic=True))
    per_token = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scales = x.abs().amax(1, keepdim=True) / 127
    assert torch.equal(dynamic(x), oracle(x, scales, torch.zeros_like(scales), per_token))


def test_all_zero_input_stays_zero() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.float16)
    dynamic = InputQuantizer("fc", QuantArgs(8, strategy=Strategy.TOKEN, dynamic=True))
    assert torch.equal(dynamic(zeros), zeros)
    static = InputQuantizer("fc", QuantArgs(8))
    static.observing = True
    static(zeros)
    static.freeze()
    assert torch.equal(static(zeros), zeros)


@pytest.mark.parametrize(
    "args",
    [QuantArgs(8, symmetric=False), QuantArgs(8, strategy=Strategy.CHANNEL), QuantArgs(8, dynamic=True)],
    ids=["asymmetric", "channel", "dynamic per tensor"],
)
def test_grids_that_activations_cannot_have(args: QuantArgs) -> None:
    with pytest.raises(ValueError, match="activations of 'fc'"):
        InputQuantizer("fc", args)
