"""Sessions over the tiny Qwen2-VL without any method, for tests of single steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from torch import Tensor, nn

from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.linear import wrap_linears
from mqbench.harness.quant.modality import ModalityContext
from mqbench.harness.quant.scheme import Recipe
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


def tiny_session(seed: int = 0, tied: bool = False, **options: Any) -> tuple[Session, dict[str, Tensor], Tensor]:
    """A float64 session, a two-image batch of two left-padded rows, and the untouched model's logits on it."""
    model = tiny_model(torch.float64, seed)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    batch = tiny_batch(model, num_images=2, seed=seed)
    expected = logits(model, batch)
    return session_for(model, tiny_layout(model), [batch], seed, **options), batch, expected


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the positions that are not padding. Shape: (tokens, vocabulary)."""
    return model(**batch).logits[batch["attention_mask"].bool()]
