"""Sessions over the tiny Qwen2-VL without any method, for tests of single steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.linear import wrap_linears
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.modality import ModalityContext
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.session import Batch, QuantReport, Session


def session_for(
    model: nn.Module, layout: Layout, batches: Sequence[Batch] = (), seed: int = 0, bits: str = "float", **options: Any
) -> Session:
    """A session as a method opens it, before its first step."""
    vision, _, text = bits.partition("/")
    return Session(
        model=model,
        layout=layout,
        recipe=Recipe("test", vision, text or vision, seed, options),
        batches=batches,
        linears=wrap_linears(model, list(layout.quantized_linears())),
        context=ModalityContext(),
        report=QuantReport(),
    )


def tiny_session(
    seed: int = 0, tied: bool = False, bits: str = "float", **options: Any
) -> tuple[Session, dict[str, Tensor], Tensor]:
    """A float64 session, a two-image batch of two left-padded rows, and the untouched model's logits on it."""
    model = tiny_model(torch.float64, seed)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    batch = tiny_batch(model, num_images=2, seed=seed)
    expected = logits(model, batch)
    return session_for(model, tiny_layout(model), [batch], seed, bits, **options), batch, expected


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the positions that are not padding. Shape: (tokens, vocabulary)."""
    return model(**batch).logits[batch["attention_mask"].bool()]


def outlier_model(seed: int = 0, gain: float = 60.0) -> nn.Module:
    """A float32 model with two outlier channels behind every block norm; its function is that of the plain model."""
    model = tiny_model(torch.float32, seed)
    with torch.no_grad():
        for tower in tiny_layout(model).towers:
            for norm in (norm for block in tower.blocks for norm in (block.attention_norm, block.mlp_norm)):
                module = model.get_submodule(norm.name)
                for parameter in module.parameters():
                    parameter[:2] *= gain
                for name in norm.readers:
                    model.get_submodule(name).weight[:, :2] /= gain
    return model


@torch.no_grad()
def add_fc2_means(model: nn.Module, mean: float) -> None:
    """Gives the weight rows of every vision fc2 means of alternating sign, so that Eq. 9 holds (STANDIN.md)."""
    vision = tiny_layout(model).vision
    assert vision is not None
    for block in vision.blocks:
        weight = model.get_submodule(block.mlp_out).weight
        weight[::2] += mean
        weight[1::2] -= mean


@torch.no_grad()
def hard_model(seed: int, fc2_mean: float, gap: float) -> nn.Module:
    """An outlier model with fc2 rows of mean +-``fc2_mean`` and LLM MLPs in which visual tokens are larger.

    A channel that only visual tokens carry (constant in the projector's output, zero in the token embedding) is read
    ``gap`` times as strongly by the up projection.
    """
    model = outlier_model(seed)
    add_fc2_means(model, fc2_mean)
    layout = tiny_layout(model)
    model.get_input_embeddings().weight[:, 5] = 0
    model.get_submodule(layout.projector[-1]).bias[5] += 4
    for block in layout.text.blocks:
        assert block.mlp_up is not None
        for name in (block.attention.out, block.mlp_out):
            model.get_submodule(name).weight[5] = 0
        model.get_submodule(block.mlp_up).weight[:, 5] *= gap
    return model


def sqnr_db(method: StepMethod, bits: str, seed: int = 0, model: nn.Module | None = None, **options: object) -> float:
    """Signal to quantization noise of a quantized model's logits on data it was not calibrated on.

    ``model`` (default: the outlier model of ``seed``) is changed.
    """
    model = outlier_model(seed) if model is None else model
    batches = [tiny_batch(model, num_images=2, batch_size=4, seed=100 + index) for index in range(4)]
    test = tiny_batch(model, num_images=2, batch_size=8, seed=seed)
    expected = logits(model, test)
    method.quantize(model, tiny_layout(model), Recipe(method.name, *parse_bits(bits), seed, options), batches)
    noise = logits(model, test) - expected
    return 20 * torch.log10(expected.norm() / noise.norm()).item()
