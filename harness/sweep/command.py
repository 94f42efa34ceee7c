"""``mqbench sweep``: latency and memory over sizes of the input. Heavy imports wait until a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mqbench.harness.store import DEFAULT_OUT

if TYPE_CHECKING:
    from rich.console import Console

    from mqbench.harness.record import Record
    from mqbench.harness.store import RecordStore
    from mqbench.harness.sweep.measure import Settings
    from mqbench.harness.sweep.run import Job

EXIT_BROKEN, EXIT_INTERRUPTED = 1, 130
PIPE_WIDTH = 200

sweep = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure latency and memory of a whole model on a GPU, system beside system.\n\n"
    "Defaults are the paper's protocol on Qwen2-VL-7B with random weights, which times do not depend on. "
    "Start with [bold]mqbench sweep latency[/], then [bold]mqbench table 17[/].",
)

Device = Annotated[
    str,
    typer.Option(help="cuda, cuda:N, or several over which the LLM is spread: cuda:0,cuda:1. cpu: a check, no speed."),
]
Out = Annotated[Path, typer.Option(help="Folder of sweeps.jsonl; a later run with the same folder resumes.")]
Systems = Annotated[
    str | None, typer.Option(help="Comma-separated, the baseline first; by default those of results/specs/sweeps.toml.")
]
Model = Annotated[
    str | None,
    typer.Option(help="qwen2-vl-2b, -7b, -72b or standin-qwen2-vl; by default 7b, and the stand-in on a CPU."),
]
Config = Annotated[Path | None, typer.Option(help="A config.json of another Qwen2-VL, in place of --model.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Entry of the configuration: text_config.num_hidden_layers=2.")
]
MaxPixels = Annotated[int | None, typer.Option(help="Largest area of an image in pixels, in place of the model's.")]
Repeats = Annotated[int | None, typer.Option(help="Timed passes of each system.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, tokens and pixels.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the points, measure nothing.")]
ImagePx = Annotated[str | None, typer.Option(help="Sides of the square images in pixels, comma-separated.")]
Images = Annotated[str | None, typer.Option(help="Images per row.")]
TextTokens = Annotated[str | None, typer.Option(help="Text tokens of the first row, markers of images included.")]
TextBefore = Annotated[str | None, typer.Option(help="Of these, before the first image.")]
TextStep = Annotated[str | None, typer.Option(help="Text tokens that each further row has more.")]
Batch = Annotated[str | None, typer.Option(help="Rows, comma-separated.")]
Turns = Annotated[str | None, typer.Option(help="Turns of the conversation, comma-separated.")]
DecodeTokens = Annotated[str | None, typer.Option(help="Tokens decoded behind each prefill.")]


@sweep.command("latency")
def latency(
    image_px: ImagePx = None,
    images: Images = None,
    text_tokens: TextTokens = None,
    text_before: TextBefore = None,
    decode_tokens: DecodeTokens = None,
    batch: Batch = None,
    systems: Systems = None,
    repeats: Repeats = None,
    model: Model = None,
    config: Config = None,
    settings: Set = None,
    max_pixels: MaxPixels = None,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Out = DEFAULT_OUT,
    dry_run: DryRun = False,
) -> None:
    """Prefill (time to first token) and decoding by resolution: Tables 11, 12 and 17.

    Every system is built in packed form with random weights, warmed up and timed in turns with the others, with raw
    samples, time by part and the limit that the device's measured peaks set. One record per point goes to
    OUT/sweeps.jsonl; stopped at any moment, the same command goes on with what is missing. Out of memory is an outcome.
    Exit code 1: a point or a system failed; 2: a wrong request, nothing ran.

    Examples:

      mqbench sweep latency --out results/records

      mqbench sweep latency --image-px 840,2240 --systems bf16-eager,bf16-graph,mquant-w4a8

      mqbench sweep latency --model qwen2-vl-72b --device cuda:0,cuda:1

      mqbench sweep latency --device cpu
    """
    _run("latency", locals())


@sweep.command("memory")
def memory(
    image_px: ImagePx = None,
    images: Images = None,
    text_tokens: TextTokens = None,
    text_before: TextBefore = None,
    decode_tokens: DecodeTokens = None,
    batch: Batch = None,
    systems: Systems = None,
    repeats: Repeats = None,
    model: Model = None,
    config: Config = None,
    settings: Set = None,
    max_pixels: MaxPixels = None,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Out = DEFAULT_OUT,
    dry_run: DryRun = False,
) -> None:
    """Peak memory by resolution, each system alone on the device: Tables 11 and 17.

    The allocator's peak and the device's; of the first, weights, KV cache, workspace and activations apart; and the
    peak while the model is built. Records, resuming and exit codes are those of 'mqbench sweep latency'.

    Examples:

      mqbench sweep memory --out results/records

      mqbench sweep memory --image-px 840 --systems bf16-eager,mquant-w4a8

      mqbench sweep memory --device cpu
    """
    _run("memory", locals())


@sweep.command("batch")
def batches(
    batch: Batch = None,
    image_px: ImagePx = None,
    images: Images = None,
    text_tokens: TextTokens = None,
    text_before: TextBefore = None,
    text_step: TextStep = None,
    decode_tokens: DecodeTokens = None,
    systems: Systems = None,
    repeats: Repeats = None,
    model: Model = None,
    config: Config = None,
    settings: Set = None,
    max_pixels: MaxPixels = None,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Out = DEFAULT_OUT,
    dry_run: DryRun = False,
) -> None:
    """Prefill and 512 decoded tokens of batches of 1 to 4: Table 13.

    Each row has 50 text tokens more than the row before it, and is padded on the left. Records, resuming and exit codes
    are those of 'mqbench sweep latency'.

    Examples:

      mqbench sweep batch --out results/records

      mqbench sweep batch --batch 1,8 --image-px 1120 --text-step 0 --decode-tokens 128

      mqbench sweep batch --device cpu
    """
    _run("batch", locals())


@sweep.command("turns")
def conversation(
    turns: Turns = None,
    image_px: ImagePx = None,
    images: Images = None,
    text_tokens: TextTokens = None,
    text_before: TextBefore = None,
    decode_tokens: DecodeTokens = None,
    systems: Systems = None,
    repeats: Repeats = None,
    model: Model = None,
    config: Config = None,
    settings: Set = None,
    max_pixels: MaxPixels = None,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Out = DEFAULT_OUT,
    dry_run: DryRun = False,
) -> None:
    """Conversations of 1 to 3 turns over one growing KV cache: Table 14.

    A turn is an image, text and 512 decoded tokens. Records, resuming and exit codes are those of 'mqbench sweep
    latency'.

    Examples:

      mqbench sweep turns --out results/records

      mqbench sweep turns --turns 5 --image-px 560

      mqbench sweep turns --device cpu
    """
    _run("turns", locals())


@sweep.command("attention")
def attention(
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, comma-separated.")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads of Q, K and V.")] = None,
    head_dim: Annotated[str | None, typer.Option(help="Width of a head.")] = None,
    systems: Systems = None,
    repeats: Repeats = None,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Out = DEFAULT_OUT,
    dry_run: DryRun = False,
) -> None:
    """AIFS attention beside causal attention over the same tokens: Table 9.

    Every kernel is checked against float64 before and after it is timed. Records, resuming and exit codes are those of
    'mqbench sweep latency'.

    Examples:

      mqbench sweep attention --out results/records

      mqbench sweep attention --tokens 900,16399 --systems causal,aifs

      mqbench sweep attention --device cpu
    """
    _run("attention", locals())


@sweep.command("linears")
def linears(
    image_px: ImagePx = None,
    images: Images = None,
    text_tokens: TextTokens = None,
    text_before: TextBefore = None,
    batch: Batch = None,
    systems: Systems = None,
    repeats: Repeats = None,
    model: Model = None,
    config: Config = None,
    settings: Set = None,
    max_pixels: MaxPixels = None,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Out = DEFAULT_OUT,
    dry_run: DryRun = False,
) -> None:
    """Linear layers during prefill, with what stands between them: Table 10 and Figure 7.

    Kernel times of an instrumented pass: matrix products with norms, activation functions and quantization, without
    attention, embeddings and launch gaps. Records, resuming and exit codes are those of 'mqbench sweep latency'.

    Examples:

      mqbench sweep linears --out results/records

      mqbench sweep linears --image-px 840 --systems bf16-eager,w4a8-token,mquant-w4a8

      mqbench sweep linears --device cpu
    """
    _run("linears", locals())


@sweep.command("quantize")
def quantize(
    samples: Annotated[str | None, typer.Option(help="Calibration samples.")] = None,
    image_px: ImagePx = None,
    text_tokens: TextTokens = None,
    text_before: TextBefore = None,
    bits: Annotated[str | None, typer.Option(help="VISION/LLM setting.")] = None,
    systems: Annotated[str | None, typer.Option(help="Methods, comma-separated; by default mquant.")] = None,
    repeats: Repeats = None,
    model: Model = None,
    config: Config = None,
    settings: Set = None,
    max_pixels: MaxPixels = None,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Out = DEFAULT_OUT,
    dry_run: DryRun = False,
) -> None:
    """How long GPTQ with rotation takes from end to end, on random weights and 256 random samples.

    Records, resuming and exit codes are those of 'mqbench sweep latency'.

    Examples:

      mqbench sweep quantize --out results/records

      mqbench sweep quantize --samples 128 --systems gptq,mquant

      mqbench sweep quantize --device cpu
    """
    _run("quantize", locals())


NO_SIZES = frozenset(
    {"systems", "repeats", "model", "config", "settings", "max_pixels", "seed", "device", "out", "dry_run"}
)
"""Options that are no sizes of the input."""


def _run(name: str, options: dict[str, Any]) -> None:
    """The body of all commands; what is no common option is a size."""
    from rich.console import Console

    from mqbench.harness.sweep.request import SweepRequest, resolve
    from mqbench.harness.sweep.run import jobs_of, missing, store_in

    dry_run = options.pop("dry_run")
    sizes = {key: value for key, value in options.items() if key not in NO_SIZES and value is not None}
    common = {key: value for key, value in options.items() if key in NO_SIZES}
    if "settings" in common:
        common["settings"] = tuple(common["settings"] or ())
    points, settings = resolve(SweepRequest(name, sizes=sizes, **common))
    store, notes = store_in(options["out"]), Console(stderr=True)
    jobs = jobs_of(points, settings)
    waiting = missing(jobs, store)
    text = f"{len(jobs)} point(s) on {jobs[0].cell.device}: {len(jobs) - len(waiting)} done, {len(waiting)} to measure"
    notes.print(text, markup=False, highlight=False)
    if dry_run:
        _print_jobs(jobs, waiting)
        return
    store.prepare()
    new = _measure(waiting, settings, store, notes)
    _print_results(jobs, store, notes)
    if _complain(new, notes):
        raise typer.Exit(EXIT_BROKEN)


def _measure(jobs: Sequence[Job], settings: Settings, store: RecordStore, notes: Console) -> Sequence[Record]:
    from mqbench.harness.sweep.progress import PointProgress
    from mqbench.harness.sweep.run import run_jobs

    try:
        with PointProgress(len(jobs), notes) as view:
            return run_jobs(jobs, settings, store, view.finish)
    except KeyboardInterrupt:
        notes.print("stopped; measured points are stored, the same command goes on from here")
        raise SystemExit(EXIT_INTERRUPTED) from None


def _print_results(jobs: Sequence[Job], store: RecordStore, notes: Console) -> None:
    from rich.console import Console

    from mqbench.harness.sweep.progress import results_table

    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    console.print(results_table(jobs, store.latest()), markup=False)
    notes.print(f"records: {store.path}", markup=False, highlight=False, soft_wrap=True)


def _print_jobs(jobs: Sequence[Job], waiting: Sequence[Job]) -> None:
    from rich.console import Console
    from rich.table import Table

    table, to_do = Table("sweep", "model", "point", "systems", "passes", "state"), {job.cell.key for job in waiting}
    for job in jobs:
        state = "to measure" if job.cell.key in to_do else "done"
        systems = str(len(job.point.systems))
        table.add_row(job.point.sweep, job.cell.model, job.point.work.label, systems, str(job.point.repeats), state)
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table, markup=False)


def _complain(records: Sequence[Record], notes: Console) -> bool:
    """Names what went wrong; True when something did."""
    from mqbench.harness.sweep.progress import complaints

    lines = complaints(records)
    for line in lines:
        notes.print(line, markup=False, highlight=False, soft_wrap=True)
    return bool(lines)
