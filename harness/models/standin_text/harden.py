"""Makes the trained text stand-in as hard to quantize as a real LLaMA, without changing the function that it computes.

Exact rescalings, each with its own switch: outlier channels behind every norm, value heads of different ranges, a few
large channels at down_proj's input, which only an online Hadamard can spread, and signs of down_proj's columns that
point one way, which make large means (Eq. 9 of the MQuant paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Hardness:
    """Ingredients applied after training.

    Attributes:
        outlier_gain: (smallest, largest) gain of the outlier channels behind norms, log-spaced; (1, 1) leaves them out.
        num_outliers: Outlier channels per norm; the same in every layer, as in real models.
        head_gain: Gain of half of each layer's value heads, undone in o_proj; 1 leaves it out.
        down_gain: Gain of the large channels at down_proj's input; 1 leaves them out.
        num_down: Large channels per layer: those that are active at most tokens.
        align_signs: Flip channels of down_proj's input so that the rows of its weight get large means.
        seed: Chooses outlier channels and heads.
    """

    outlier_gain: tuple[float, float] = (60.0, 150.0)
    num_outliers: int = 4
    head_gain: float = 5.0
    down_gain: float = 30.0
    num_down: int = 8
    align_signs: bool = True
    seed: int = 0


EASY = Hardness(outlier_gain=(1.0, 1.0), head_gain=1.0, down_gain=1.0, align_signs=False)
"""The model as it was trained."""


@torch.no_grad()
def harden(model: LlamaForCausalLM, hardness: Hardness, rows: Tensor) -> None:
    """Rescales ``model`` in place; its outputs stay the same up to rounding.

    Args:
        model: The trained model.
        hardness: Which ingredients, how strong.
        rows: (windows, tokens) of text, on which active channels are found.
    """
    activity = down_activity(model, rows)
    generator = torch.Generator().manual_seed(hardness.seed)
    channels = torch.randperm(model.config.hidden_size, generator=generator)[: hardness.num_outliers]
    gains = _gains(hardness)
    for layer, active in zip(model.model.layers, activity, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        _scale_norm(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), channels, gains)
        _scale_norm(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), channels, gains)
        _scale_heads(attention, hardness.head_gain, generator)
        raised = active.topk(hardness.num_down).indices
        mlp.up_proj.weight[raised] *= hardness.down_gain
        mlp.down_proj.weight[:, raised] /= hardness.down_gain
        if hardness.align_signs:
            signs = aligned_signs(mlp.down_proj.weight)
            mlp.up_proj.weight *= signs[:, None]
            mlp.down_proj.weight *= signs


@torch.no_grad()
def down_activity(model: LlamaForCausalLM, rows: Tensor) -> list[Tensor]:
    """Per layer, the mean magnitude of each channel of down_proj's input, (intermediate,)."""
    seen: list[Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().mean((0, 1))))
        for layer in model.model.layers
    ]
    model(input_ids=rows)
    for handle in handles:
        handle.remove()
    return seen


def aligned_signs(weight: Tensor, num_rounds: int = 50) -> Tensor:
    """Signs s that make the norm of W s large, W of shape (out, in): alternating steps from the first singular vector.

    Returns:
        (in,) of +1 and -1.
    """
    signs = _sign(torch.linalg.svd(weight.double()).Vh[0])
    for _ in range(num_rounds):
        signs = _sign(weight.double().T @ (weight.double() @ signs))
    return signs.to(weight.dtype)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).double()


def _gains(hardness: Hardness) -> Tensor:
    low, high = hardness.outlier_gain
    if high <= low:
        return torch.full((hardness.num_outliers,), low)
    return torch.logspace(0, 1, hardness.num_outliers, base=high / low) * low


def _scale_norm(norm: Any, readers: Sequence[nn.Linear], channels: Tensor, gains: Tensor) -> None:
    norm.weight[channels] *= gains
    for reader in readers:
        reader.weight[:, channels] /= gains


def _scale_heads(attention: Any, gain: float, generator: torch.Generator) -> None:
    """Every query head of a group reads the same value head, and takes the gain back."""
    config, width = attention.config, attention.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    for head in torch.randperm(config.num_key_value_heads, generator=generator)[: config.num_key_value_heads // 2]:
        attention.v_proj.weight[head * width : (head + 1) * width] *= gain
        attention.o_proj.weight[:, head * group * width : (head + 1) * group * width] /= gain
