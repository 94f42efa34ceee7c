"""Sessions of AWQ on tiny models, and rounding written as loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fakes import tiny_llama
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines.awq import METHOD
from mqbench.harness.quant.method import open_session
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Strategy, parse_bits
from mqbench.harness.quant.session import Session

GROUPED = QuantArgs(4, symmetric=False, strategy=Strategy.GROUP, group_size=16)


def awq_session(bits: str = "w4a16-g16", dtype: torch.dtype = torch.float64, **options: Any) -> Session:
    """The tiny Qwen2-VL, with a batch of two images and one whose first row has none."""
    model = tiny_model(dtype)
    batches = [tiny_batch(model, num_images=2, seed=0), tiny_batch(model, batch_size=3, seed=1, text_rows=1)]
    recipe = Recipe("awq", *parse_bits(bits), options=options)
    return open_session(model, tiny_layout(model), recipe, batches, METHOD.options)


def llama_session(model: nn.Module, batches: Sequence[dict[str, Tensor]], **options: Any) -> Session:
    recipe = Recipe("awq", "float", "w4a16-g16", options=options)
    return open_session(model, tiny_llama.tiny_layout(model), recipe, batches, METHOD.options)


def weights_of(session: Session) -> dict[str, Tensor]:
    return {name: linear.weight.clone() for name, linear in session.linears.items()}


def naive_rounded(weight: Tensor, group_size: int, num_bits: int = 4) -> Tensor:
    """Asymmetric minmax rounding of every group, one by one."""
    result = weight.clone()
    for row, start in itertools.product(range(len(weight)), range(0, weight.shape[1], group_size)):
        group = weight[row, start : start + group_size]
        low, high = min(group.min().item(), 0.0), max(group.max().item(), 0.0)
        scale = (high - low) / (2**num_bits - 1) or 1.0
        zero = round(-low / scale)
        levels = (torch.round(group / scale) + zero).clamp(0, 2**num_bits - 1)
        result[row, start : start + group_size] = (levels - zero) * scale
    return result
