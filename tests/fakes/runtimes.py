"""Quantized tiny models before and after they become runtimes, and what they must compute."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from fakes import tiny_llama
from fakes.sessions import add_fc2_means
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.quant.integer import use_integer_backend
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Batch
from mqbench.harness.runtime.interface import Runtime, RuntimeInputs


def quantized_tiny(
    method: str, bits: str, dtype: torch.dtype = torch.float64, down_mean: float = 0.0, **options: Any
) -> tuple[LoadedModel, Batch]:
    """The tiny Qwen2-VL with Eq. 9 true of every fc2, in integers, and a left-padded batch of three rows of images.

    A large ``down_mean`` makes Eq. 9 true of every down_proj, too.
    """
    model = tiny_model(torch.float32)
    add_fc2_means(model, 0.5)
    with torch.no_grad():
        for block in tiny_layout(model).text.blocks:
            model.get_submodule(block.mlp_out).weight += down_mean
    model.to(dtype)
    model.generation_config.eos_token_id = None  # so that every row decodes to the end
    loaded = LoadedModel("tiny", model, None, tiny_layout(model))
    batches = [tiny_batch(model, num_images=2, batch_size=3, seed=seed) for seed in range(2)]
    quantize(method, loaded, bits, batches, options)
    return loaded, tiny_batch(model, num_images=2, batch_size=3, seed=7)


def quantized_llama(method: str, bits: str, **options: Any) -> tuple[LoadedModel, Batch]:
    """The tiny LLaMA in integers, and a left-padded batch."""
    model = tiny_llama.tiny_model(torch.float64)
    model.generation_config.eos_token_id = None
    loaded = LoadedModel("tiny", model, None, tiny_llama.tiny_layout(model))
    quantize(method, loaded, bits, [tiny_llama.tiny_batch(seed=seed) for seed in range(2)], options)
    return loaded, tiny_llama.tiny_batch(seed=7)


def quantize(method: str, loaded: LoadedModel, bits: str, batches: list[Any], options: dict[str, Any]) -> None:
    """Quantizes in place and turns what can into integers."""
    (entry,) = entry_points(group="mqbench.methods", name=method)
    if method in ("quarot", "mquant"):
        options = {"rounding": "rtn"} | options  # faster than GPTQ; what runs is the same
    vision, _, text = bits.partition("/")
    entry.load().quantize(loaded.model, loaded.layout, Recipe(method, vision, text or vision, 0, options), batches)
    use_integer_backend(loaded.model)


@torch.no_grad()
def all_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a pass through Transformers' interface, (B, T, vocabulary)."""
    logits: Tensor = model(**batch).logits
    return logits


def real(batch: Batch, x: Tensor) -> Tensor:
    """What stands at tokens that are no padding."""
    return x[batch["attention_mask"].bool()]


@torch.no_grad()
def generated(model: Any, batch: Batch, new_tokens: int, **options: Any) -> Tensor:
    """Greedy tokens behind a prompt, (B, new_tokens)."""
    tokens: Tensor = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, **options)
    return tokens[:, batch["input_ids"].shape[1] :]


def decoded(runtime: Runtime, batch: Batch, new_tokens: int) -> Tensor:
    """The same by prefill and decoding steps."""
    tokens = [runtime.prefill(RuntimeInputs.from_batch(batch)).argmax(-1)]
    while len(tokens) < new_tokens:
        tokens.append(runtime.decode(tokens[-1]).argmax(-1))
    return torch.stack(tokens, 1)


def extended(batch: Batch, more: Batch) -> dict[str, Tensor]:
    """One prompt of two turns."""
    joined = {name: torch.cat([batch[name], more[name]], 1) for name in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in batch:
        joined["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], more["mm_token_type_ids"]], 1)
        joined |= _interleaved(batch, more)
    return joined


def _interleaved(batch: Batch, more: Batch) -> dict[str, Tensor]:
    """Images in the order of the rows: each row's first turn, then its second."""
    rows = len(batch["input_ids"])
    pixels, grids = [], []
    for row in range(rows):
        for turn in (batch, more):
            turn_grids = turn["image_grid_thw"].unflatten(0, (rows, -1))
            sizes = turn_grids.prod(-1).sum(-1).tolist()
            pixels.append(turn["pixel_values"].split(sizes)[row])
            grids.append(turn_grids[row])
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
