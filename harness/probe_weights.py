"""Probe: weights behind an online Hadamard, before it, and with RMS (paper Sec. 3.4, Eq. 8, Fig. 6 and 12)."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mqbench.harness.errors import RequestError
from mqbench.harness.probe_values import median, rounded, shown_blocks
from mqbench.harness.quant.layout import Tower
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.transforms import OnlineHadamard
from mqbench.harness.tasks import TaskResult

if TYPE_CHECKING:
    from mqbench.harness.probes import ProbeContext

CONDITIONS = MappingProxyType({"original": "original", "fht": "behind the Hadamard", "rms": "with RMS"})
"""The three states of a weight that Fig. 6 shows, with their titles."""

MAX_GROUPS = 128
"""Points of a stored channel series; a wider weight is stored as the peaks of groups of consecutive channels."""

NUM_BINS = 64


def weight_distribution(context: ProbeContext) -> TaskResult:
    """Weights of each block's last linear: as trained (W), behind the online Hadamard (W H^T), and with RMS.

    RMS takes input channel 0, where Eq. 8 puts sqrt(n) times the mean of each output column, out of the product. The
    residual rotation, which mixes output columns, is left out: the original weights are those of the checkpoint.

    Returns:
        score: median over the vision blocks (of a text-only model: the LLM's) of the factor by which RMS lowers the
        largest weight behind the Hadamard. Metrics ``vision.`` and ``text.``: medians over blocks of the largest weight
        ``peak_original``, ``peak_fht``, ``peak_rms`` and of the ratios ``fht_factor`` (behind over before the Hadamard)
        and ``rms_factor`` (without over with RMS). Arrays ``PART.``: those five by block; ``shown_blocks``, and for
        them ``blockN.CONDITION.channel_peak`` (largest weight per group of input channels) and
        ``blockN.CONDITION.share`` (share of weights per bin) with ``blockN.edges``; ``channels_per_group``.

    Raises:
        RequestError: the model is quantized.
    """
    metrics: dict[str, float] = {}
    arrays: dict[str, list[float]] = {}
    towers = context.loaded.layout.towers
    for tower in towers:
        part_metrics, part_arrays = _tower_figures(context, tower)
        metrics |= {f"{tower.part}.{name}": value for name, value in part_metrics.items()}
        arrays |= {f"{tower.part}.{name}": rounded(values) for name, values in part_arrays.items()}
    return TaskResult(metrics[f"{towers[0].part}.rms_factor"], metrics, arrays=arrays)


def conditions(weight: Tensor) -> dict[str, Tensor]:
    """A weight in the three states of ``CONDITIONS``; with RMS the channels start behind the split-off one.

    Shapes: (out, n) -> (out, n), (out, padded_n), (out, padded_n - 1).
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    transformed = OnlineHadamard(wide.shape[1])(wide)
    return {"original": wide, "fht": transformed, "rms": transformed[:, 1:]}


def channel_peaks(values: Tensor, group: int) -> Tensor:
    """Largest magnitude per group of consecutive input channels; the last group may be shorter.

    Shapes: (out, n) -> (ceil(n / group),).
    """
    return torch.stack([part.max() for part in values.abs().amax(0).split(group)])


def _tower_figures(context: ProbeContext, tower: Tower) -> tuple[dict[str, float], dict[str, list[float]]]:
    names = [block.mlp_out for block in tower.blocks]
    kept = shown_blocks(len(names))
    arrays: dict[str, list[float]] = {"shown_blocks": list(kept)}
    by_block: dict[str, list[float]] = {}
    for index, name in enumerate(names):
        states = conditions(_float_weight(context, name))
        for figure, value in _peaks(states).items():
            by_block.setdefault(figure, []).append(value)
        if index in kept:
            arrays |= {f"block{index}.{key}": values for key, values in _distribution(states).items()}
            arrays["channels_per_group"] = [_group(states["original"])]
    return {figure: median(values) for figure, values in by_block.items()}, by_block | arrays


def _float_weight(context: ProbeContext, name: str) -> Tensor:
    module = context.loaded.model.get_submodule(name)
    if isinstance(module, QuantLinear):
        raise RequestError("probe 'weight_distribution' needs the float model; run it with --methods none")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _peaks(states: dict[str, Tensor]) -> dict[str, float]:
    original, fht, rms = (states[name].abs().max().item() for name in CONDITIONS)
    factors = {"fht_factor": fht / original, "rms_factor": fht / rms}
    return {"peak_original": original, "peak_fht": fht, "peak_rms": rms} | factors


def _distribution(states: dict[str, Tensor]) -> dict[str, list[float]]:
    group = _group(states["original"])
    peak = max(values.abs().max().item() for values in states.values())
    edges = torch.linspace(-peak, peak, NUM_BINS + 1, dtype=torch.float64)
    series: dict[str, list[float]] = {"edges": edges.tolist()}
    for name, values in states.items():
        padded = torch.cat([torch.zeros_like(values[:, :1]), values], 1) if name == "rms" else values
        series[f"{name}.channel_peak"] = channel_peaks(padded, group).tolist()
        series[f"{name}.share"] = _shares(values, edges)
    return series


def _shares(values: Tensor, edges: Tensor) -> list[float]:
    inner = edges[1:-1].to(values)
    counts = torch.bincount(torch.bucketize(values.flatten(), inner), minlength=NUM_BINS)
    return (counts.double() / values.numel()).tolist()


def _group(weight: Tensor) -> int:
    return -(-weight.shape[1] // MAX_GROUPS)
