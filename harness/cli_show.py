"""``mqbench table``, ``figure``, ``paper``, ``models``, ``methods`` and ``tasks``: what is known already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mqbench.harness.cli_options import EXIT_FAILED_CELLS, DataDir, ModelsDir

paper = typer.Typer(no_args_is_help=True, help="The paper's own numbers: do they follow from each other?")
models_group = typer.Typer(invoke_without_command=True)

RecordsDir = Annotated[
    Path | None, typer.Option(help="Folder of records.jsonl; by default runs, and the shipped records for all.")
]
Where = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE, repeatable: use only records with this setting; or NAME=any.")
]
Render = Annotated[
    Path | None, typer.Option(help="Folder for the files; by default 'rendered' beside the records' folder.")
]


def table(
    number: Annotated[str, typer.Argument(help="Number of the paper's table, or all.")],
    style: Annotated[str, typer.Option("--format", help="terminal, md, tex or csv.")] = "terminal",
    out: RecordsDir = None,
    where: Where = None,
    render: Render = None,
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


def figure(
    number: Annotated[str, typer.Argument(help="Number of the paper's figure, latency, memory, or all.")],
    style: Annotated[
        str | None, typer.Option("--format", help="png, svg or pdf; by default png and svg. csv prints the data.")
    ] = None,
    out: RecordsDir = None,
    where: Where = None,
    render: Render = None,
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


def tasks(data_dir: DataDir = None) -> None:
    """List the known benchmarks: ready, or what to do."""
    from mqbench.harness.listing import list_tasks

    list_tasks(data_dir)
