"""MSQ: who gets two scales, what the scales are, and the measured ranges they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fakes.sessions import tiny_session
from fakes.tiny_qwen2_vl import IMAGE_ID, tiny_batch
from mqbench.baselines.fusion import fuse_norms, layernorm_to_rmsnorm
from mqbench.baselines.rotation import rotate_residual
from mqbench.harness.quant.calibrate import calibrate_activations
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.modality import track_modality
from mqbench.harness.quant.scheme import Strategy
from mqbench.harness.quant.session import Session
from mqbench.mquant.msq import ModalityRange, attach_msq, modality_ranges, text_linears


@pytest.fixture
def session() -> Session:
    """A session with modality tracking and visual features 8 times as large as the text embeddings."""
    session, _, _ = tiny_session(bits="w8a8")
    with torch.no_grad():
        merger = session.linears[session.layout.projector[-1]]
        merger.weight.mul_(8)
        merger.bias.mul_(8)
    session.batches = [tiny_batch(session.model, num_images=2, seed=seed) for seed in (0, 1)]
    track_modality(session.model, session.layout, session.context)
    return session


def test_only_the_llm_has_two_scales(session: Session) -> None:
    attach_msq(session)
    for name, linear in session.linears.items():
        expected = Strategy.MODALITY if session.part(name) is Part.TEXT else Strategy.TENSOR
        assert linear.input_quantizer.args.strategy is expected, name
    assert text_linears(session) == [name for block in session.layout.text.blocks for name in block.linears]


def test_scales_are_the_measured_ranges_over_127(session: Session) -> None:
    ranges = modality_ranges(session)
    attach_msq(session)
    calibrate_activations(session)
    assert list(ranges) == text_linears(session)
    for name, seen in ranges.items():
        text, visual = session.linears[name].input_quantizer.scale.tolist()
        assert (text, visual) == pytest.approx((seen.text / 127, seen.visual / 127))
        assert session.report.layers[name].scales == pytest.approx({"text": text, "visual": visual})


def test_ranges_of_a_linear_against_a_naive_loop(session: Session) -> None:
    """o_proj's inputs, token by token, with padding left out."""
    name = session.layout.text.blocks[1].attention.out
    inputs = captured_inputs(session, name)
    text = visual = 0.0
    for batch, x in zip(session.batches, inputs, strict=True):
        for row in range(len(x)):
            for token in range(x.shape[1]):
                peak = x[row, token].abs().max().item()
                if not batch["attention_mask"][row, token]:
                    continue
                if batch["input_ids"][row, token] == IMAGE_ID:
                    visual = max(visual, peak)
                else:
                    text = max(text, peak)
    assert modality_ranges(session)[name] == ModalityRange(text, visual)


def test_rotation_closes_the_gap_behind_norms(session: Session) -> None:
    """An outlier channel that only visual tokens use: wide before rotation, about 1 after it (METHODS.md on MSQ)."""
    block = session.layout.text.blocks[0]
    with torch.no_grad():
        session.model.get_input_embeddings().weight[:, 3] = 0
        session.linears[session.layout.projector[-1]].bias[3] += 300
        session.model.get_submodule(block.attention_norm.name).weight[3] *= 10
    name = block.attention_norm.readers[0]
    before = modality_ranges(session)[name].ratio
    for step in (fuse_norms, layernorm_to_rmsnorm, rotate_residual):
        step(session)
    after = modality_ranges(session)[name].ratio
    assert before > 5
    assert 0.2 < after < 2


def test_measuring_leaves_nothing_behind(session: Session) -> None:
    modality_ranges(session)
    assert not any(linear._forward_pre_hooks for linear in session.linears.values())


def test_text_only_data_has_no_visual_range(session: Session) -> None:
    session.batches = [tiny_batch(session.model, text_rows=2)]
    for seen in modality_ranges(session).values():
        assert seen.text > 0 and seen.visual == seen.ratio == 0
    assert math.isinf(ModalityRange(0.0, 1.0).ratio)


def captured_inputs(session: Session, name: str) -> list[Tensor]:
    inputs: list[Tensor] = []
    handle = session.linears[name].register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    session.run_calibration()
    handle.remove()
    return inputs
