"""Probes: looks into a model in memory, stored as records like any score, so that figures and tables come from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mqbench.harness.errors import RequestError
from mqbench.harness.evaluated import EvaluatedBatch
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.probe_activations import activation_ranges
from mqbench.harness.probe_backends import backend_agreement
from mqbench.harness.probe_values import median, rounded
from mqbench.harness.probe_weights import weight_distribution
from mqbench.harness.quant.layout import Tower
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Batch, LayerReport, QuantReport
from mqbench.harness.tasks import Needs, TaskResult

HEADLINE_RULE = "median"
"""The reading of Eq. 9 that ``met`` and ``ratio_percent`` use; other rules carry their name (``met_any``)."""


@dataclass(frozen=True)
class ProbeContext:
    """What a probe may look at.

    Attributes:
        loaded: The model, float or quantized in place.
        recipe: How it was quantized; method ``none`` for the float model.
        report: What quantization said, or None for the float model and for folders quantized before.
        batches: Encodes the calibration samples; called only by probes with ``uses_calibration``.
        evaluated: Encodes what is evaluated; called only by probes whose task has ``uses_rows``.
    """

    loaded: LoadedModel
    recipe: Recipe
    report: QuantReport | None
    batches: Callable[[], Sequence[Batch]]
    evaluated: Callable[[], Iterable[EvaluatedBatch]] = tuple


@dataclass(frozen=True)
class Probe:
    """One probe.

    Attributes:
        name: As users type it.
        title: Head of its column in tables.
        unit: What its score counts.
        needs: The models that it fits.
        uses_calibration: It reads the calibration samples.
        run: Does the work; raises ``MQBenchError`` where the model cannot be looked at.
    """

    name: str
    title: str
    unit: str
    needs: Needs
    uses_calibration: bool
    run: Callable[[ProbeContext], TaskResult]


def eq9(context: ProbeContext) -> TaskResult:
    """Blocks whose last linear satisfies Eq. 9, per part (paper Table 2).

    Taken from the report of the quantization, that is, from the final transformed float weights. A block's margin is
    the median over output columns j of |sqrt(n) mean_i(w_ij)| / max_i |w_ij|; it counts as met above 1. The paper
    leaves the aggregation over j unsaid, so the other rules of ``rms_rule`` are counted too.

    Returns:
        score: share of blocks that meet Eq. 9, all parts together, in percent. Metrics ``vision.`` and ``text.``:
        ``blocks``, ``met``, ``ratio_percent``, ``margin_median``, ``margin_min``, and ``met_RULE``,
        ``ratio_percent_RULE`` for every other rule. Arrays: ``vision.margin``, ``text.margin``, by block.

    Raises:
        RequestError: the recipe did not test Eq. 9.
    """
    metrics: dict[str, float] = {}
    arrays: dict[str, list[float]] = {}
    for tower in context.loaded.layout.towers:
        layers = _tested_layers(context, tower)
        if layers:
            metrics |= _counts(str(tower.part), layers)
            arrays[f"{tower.part}.margin"] = rounded(layer.eq9_margin or 0.0 for layer in layers)
    if not metrics:
        raise RequestError(
            f"method '{context.recipe.method}' tested no layer for Eq. 9; probe 'eq9' needs method mquant with rms and "
            "online_hadamard on, quantized in the same run"
        )
    met, blocks = (sum(value for name, value in metrics.items() if name.endswith(end)) for end in (".met", ".blocks"))
    return TaskResult(100 * met / blocks, metrics, arrays=arrays)


def _tested_layers(context: ProbeContext, tower: Tower) -> list[LayerReport]:
    """The last linears of a tower's blocks, as far as Eq. 9 was tested on them."""
    if context.report is None:
        return []
    layers = (context.report.layers.get(block.mlp_out) for block in tower.blocks)
    return [layer for layer in layers if layer is not None and layer.eq9_margin is not None]


def _counts(part: str, layers: Sequence[LayerReport]) -> dict[str, float]:
    margins = [layer.eq9_margin for layer in layers if layer.eq9_margin is not None]
    metrics: dict[str, float] = {f"{part}.blocks": len(layers)}
    for rule in layers[0].eq9_rules:
        end = "" if rule == HEADLINE_RULE else f"_{rule}"
        met = sum(layer.eq9_rules[rule] for layer in layers)
        metrics |= {f"{part}.met{end}": met, f"{part}.ratio_percent{end}": 100 * met / len(layers)}
    return metrics | {f"{part}.margin_median": median(margins), f"{part}.margin_min": min(margins)}


PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        probe.name: probe
        for probe in (
            Probe(
                "activation_ranges",
                "activation ranges",
                "visual over text peak, median over LLM blocks",
                Needs.MULTIMODAL,
                True,
                activation_ranges,
            ),
            Probe("eq9", "Eq. 9", "% of blocks that satisfy Eq. 9", Needs.ANY, False, eq9),
            Probe(
                "weight_distribution",
                "weights",
                "largest weight behind the Hadamard over the same with RMS, median over blocks",
                Needs.ANY,
                False,
                weight_distribution,
            ),
            Probe(
                "backend_agreement",
                "same tokens",
                "% of tokens predicted alike by both backends",
                Needs.ANY,
                False,
                backend_agreement,
            ),
        )
    }
)
"""Every probe by name."""
