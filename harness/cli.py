"""The command line. Heavy libraries are imported by the commands that need them, so that ``--help`` is instant."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mqbench.harness.bench.command import bench
from mqbench.harness.errors import MQBenchError, RequestError
from mqbench.harness.gate_command import gate
from mqbench.harness.store import DEFAULT_OUT, DamagedLineWarning
from mqbench.harness.sweep.command import sweep

EXIT_FAILED_CELLS = 1
EXIT_BAD_REQUEST = 2
STANDIN_COMMANDS = "mqbench.harness.models.standin.commands"
TEXT_STANDIN_COMMANDS = "mqbench.harness.models.standin_text.commands"
BUILDER_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="mqbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize multimodal LLMs and measure what it costs.\n\n"
    "Start with [bold]mqbench eval[/]: it prints the MQuant paper's Table 3 for every model that is ready.",
)

paper = typer.Typer(no_args_is_help=True, help="The paper's own numbers: do they follow from each other?")
app.add_typer(paper, name="paper")
models_group = typer.Typer(invoke_without_command=True)
app.add_typer(models_group, name="models")
app.add_typer(bench, name="bench")
app.add_typer(sweep, name="sweep")
app.command()(gate)

ModelsDir = Annotated[
    Path | None, typer.Option(help="Folder with real weights, one folder per model name (see 'mqbench models').")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with VLMEvalKit's TSV files, in place of the shipped mini benchmarks.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda (every GPU) or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16, float16 or float64; auto: float32 on cpu, bfloat16 on cuda.")
]
Backend = Annotated[
    str, typer.Option(help="simulated, or integer: int8 and packed 4-bit weights, integer matrix products.")
]
Seed = Annotated[int, typer.Option(help="Seed of the calibration draw and of rotations.")]
CalibSamples = Annotated[int, typer.Option(help="Calibration samples.")]
CalibSplit = Annotated[str, typer.Option(help="Calibration data: 'mixed', or one benchmark's name.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per forward pass.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE or METHOD.KEY=VALUE, repeatable; see 'mqbench methods --options METHOD'."),
]
Jobs = Annotated[int | None, typer.Option(help="Worker processes; by default one per core, or per GPU.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let models that need it run Python code from their own files."),
]
Executor = Annotated[
    str,
    typer.Option(help="local: worker processes; ray: the cluster of RAY_ADDRESS. Under torchrun, ranks share rows."),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep transformer blocks in host memory; one at a time comes to the GPU."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the records as JSON instead of a table.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cells and estimates, run nothing.")]
Out = Annotated[Path, typer.Option(help="Folder of records.jsonl; a later run with the same folder resumes.")]


@app.command("eval")
def evaluate(
    models: Annotated[
        str, typer.Option(help="Names, folders written by 'mqbench quantize', or all (every model with weights).")
    ] = "all",
    methods: Annotated[
        str, typer.Option(help="Comma-separated, see 'mqbench methods'. The float baseline always runs.")
    ] = "rtn,smoothquant,quarot,mquant",
    tasks: Annotated[str, typer.Option(help="Comma-separated, or all; see 'mqbench tasks'.")] = "all",
    bits: Annotated[
        str, typer.Option(help="VISION/LLM settings, comma-separated: w8a8/w4a8, w4a4, float/w4a16-g128 (16: float).")
    ] = "w8a8/w4a8,w4a8/w4a8",
    options: Options = None,
    limit: Annotated[int | None, typer.Option(help="Rows per benchmark at most, for a quick look.")] = None,
    seed: Seed = 0,
    calib_samples: CalibSamples = 256,
    calib_split: CalibSplit = "mixed",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    backend: Backend = "simulated",
    out: Out = DEFAULT_OUT,
    data_dir: DataDir = None,
    models_dir: ModelsDir = None,
    jobs: Jobs = None,
    batch_size: BatchSize = 16,
    executor: Executor = "local",
    offload: Offload = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Run every model x method x bits x benchmark, then print Table 3.

    One record per cell goes to OUT/records.jsonl as soon as it is done.
    Cells with an ok record of the very same settings are not run again.
    Exit code 1: some cells failed; 2: a wrong request, nothing ran.

    Examples:

      mqbench eval

      mqbench eval --methods mquant --bits w4a8 --limit 20

      mqbench eval --methods quarot,mquant --set activations=token --set mquant.rms=false

      mqbench eval --models qwen2-vl-7b --models-dir /data --device cuda
    """
    from mqbench.harness.commands import run_eval
    from mqbench.harness.request import Request, parse_options

    request = Request(
        models=_names(models, "--models"),
        methods=_names(methods, "--methods"),
        tasks=_names(tasks, "--tasks"),
        bits=_names(bits, "--bits"),
        options=parse_options(options or []),
        limit=limit,
        seed=seed,
        calib_samples=calib_samples,
        calib_split=calib_split,
        device=device,
        dtype=dtype,
        backend=backend,
        out=out,
        data_dir=data_dir,
        models_dir=models_dir,
        jobs=jobs,
        batch_size=batch_size,
        executor=executor,
        offload=offload,
        trust_remote_code=trust_remote_code,
    )
    if not run_eval(request, as_json=as_json, dry_run=dry_run):
        raise typer.Exit(EXIT_FAILED_CELLS)


