"""Made-up records for every cell of ``results/plans/paper.toml``, without running or even finding a model."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fakes.records import CALIBRATION, make_cell, make_record
from mqbench.harness.discover import find_method
from mqbench.harness.environment import ROOT
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.record import CalibrationInfo, Record
from mqbench.harness.request import options_of
from mqbench.harness.tasks import TASK_INFOS, TaskKind

PLAN = ROOT / "results" / "plans" / "paper.toml"
BENCHMARKS = [info.name for info in TASK_INFOS.values() if info.kind is TaskKind.BENCHMARK]
METRICS: Mapping[str, tuple[str, ...]] = {
    "scienceqa": ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "Overall"),
    "eq9": tuple(
        f"{part}.{name}"
        for part in ("vision", "text")
        for name in ("blocks", "met", "ratio_percent", "margin_median", "margin_min")
    ),
    "model_size": ("visual_params_b", "llm_params_b", "visual_tflops", "llm_tflops"),
}


def plan_records() -> list[Record]:
    """One record per cell; scores and metrics lie between 0 and 1 and depend on model, recipe, task and calibration."""
    return [record for run in _runs() for record in _records(run)]


def _runs() -> list[Mapping[str, Any]]:
    runs: list[Mapping[str, Any]] = tomllib.loads(PLAN.read_text(encoding="utf-8"))["run"]
    return runs


def _records(run: Mapping[str, Any]) -> Iterator[Record]:
    calibration = replace(CALIBRATION, num_samples=run.get("calib_samples", CALIBRATION.num_samples))
    for task in run.get("tasks", BENCHMARKS):
        for model in _models(task, run):
            yield _record(task, model, Recipe("none"), None)
            for recipe in _recipes(run):
                yield _record(task, model, recipe, calibration)


def _models(task: str, run: Mapping[str, Any]) -> list[str]:
    if TASK_INFOS[task].kind is TaskKind.BLUEPRINT:
        return list(run["models"])
    return ["standin-llama" if TASK_INFOS[task].kind is TaskKind.PERPLEXITY else "standin-qwen2-vl"]


def _recipes(run: Mapping[str, Any]) -> Iterator[Recipe]:
    for name in run.get("methods", ()):
        for bits in run.get("bits", ()):
            options = options_of(find_method(name), run["options"]) if "options" in run else {}
            yield Recipe(name, *parse_bits(bits), 0, options)


def _record(task: str, model: str, recipe: Recipe, calibration: CalibrationInfo | None) -> Record:
    cell = make_cell(task, model=model, recipe=recipe, calibration=calibration, data_sha256=task.ljust(64, "0"))
    seed = f"{cell.label} {recipe.label} {calibration and calibration.num_samples}"
    metrics = {name: _number(f"{seed} {name}") for name in METRICS.get(task, ("Overall",))}
    return make_record(cell, _number(seed), metrics=metrics)


def _number(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8
