"""MQuant's switches in every combination: exact before rounding, and each quantizes, runs and survives saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fakes.sessions import add_fc2_means, logits
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.serialize import load_quantized, save_quantized
from mqbench.mquant.mquant import METHOD

EXACT = ("ln2rms", "rotation", "online_hadamard", "online_out_hadamard", "aifs")
"""Switches that must not change a float model's outputs."""

AXES: Mapping[str, tuple[Any, ...]] = {
    "msq": (True, False),
    "aifs": (True, False),
    "rms": (True, False),
    "ln2rms": (True, False),
    "rotation": (True, False),
    "online_hadamard": (True, False),
    "rounding": ("gptq", "rtn"),
    "rms_x0_bits": (None, 4, 8),
    "rms_side": ("both", "weight", "activation"),
    "activations": (None, "token"),
}


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few settings in which every value of an axis meets every value of every other axis."""
    rows = [tuple(zip(axes, values, strict=True)) for values in product(*axes.values())]
    pairs = {row: set(combinations(row, 2)) for row in rows}
    open_pairs: set[Any] = set().union(*pairs.values())
    chosen = []
    while open_pairs:
        best = max(rows, key=lambda row: len(pairs[row] & open_pairs))
        open_pairs -= pairs[best]
        chosen.append(dict(best))
    return chosen


def skewed_model(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A tiny model whose fc2 satisfies Eq. 9."""
    model = tiny_model(dtype, seed)
    add_fc2_means(model, 0.3)
    return model


def recipe_options(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``AXES`` as recipe options; ``activations`` None leaves the strategy to ``msq``."""
    given = {key: value for key, value in setting.items() if key != "activations" or value is not None}
    return {"rms_rule": "any", **given}


def num_split(model: nn.Module) -> int:
    return sum(module.x0_bypass or module.x0_weight is not None for module in quant_linears(model))


def quant_linears(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("side", [None, "both", "weight", "activation"])
@pytest.mark.parametrize("switches", list(product((True, False), repeat=len(EXACT))), ids=str)
def test_outputs_do_not_change_before_rounding(switches: tuple[bool, ...], side: str | None) -> None:
    options: dict[str, Any] = dict(zip(EXACT, switches, strict=True)) | {"rms_rule": "any", "rms": side is not None}
    options |= {} if side is None else {"rms_side": side}
    model = skewed_model(torch.float64)
    batch = tiny_batch(model, num_images=2)
    expected = logits(model, batch)
    METHOD.quantize(model, tiny_layout(model), Recipe("mquant", options=options), [])
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)
    assert (num_split(model) > 0) is (side is not None and options["online_hadamard"])


@pytest.mark.parametrize("setting", pairwise(AXES), ids=lambda setting: "-".join(map(str, setting.values())))
def test_every_pair_of_switches_quantizes_runs_and_is_saved_exactly(tmp_path: Path, setting: dict[str, Any]) -> None:
    recipe = Recipe("mquant", "w4a8-g20", "w4a4", 0, recipe_options(setting))
    model = skewed_model(torch.float32)
    test, batches = tiny_batch(model, num_images=2), [tiny_batch(model, num_images=2, seed=seed) for seed in (1, 2)]
    expected = logits(model, test)
    report = METHOD.quantize(model, tiny_layout(model), recipe, batches)
    quantized = logits(model, test)
    assert 0 < (quantized - expected).norm() < expected.norm()
    assert (num_split(model) > 0) is (setting["rms"] and setting["online_hadamard"])
    save_quantized(model, report, recipe, tmp_path, "tiny")
    fresh = skewed_model(torch.float32, seed=9)
    load_quantized(tmp_path, LoadedModel("tiny", fresh, None, tiny_layout(fresh)), METHOD.restore)
    assert torch.equal(logits(fresh, test), quantized)


def test_the_settings_meet_in_pairs() -> None:
    rows = pairwise(AXES)
    assert len(rows) < 20
    for (first, values), (second, others) in combinations(AXES.items(), 2):
        assert {(row[first], row[second]) for row in rows} == set(product(values, others))
