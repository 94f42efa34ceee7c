"""The command line. Heavy libraries are imported by the commands that need them, so that ``--help`` is instant."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from mqbench.harness.bench.command import bench
from mqbench.harness.cli_run import evaluate, quantize, run
from mqbench.harness.cli_show import figure, methods, models_group, paper, table, tasks
from mqbench.harness.errors import MQBenchError, RequestError
from mqbench.harness.gate_command import gate
from mqbench.harness.store import DamagedLineWarning
from mqbench.harness.sweep.command import sweep

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

app.command("eval")(evaluate)
for command in (run, gate, table, figure, methods, tasks, quantize):
    app.command()(command)
for name, group in (("paper", paper), ("models", models_group), ("bench", bench), ("sweep", sweep)):
    app.add_typer(group, name=name)


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


def _exit_code(code: Any) -> int:
    return code if isinstance(code, int) else 0 if code is None else EXIT_BAD_REQUEST


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
