"""Writes a page of ``results`` on a stand-in: what makes it hard to quantize, measured and drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from mqbench.harness import environment
from mqbench.harness.models.standin.curve import CurvePoint, plot_loss
from mqbench.harness.models.standin.family import DEFAULT_FAMILY
from mqbench.harness.models.standin.study import SETTINGS, VARIANTS, Setting, Study
from mqbench.harness.quant.session import QuantReport
from mqbench.kernels.hadamard import hadamard_transform

FLOAT_RANGES = Setting("float", "rtn", "w8a8", "w8a8", {"activations": "modality"})
ROTATED_RANGES = Setting("rotated", "mquant", "w8a8", "w8a8")
FIRST_PAGE = "standin"
PAGE = """\
# The stand-in `{model}`: what makes it hard to quantize

**It is synthetic: its scores are no evidence about real checkpoints.** Every figure here was measured by
`mqbench standin report` on {device}, git commit {commit}; raw numbers: `{stem}/measured.json`.

## Training

![loss]({stem}/loss.png)

{training}

Hardened afterwards, function-preserving:

{hardness}

[history.md](standin/history.md) tells how the shipped weights came about.

Trained in: a constant added to each output row of the vision fc2 at initialization (`fc2_mean`: large column means,
Eq. 9), and a penalty that gives MLP channels to one modality (`penalty_weight`). What a model trained without them
scores was not measured for this page: that takes two more trainings (`mqbench standin train --no-fc2-mean`,
`--no-specialise`).

## Scores with the function-preserving ingredients left out

Greedy exact match, %, averaged over the five shipped benchmarks (not VLMEvalKit's metrics); vision and LLM W4A8, static
activations, unless the row says otherwise. Float: {float_score:.1f} before hardening.

{scores}

## Where visual and text tokens differ

Largest absolute input of each LLM linear over visual tokens, relative to that over text tokens: in the float model, and
after rotation and online Hadamard. Above 1 visual tokens are the larger ones.

![ranges]({stem}/ranges.png)

{ranges}

## Weights behind the online Hadamard (Eq. 8 and 9)

![weights]({stem}/weights.png)

Margin: median over output columns of |sqrt(n) mean(w)| / max|w|; Eq. 9 holds for most columns above 1.

{margins}
"""


def page_stem(model: str) -> str:
    """Name of a stand-in's page and of the folder beside it: the first stand-in's is ``standin``."""
    return FIRST_PAGE if model == f"standin-{DEFAULT_FAMILY}" else model


def write_report(run: Path, results: Path, study: Study) -> Path:
    """Measures everything and writes the page (``page_stem``), its pictures and ``measured.json``.

    Args:
        run: A finished training run.
        results: Receives the page and, beside it, the folder of its name.
        study: The run's study.

    Returns:
        The page.
    """
    stem = page_stem(study.name)
    folder = results / stem
    folder.mkdir(parents=True, exist_ok=True)
    measured = measure(study)
    measured |= {"model": study.name}
    measured |= {"environment": environment.describe(), "hardness": asdict(study.hardness), "training": study.training}
    text = json.dumps(measured, indent=1, default=str)
    (folder / "measured.json").write_text(f"{text}\n", encoding="utf-8")
    plot_loss([CurvePoint(**row) for row in study.curve], folder / "loss.png")
    _plot_ranges(measured["ranges"], folder / "ranges.png")
    _plot_weights(study, folder / "weights.png")
    written = results / f"{stem}.md"
    written.write_text(page(json.loads(text)), encoding="utf-8")
    return written


def measure(study: Study) -> dict[str, Any]:
    """All figures of the page."""
    scores = {"before hardening": {"float": study.score(study.plain)}}
    jobs = [(name, setting) for name in VARIANTS for setting in SETTINGS]
    for name, setting in track(jobs, "scoring"):
        model, _ = study.quantized(study.hardened(**VARIANTS[name]), setting)
        scores.setdefault(name, {})[setting.label] = study.score(model)
    _, before = study.quantized(study.hardened(), FLOAT_RANGES)
    _, after = study.quantized(study.hardened(), ROTATED_RANGES)
    return {"scores": scores, "ranges": _ranges(before, after), "eq9": _margins(after)}


def _ranges(before: QuantReport, after: QuantReport) -> dict[str, dict[str, float]]:
    return {
        name: {
            "float": layer.scales["visual"] / layer.scales["text"],
            "rotated": after.layers[name].scales["visual"] / after.layers[name].scales["text"],
        }
        for name, layer in before.layers.items()
        if "visual" in layer.scales
    }


def _margins(report: QuantReport) -> dict[str, float]:
    return {name: layer.eq9_margin for name, layer in report.layers.items() if layer.eq9_margin is not None}


def page(measured: Mapping[str, Any]) -> str:
    """The page as Markdown, from what ``measured.json`` holds."""
    environment_, scores = measured["environment"], measured["scores"]
    model = measured.get("model", f"standin-{DEFAULT_FAMILY}")
    labels = [setting.label for setting in SETTINGS]
    rows = [[label, *(f"{scores[name][label]:.1f}" for name in VARIANTS)] for label in labels]
    ranges = [[_short(name), f"{r['float']:.2f}", f"{r['rotated']:.2f}"] for name, r in measured["ranges"].items()]
    margins = [[_short(name), f"{margin:.2f}"] for name, margin in measured["eq9"].items()]
    return PAGE.format(
        model=model,
        stem=page_stem(model),
        device=environment_["cpu"],
        commit=(environment_["git"] or {"commit": "unknown"})["commit"][:12],
        training=_listed(measured["training"]),
        hardness=_listed(measured["hardness"]),
        float_score=scores["before hardening"]["float"],
        scores=_table(["method", *VARIANTS], rows),
        ranges=_table(["input of", "float", "rotated"], ranges),
        margins=_table(["layer", "margin"], margins),
    )


def _listed(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"* `{key}`: {value}" for key, value in settings.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(name: str) -> str:
    return name.removeprefix("model.").replace("language_model.", "").replace("self_attn.", "").replace("mlp.", "")


def _plot_ranges(ranges: Mapping[str, Mapping[str, float]], path: Path) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    positions, names = range(len(ranges)), [_short(name) for name in ranges]
    shared = commonprefix(names).rpartition(".")[0]  # noqa: RUF071 (no paths; a prefix of characters, cut at a dot)
    for key, marker in (("float", "o"), ("rotated", "^")):
        axes.plot(positions, [row[key] for row in ranges.values()], marker, label=key)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(yscale="log", title="Largest absolute input", ylabel="visual / text tokens")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(positions), [name.removeprefix(f"{shared}.") for name in names], rotation=90, fontsize=6)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_weights(study: Study, path: Path) -> None:
    """Largest weight per input channel of the first vision fc2: raw, behind the Hadamard, and with row 0 split off."""
    pyplot = _pyplot()
    assert study.layout.vision is not None
    weight = study.plain.get_submodule(study.layout.vision.blocks[0].mlp_out).weight.detach()
    transformed = hadamard_transform(weight)
    split = torch.cat([torch.zeros_like(transformed[:, :1]), transformed[:, 1:]], dim=1)
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 2.6), sharey=True, layout="constrained")
    shown = {"fc2": weight, "behind the Hadamard": transformed, "channel 0 split off (RMS)": split}
    for axes, (title, values) in zip(panels, shown.items(), strict=True):
        axes.plot(values.abs().amax(0), linewidth=0.7)
        axes.set(title=title, xlabel="input channel")
    panels[0].set_ylabel("largest |weight|")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
