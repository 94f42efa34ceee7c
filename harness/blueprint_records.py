"""Records of what blueprints say: parameters and FLOPs (Table 19), visual tokens by image size (Figures 1a and 9)."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from mqbench.harness import environment
from mqbench.harness.blueprint import WEIGHTS_PREFIX, Blueprint, InputSpec, load_blueprints
from mqbench.harness.blueprint_tokens import visual_tokens
from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import Cell, Record, Status, canonical_json
from mqbench.harness.store import RecordStore
from mqbench.harness.tasks import TaskResult

VERSION = "1"
"""Raised when a count changes its meaning; older records are then not taken for new ones."""

MODEL_SIZE = "model_size"
VISUAL_TOKENS = "visual_tokens"

BILLION, TERA = 1e9, 1e12
PAPER_SIDES_PX = (280, 560, 840, 1120, 1400, 1680, 1960, 2240, 2520, 2880, 3080, 3360, 3640, 4480, 5600)
"""Square images of Table 17."""
SIDES_PX = tuple(sorted({*PAPER_SIDES_PX, *range(280, 5601, 28)}))
WIDE_HEIGHT_PX = 448
WIDE_WIDTHS_PX = tuple(range(WIDE_HEIGHT_PX, 12 * WIDE_HEIGHT_PX + 1, 56))
"""Images of one height and growing width: TTFT that grows with the aspect ratio (Table 19)."""
HEADLINE_SIDE_PX = 1120


def model_size(blueprint: Blueprint) -> TaskResult:
    """Parameters in billions and TFLOPs, per part; the score is the total of parameters.

    Visual is the vision tower with the projector. ``visual_tflops`` and ``llm_tflops`` are of the input that the
    paper's Table 19 implies; those with ``_256`` are of one image of 256 visual tokens, attention included.
    """
    from mqbench.harness.blueprint_count import build_parts, num_params, num_view_tokens

    parts = build_parts(blueprint)
    tower, projector, llm = (num_params(part) for part in (parts.tower, parts.projector, parts.llm))
    metrics = {
        "visual_params_b": (tower + projector) / BILLION,
        "llm_params_b": llm / BILLION,
        "vision_tower_params_b": tower / BILLION,
        "projector_params_b": projector / BILLION,
        "llm_without_embedding_params_b": (llm - blueprint.llm.embedding_params) / BILLION,
        **_flops(blueprint, blueprint.paper_input, ""),
        **_flops(blueprint, blueprint.input, "_256"),
        "visual_tokens_per_view": num_view_tokens(blueprint, blueprint.paper_input.view_px),
        **{f"input_{name}": float(value) for name, value in asdict(blueprint.paper_input).items()},
    }
    return TaskResult((tower + projector + llm) / BILLION, metrics)


def token_counts(blueprint: Blueprint) -> TaskResult:
    """Visual tokens of square images and of wide ones; the score is that of 1120 x 1120 pixels."""
    square = {side: visual_tokens(blueprint, side, side) for side in SIDES_PX}
    arrays = {
        "side_px": SIDES_PX,
        "tokens": tuple(square.values()),
        "wide_width_px": WIDE_WIDTHS_PX,
        "wide_tokens": tuple(visual_tokens(blueprint, WIDE_HEIGHT_PX, width) for width in WIDE_WIDTHS_PX),
    }
    metrics = {f"tokens_{side}px": float(square[side]) for side in PAPER_SIDES_PX}
    return TaskResult(float(square[HEADLINE_SIDE_PX]), metrics, arrays=arrays)


TASKS: Mapping[str, Callable[[Blueprint], TaskResult]] = MappingProxyType(
    {MODEL_SIZE: model_size, VISUAL_TOKENS: token_counts}
)


def blueprint_cell(blueprint: Blueprint, task: str) -> Cell:
    """The settings of one record.

    Raises:
        UnknownNameError: a blueprint has no such task.
    """
    if task not in TASKS:
        raise UnknownNameError("blueprint task", task, TASKS)
    return Cell(
        model=blueprint.name,
        weights_sha256=WEIGHTS_PREFIX + blueprint.sha256,
        recipe=Recipe("none"),
        method_version=VERSION,
        task=task,
        limit=None,
        data_sha256=_inputs_hash(blueprint, task),
        calibration=None,
        device="meta",
        dtype="bfloat16",
        batch_size=1,
    )


def blueprint_records(
    names: Sequence[str] | None = None, tasks: Sequence[str] = tuple(TASKS)
) -> list[tuple[Cell, TaskResult]]:
    """Computes the tasks of several blueprints, of all with None.

    Raises:
        UnknownNameError: no such blueprint or task.
        RequestError: a blueprint file is wrong.
    """
    return [(cell, TASKS[cell.task](blueprint)) for blueprint, cell in _cells(names, tasks)]


def run_blueprints(
    store: RecordStore, names: Sequence[str] | None = None, tasks: Sequence[str] = tuple(TASKS)
) -> list[Record]:
    """Appends a record for every cell that has no ok record yet, and returns the new ones.

    Raises:
        UnknownNameError: no such blueprint or task.
        RequestError: a blueprint file is wrong.
        OutputError: the store cannot be written.
    """
    cells = list(_cells(names, tasks))
    store.prepare()
    known = store.latest()
    new = []
    for blueprint, cell in cells:
        if cell.key not in known or not known[cell.key].ok:
            new.append(_record(blueprint, cell))
            store.append(new[-1])
    return new


def list_sizes(names: Sequence[str] | None = None) -> None:
    """Prints parameters and FLOPs per part, and the input that the FLOPs are of.

    Raises:
        UnknownNameError: no such blueprint.
        RequestError: a blueprint file is wrong.
    """
    table = Table("model", "visual B", "LLM B", "visual TFLOPs", "LLM TFLOPs", "of", "note")
    figures = ("visual_params_b", "llm_params_b", "visual_tflops", "llm_tflops")
    for blueprint in load_blueprints(names):
        metrics = model_size(blueprint).metrics
        numbers = (f"{metrics[name]:.2f}" for name in figures)
        table.add_row(blueprint.name, *numbers, input_text(blueprint.paper_input), blueprint.explanation)
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table, markup=False)


def input_text(spec: InputSpec) -> str:
    """The input of a FLOP count in words."""
    views = f"{spec.views} x {spec.view_px} px, {spec.llm_tokens} tokens"
    attention = "" if spec.attention else ", linear layers only"
    return views + attention + ("" if spec.share == 1 else f", times {spec.share:g}")


def _cells(names: Sequence[str] | None, tasks: Sequence[str]) -> Iterator[tuple[Blueprint, Cell]]:
    for blueprint in load_blueprints(names):
        for task in tasks:
            yield blueprint, blueprint_cell(blueprint, task)


def _record(blueprint: Blueprint, cell: Cell) -> Record:
    started_at, start = datetime.now(UTC), time.perf_counter()
    result = TASKS[cell.task](blueprint)
    return Record(
        cell=cell,
        status=Status.OK,
        started_at=started_at.isoformat(timespec="seconds"),
        duration_s=time.perf_counter() - start,
        score=result.score,
        metrics=result.metrics,
        arrays=result.arrays,
        environment=environment.describe(),
    )


def _flops(blueprint: Blueprint, spec: InputSpec, suffix: str) -> dict[str, float]:
    from mqbench.harness.blueprint_count import llm_flops, visual_flops

    visual = visual_flops(blueprint, spec.view_px).total(spec, spec.views)
    llm = llm_flops(blueprint, spec.llm_tokens).total(spec)
    return {f"visual_tflops{suffix}": visual / TERA, f"llm_tflops{suffix}": llm / TERA}


def _inputs_hash(blueprint: Blueprint, task: str) -> str:
    inputs: dict[str, Any] = {"side_px": SIDES_PX, "wide": (WIDE_HEIGHT_PX, WIDE_WIDTHS_PX)}
    if task == MODEL_SIZE:
        inputs = {"input": asdict(blueprint.input), "paper_input": asdict(blueprint.paper_input)}
    return hashlib.sha256(canonical_json(inputs).encode()).hexdigest()