@app.command("run")
def run(
    plan: Annotated[Path, typer.Option(help="TOML file of [[run]] entries, for example results/plans/paper.toml.")],
    device: Device = "cpu",
    dtype: Dtype = "auto",
    out: Out = DEFAULT_OUT,
    data_dir: DataDir = None,
    models_dir: ModelsDir = None,
    jobs: Jobs = None,
    batch_size: BatchSize = 16,
    executor: Executor = "local",
    offload: Offload = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Run every cell of a plan file; cells that several runs share are computed once.

    Stopped at any moment, the same command goes on with what is missing.
    Exit code 1: some cells failed; 2: a wrong plan, nothing ran.

    Examples:

      mqbench run --plan results/plans/paper.toml --dry-run

      mqbench run --plan results/plans/paper.toml --out results/records
    """
    from mqbench.harness.commands import run_plan_file
    from mqbench.harness.request import Request

    base = Request(
        device=device,
        dtype=dtype,
        out=out,
        data_dir=data_dir,
        models_dir=models_dir,
        jobs=jobs,
        batch_size=batch_size,
        executor=executor,
        offload=offload,
        trust_remote_code=trust_remote_code,
    )
    if not run_plan_file(plan, base, as_json=as_json, dry_run=dry_run):
        raise typer.Exit(EXIT_FAILED_CELLS)


@app.command()
def table(
    number: Annotated[str, typer.Argument(help="Number of the paper's table, or all.")],
    style: Annotated[str, typer.Option("--format", help="terminal, md, tex or csv.")] = "terminal",
    out: Annotated[
        Path | None, typer.Option(help="Folder of records.jsonl; by default runs, and the shipped records for all.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, repeatable: use only records with this setting; or NAME=any.")
    ] = None,
    render: Annotated[
        Path | None, typer.Option(help="Folder for all tables; by default 'rendered' beside the records' folder.")
    ] = None,
) -> None:
    """Print a table from stored records, or render all of them as files; no model runs.

    Examples:

      mqbench table 3

      mqbench table 3 --format tex --out results/records

      mqbench table 3 --where limit=none --where recipe.seed=0

      mqbench table all --render tables
    """
    from mqbench.harness.commands import terminal_width
    from mqbench.harness.table_commands import run_table

    run_table(number, style, out, where or [], render, terminal_width())


@app.command()
def figure(
    number: Annotated[str, typer.Argument(help="Number of the paper's figure, latency, memory, or all.")],
    style: Annotated[
        str | None, typer.Option("--format", help="png, svg or pdf; by default png and svg. csv prints the data.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of records.jsonl; by default runs, and the shipped records for all.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, repeatable: use only records with this setting; or NAME=any.")
    ] = None,
    render: Annotated[
        Path | None, typer.Option(help="Folder for the files; by default 'rendered' beside the records' folder.")
    ] = None,
) -> None:
    """Draw a figure from stored records, with its data (csv) and caption (txt); no model runs.

    Examples:

      mqbench figure 6 --out results/records --render figures

      mqbench figure 1 --format pdf

      mqbench figure latency --out results/records

      mqbench figure all
    """
    from mqbench.harness.figure_commands import run_figure

    run_figure(number, style, out, where or [], render)


@paper.command("check")
def check(
    style: Annotated[str, typer.Option("--format", help="terminal, md, tex or csv.")] = "terminal",
    everything: Annotated[bool, typer.Option("--all", help="Also the numbers that follow.")] = False,
) -> None:
    """List the paper's derived numbers that do not follow from the numbers beside them.

    What must follow from what stands in results/paper/rules.toml (columns) and claims.csv (text).
    """
    from mqbench.harness.commands import terminal_width
    from mqbench.harness.table_commands import run_paper_check

    run_paper_check(style, everything, terminal_width())


@models_group.callback()
def models(
    context: typer.Context,
    models_dir: ModelsDir = None,
    size: Annotated[bool, typer.Option("--size", help="Parameters and FLOPs of the paper's models instead.")] = False,
) -> None:
    """List the known models: ready, or how to get their weights; or the size of the paper's models, per part.

    Examples:

      mqbench models

      mqbench models --size

      mqbench models check qwen2-vl-7b
    """
    if context.invoked_subcommand is not None:
        return None
    if size:
        from mqbench.harness.blueprint_records import list_sizes

        return list_sizes()
    from mqbench.harness.listing import list_models

    list_models(models_dir)


@models_group.command("check")
def check_models(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A registered model, a family, or all: every family.")],
    models_dir: ModelsDir = None,
    every: Annotated[bool, typer.Option("--every", help="One line per proof, also for those that hold.")] = False,
) -> None:
    """Prove that a model's layout, all that a method knows of a model, says the truth; needs no weights.

    names, shapes: every linear is quantized or a written exception, all widths of the released sizes fit.

    files: so does the model of the config.json that is on this machine.

    exact: each method's transforms leave the float64 outputs of a tiny random model as they are.

    runs: each method at each bit setting quantizes it, and outputs are finite.

    Exit code 1: a proof fails, and the table says what is wrong; 2: no such model or family.

    Examples:

      mqbench models check qwen2-vl-7b

      mqbench models check llava --every

      mqbench models check all
    """
    from mqbench.harness.models.check_command import run_checks

    assert context.parent is not None
    if not run_checks(name, models_dir or context.parent.params["models_dir"], every):
        raise typer.Exit(EXIT_FAILED_CELLS)


@app.command()
def methods(
    options: Annotated[str | None, typer.Option(help="Name of a method: list the options of its recipes.")] = None,
) -> None:
    """List the known quantization methods and their other names, or one method's options.

    Examples:

      mqbench methods

      mqbench methods --options mquant
    """
    from mqbench.harness.listing import list_methods, list_options

    list_methods() if options is None else list_options(options)


@app.command()
def tasks(data_dir: DataDir = None) -> None:
    """List the known benchmarks: ready, or what to do."""
    from mqbench.harness.listing import list_tasks

    list_tasks(data_dir)


@app.command()
def quantize(
    model: Annotated[str, typer.Option(help="Name of the model, see 'mqbench models'.")],
    method: Annotated[str, typer.Option(help="Name of the method, see 'mqbench methods'.")],
    out: Annotated[Path, typer.Option(help="New folder for the quantized model.")],
    bits: Annotated[str, typer.Option(help="VISION/LLM setting.")] = "w4a8/w4a8",
    options: Options = None,
    seed: Seed = 0,
    calib_samples: CalibSamples = 256,
    calib_split: CalibSplit = "mixed",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    data_dir: DataDir = None,
    models_dir: ModelsDir = None,
    batch_size: BatchSize = 16,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize one model and save it; 'mqbench eval --models DIR' takes the folder.

    Examples:

      mqbench quantize --model standin-qwen2-vl --method mquant --out quantized

      mqbench eval --models quantized
    """
    from mqbench.harness.commands import run_quantize
    from mqbench.harness.request import Request, parse_options

    request = Request(
        models=(model,),
        methods=(method,),
        bits=(bits,),
        options=parse_options(options or []),
        seed=seed,
        calib_samples=calib_samples,
        calib_split=calib_split,
        device=device,
        dtype=dtype,
        data_dir=data_dir,
        models_dir=models_dir,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    run_quantize(request, out)


@app.command("standin", add_help_option=False, context_settings=BUILDER_SETTINGS)
def standin(context: typer.Context) -> None:
    """Make the shipped stand-in again: train, harden, data, report (mqbench standin --help)."""
    _run_builder(STANDIN_COMMANDS, "standin", context.args)


@app.command("standin-text", add_help_option=False, context_settings=BUILDER_SETTINGS)
def standin_text(context: typer.Context) -> None:
    """Make the shipped text stand-in again: train, build, data (mqbench standin-text --help)."""
    _run_builder(TEXT_STANDIN_COMMANDS, "standin-text", context.args)


def _run_builder(module: str, name: str, arguments: Sequence[str]) -> None:
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise RequestError("this installation lacks the stand-in's builder; install mqbench from its repository")
    import_module(module).app(args=list(arguments), prog_name=f"mqbench {name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Returns:
        The exit code: 0 fine, 1 some cells failed, 2 a wrong request, 130 interrupted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", DamagedLineWarning)
        warnings.showwarning = _show_warning
        try:
            app(args=None if arguments is None else list(arguments), prog_name="mqbench")
        except MQBenchError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return EXIT_BAD_REQUEST
        except SystemExit as stop:
            return _exit_code(stop.code)
    return 0


def _names(text: str, option: str) -> tuple[str, ...]:
    """``"a, b"`` as a tuple.

    Raises:
        RequestError: it names nothing.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise RequestError(f"{option} names nothing; give at least one, separated by commas")
    return names


def _exit_code(code: Any) -> int:
    return code if isinstance(code, int) else 0 if code is None else EXIT_BAD_REQUEST


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
