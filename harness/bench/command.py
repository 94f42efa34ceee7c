"""``mqbench bench``: measures the kernels, and renders what was measured. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mqbench.harness.errors import RequestError
from mqbench.harness.store import DEFAULT_OUT, prepare_folder

if TYPE_CHECKING:
    from rich.console import Console

    from mqbench.harness.bench.run import Job
    from mqbench.harness.bench.spec import Profile
    from mqbench.harness.record import Record
    from mqbench.harness.store import RecordStore

EXIT_BROKEN, EXIT_INTERRUPTED = 1, 130
ALL = "all"
DEVICE = re.compile(r"cuda(:\d+)?")
MARKDOWN, DATA = "kernels.md", "kernels.csv"

bench = typer.Typer(no_args_is_help=True, help="Measure the speed of the kernels on a GPU.")

Render = Annotated[
    Path | None, typer.Option(help="Folder for the report; by default 'rendered' beside the records' folder.")
]


@bench.command("kernels")
def kernels(
    device: Annotated[str, typer.Option(help="cuda or cuda:N; cpu: a functional check on tiny shapes.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Folder of kernels.jsonl; a later run goes on there.")] = DEFAULT_OUT,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few samples: a look in some minutes.")] = False,
    tasks: Annotated[
        str, typer.Option(help="all, or some of: kernel_linear, kernel_hadamard, kernel_fusion, kernel_attention.")
    ] = ALL,
    render: Render = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases, measure nothing.")] = False,
) -> None:
    """Check and time every kernel at Qwen2-VL-7B's shapes, beside BF16 and what others offer.

    One record per case goes to OUT/kernels.jsonl as soon as it is measured; stopped at any moment, the same command
    goes on with what is missing. Peaks of the device are measured first. Results go to kernels.md, kernels.csv and a
    figure.
    Exit code 1: a case failed, or a kernel of ours failed its check; 2: a wrong request, nothing ran.

    Examples:

      mqbench bench kernels --device cuda --out results/records

      mqbench bench kernels --quick

      mqbench bench kernels --device cpu
    """
    from rich.console import Console

    from mqbench.harness.bench.run import jobs_of, missing, store_in

    chosen = _profile(device, quick, tasks)
    kind = _kind_of(device, dry_run)
    jobs, store, notes = jobs_of(chosen, kind), store_in(out), Console(stderr=True)
    waiting = missing(jobs, store)
    text = f"{len(jobs)} cases on {kind}: {len(jobs) - len(waiting)} done, {len(waiting)} to measure"
    notes.print(text, markup=False, highlight=False)
    if dry_run:
        _print_jobs(jobs, waiting)
        return
    store.prepare()
    new = _measure(waiting, chosen, device, store, notes)
    _print_results(store, jobs, render or out.parent / "rendered")
    if _complain(new, notes):
        raise typer.Exit(EXIT_BROKEN)


@bench.command("report")
def report(
    out: Annotated[Path | None, typer.Option(help="Folder of kernels.jsonl; by default the shipped records.")] = None,
    render: Render = None,
) -> None:
    """Render kernels.md, kernels.csv and the figure from records; nothing is measured.

    Examples:

      mqbench bench report --out results/records
    """
    from mqbench.harness.bench.run import store_in
    from mqbench.harness.table_commands import SHIPPED

    folder = out or SHIPPED
    target = render or folder.parent / "rendered"
    files = write_report(store_in(folder).load(), target)
    print(f"{len(files)} files: {target}")


def write_report(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes everything that is rendered; records of a CPU are left out.

    Raises:
        OutputError: the folder cannot be written.
    """
    from mqbench.harness.bench.figure import write_figure
    from mqbench.harness.bench.render import to_csv, to_markdown
    from mqbench.harness.bench.report import reports

    found = reports(records)
    prepare_folder(folder)
    (folder / MARKDOWN).write_text(to_markdown(found), encoding="utf-8")
    (folder / DATA).write_text(to_csv(found), encoding="utf-8")
    return [folder / MARKDOWN, folder / DATA, *write_figure(found, folder)]


def _profile(device: str, quick: bool, tasks: str) -> Profile:
    from mqbench.harness.bench.spec import CHECK, FULL, QUICK, TASKS, profile

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    wanted = tuple(TASKS) if names == (ALL,) else names
    return profile(CHECK if device == "cpu" else QUICK if quick else FULL, wanted)


def _kind_of(device: str, dry_run: bool) -> str:
    """``cpu`` or the GPU's name; cases can be listed without a GPU.

    Raises:
        RequestError: nothing can be measured on it.
    """
    if device == "cpu":
        return device
    if not DEVICE.fullmatch(device):
        raise RequestError(f"unknown device '{device}'; give cuda, cuda:N or cpu")
    import torch

    from mqbench.harness import environment

    if (torch.device(device).index or 0) < torch.cuda.device_count():
        _check_interpreter()
        return environment.device_kind(device)
    if dry_run:
        return "a GPU, which is not here"
    raise RequestError(f"no NVIDIA GPU for '{device}'; speed needs one, '--device cpu' only checks that all runs")


def _check_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RequestError("TRITON_INTERPRET=1 interprets kernels on the CPU; unset it to measure them")


def _measure(jobs: Sequence[Job], chosen: Profile, device: str, store: RecordStore, notes: Console) -> Sequence[Record]:
    from mqbench.harness.bench.progress import CaseProgress
    from mqbench.harness.bench.run import run_jobs
    from mqbench.harness.bench.worker import Settings

    try:
        with CaseProgress(len(jobs), notes, timed=device != "cpu") as view:
            return run_jobs(jobs, Settings(device, chosen.rounds, chosen.sample_ms), store, view.finish)
    except KeyboardInterrupt:
        notes.print("stopped; measured cases are stored, the same command goes on from here")
        raise SystemExit(EXIT_INTERRUPTED) from None


def _print_results(store: RecordStore, jobs: Sequence[Job], folder: Path) -> None:
    """Verdicts and files of a GPU; of a CPU only who passed the checks."""
    from rich.console import Console

    from mqbench.harness.bench.render import checks_table, targets_table
    from mqbench.harness.bench.report import entries_of, reports

    console = Console() if sys.stdout.isatty() else Console(width=200)
    latest = store.latest()
    device, keys = jobs[0].cell.device, [job.cell.key for job in jobs]
    if device == "cpu":
        known = [latest[key] for key in keys if key in latest and latest[key].ok]
        console.print(checks_table(entry for record in known for entry in entries_of(record)))
        return
    records = store.load()
    for one in reports(records):
        if one.device == device:
            console.print(targets_table(one))
    files = write_report(records, folder)
    print(f"{len(files)} files: {folder}")


def _print_jobs(jobs: Sequence[Job], waiting: Sequence[Job]) -> None:
    from rich.console import Console
    from rich.table import Table

    table, to_do = Table("task", "case", "rows", "state"), {job.cell.key for job in waiting}
    for job in jobs:
        state = "to measure" if job.cell.key in to_do else "done"
        table.add_row(job.case.task, job.case.name, str(job.case.rows), state)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _complain(records: Sequence[Record], notes: Console) -> bool:
    """Names what went wrong; True when something did."""
    from mqbench.harness.bench.report import broken

    lines = [f"{record.cell.label}: {text}" for record in records for text in broken(record)]
    for line in lines:
        notes.print(line, markup=False, highlight=False, soft_wrap=True)
    return bool(lines)
