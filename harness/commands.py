"""What the commands of ``cli`` do, once their options are read."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mqbench.harness.environment import ROOT
from mqbench.harness.errors import RequestError
from mqbench.harness.estimate import estimate_s, num_workers
from mqbench.harness.listing import PIPE_WIDTH
from mqbench.harness.plan import Plan, expand, expand_all
from mqbench.harness.progress import ProgressView, duration_text
from mqbench.harness.ranks import join_ranks
from mqbench.harness.record import Record
from mqbench.harness.request import Request
from mqbench.harness.run import Outcome, run_plan
from mqbench.harness.store import RecordStore
from mqbench.harness.table import load_spec, render, without_choice
from mqbench.harness.tasks import TaskKind, task_info

EXIT_INTERRUPTED = 130
MAIN_TABLE = 3
SHIPPED_RECORDS = ROOT / "results" / "records"


def run_eval(request: Request, *, as_json: bool, dry_run: bool) -> bool:
    """Plans, runs, prints; True when no cell failed.

    Raises:
        MQBenchError: the request is wrong.
    """
    return _run_and_print(expand(request), as_json=as_json, dry_run=dry_run)


def run_plan_file(path: Path, base: Request, *, as_json: bool, dry_run: bool) -> bool:
    """Runs a plan file; True when no cell failed.

    Raises:
        MQBenchError: the plan is wrong.
    """
    from mqbench.harness.planfile import read_plan_file

    file = read_plan_file(path, base)
    plan = expand_all(file.requests) if file.requests else None
    if file.blueprints and not dry_run:
        from mqbench.harness.blueprint_records import run_blueprints

        store = RecordStore(base.out)
        store.prepare()
        for run in file.blueprints:
            run_blueprints(store, run.models, run.tasks)
    if plan is None:
        return True
    fine = _run_and_print(plan, as_json=as_json, dry_run=dry_run, table=False)
    Console(stderr=True).print(f"render them: mqbench table all --out {base.out}", markup=False, highlight=False)
    return fine


def run_quantize(request: Request, folder: Path) -> None:
    """Quantizes one model into a folder and says what came out.

    Raises:
        MQBenchError: the request is wrong.
    """
    from mqbench.harness.export import export

    if "," in request.bits[0]:
        raise RequestError("--bits takes one setting here, for example w4a8/w4a8")
    notes = Console(stderr=True)
    done = export(request, folder, lambda text: notes.print(text, markup=False, highlight=False))
    quantized = sum(layer.weight_num_bits is not None for layer in done.report.layers.values())
    split = sum(layer.rms_split for layer in done.report.layers.values())
    print(f"{quantized} linears quantized ({split} with RMS) in {sum(done.report.step_s.values()):.1f} s: {folder}")
    print(f"evaluate it: mqbench eval --models {folder}")


def print_plan(plan: Plan, as_json: bool) -> None:
    """The cells of a plan, those done and those to run."""
    to_run = {cell.key for group in plan.groups for cell in group.cells}
    if as_json:
        cells = [{"key": cell.key, "run": cell.key in to_run, "cell": cell.to_json()} for cell in plan.cells]
        print(json.dumps(cells, indent=1))
        return
    table = Table("model", "bits", "method", "task", "rows", "state")
    for cell in plan.cells:
        state = "to run" if cell.key in to_run else "done"
        rows = str(plan.num_rows[cell.key])
        table.add_row(cell.model, cell.recipe.bits, cell.recipe.label, cell.task, rows, state)
    Console().print(table)


def terminal_width() -> int:
    """Columns of the terminal; wide when the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH


def _print_overview(plan: Plan, notes: Console) -> None:
    for name, how_to_get in plan.missing.items():
        notes.print(f"left out {name}: {how_to_get}", markup=False, highlight=False, soft_wrap=True)
    done = len(plan.cells) - plan.num_to_run
    workers = num_workers(plan)
    seconds = estimate_s(plan, workers, RecordStore(SHIPPED_RECORDS).load())
    time = "no earlier run to estimate from" if seconds is None else f"about {duration_text(seconds)}"
    rest = f"; {workers} worker(s), {time}" if plan.num_to_run else ""
    text = f"{len(plan.cells)} cells: {done} done, {plan.num_to_run} to run{rest}"
    notes.print(text, markup=False, highlight=False, soft_wrap=True)


def _run_and_print(plan: Plan, *, as_json: bool, dry_run: bool, table: bool = True) -> bool:
    leads = join_ranks().leads
    notes = Console(stderr=True, quiet=not leads)
    _print_overview(plan, notes)
    if dry_run:
        print_plan(plan, as_json)
        return True
    outcome = _run(plan, notes)
    if leads and (table or as_json):
        _print_results(plan, as_json)
    _print_failures(outcome, plan.request, notes)
    notes.print(f"records: {RecordStore(plan.request.out).path}", markup=False, highlight=False, soft_wrap=True)
    return not outcome.failed


def _run(plan: Plan, notes: Console) -> Outcome:
    try:
        with ProgressView(plan, notes) as view:
            return run_plan(plan, view)
    except KeyboardInterrupt:
        notes.print("stopped; finished cells are stored, the same command goes on from here")
        raise SystemExit(EXIT_INTERRUPTED) from None


def _print_results(plan: Plan, as_json: bool) -> None:
    """Table 3 of the benchmarks, and a list of everything else that was measured."""
    records = _records_of(plan)
    if as_json:
        print(json.dumps([record.to_json() for record in records], indent=1, ensure_ascii=False))
        return
    ok = [record for record in records if record.ok]
    others = [record for record in ok if task_info(record.cell.task).kind is not TaskKind.BENCHMARK]
    if len(others) < len(ok):
        sys.stdout.write(render(ok, without_choice(load_spec(MAIN_TABLE)), width=terminal_width()))
    if others:
        Console(width=terminal_width()).print(score_table(others), markup=False)


def score_table(records: Sequence[Record]) -> Table:
    """One line per record, with what its score counts."""
    table = Table("model", "bits", "method", "task", "score", "unit")
    for record in records:
        cell, info = record.cell, task_info(record.cell.task)
        table.add_row(cell.model, cell.recipe.bits, cell.recipe.label, info.title, f"{record.score:.4g}", info.unit)
    return table


def _records_of(plan: Plan) -> list[Record]:
    latest = RecordStore(plan.request.out).latest()
    return [latest[cell.key] for cell in plan.cells if cell.key in latest]


def _print_failures(outcome: Outcome, request: Request, notes: Console) -> None:
    if not outcome.failed:
        return
    notes.print(f"{len(outcome.failed)} cell(s) failed; tracebacks: {request.out / 'failures'}", markup=False)
    for cell in outcome.failed:
        notes.print(f"  {cell.label}: {cell.reason}", markup=False, highlight=False, soft_wrap=True)
