"""``mqbench standin-text``: make the shipped text model and its corpus again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make the shipped text stand-in and its corpus again, from seeds.")
Out = Annotated[Path, typer.Option(help="Folder to write to.")]


@app.command()
def train(
    out: Out = Path("runs/standin-text"),
    seed: Annotated[int, typer.Option(help="Seed of initial weights and text.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps; about 0.5 s each on one CPU core.")] = 2400,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; use 1 when anything else runs.")] = 1,
) -> None:
    """Train from nothing, or resume the run in --out. Twenty minutes or so on one CPU core.

    Leaves checkpoint.pt, loss.csv and loss.png in --out. Then run `mqbench standin-text build`.
    """
    import torch

    from mqbench.harness.errors import MQBenchError
    from mqbench.harness.models.standin_text.curve import plot_loss
    from mqbench.harness.models.standin_text.train import TrainSettings
    from mqbench.harness.models.standin_text.train import train as run

    torch.set_num_threads(threads)
    try:
        trainer = run(TrainSettings(seed=seed, steps=steps), out)
    except ValueError as error:
        raise MQBenchError(str(error)) from error
    plot_loss(trainer.curve, out / "loss.png")
    typer.echo(f"trained model in {out}; next: mqbench standin-text build --run {out}")


@app.command()
def build(
    run: Annotated[Path, typer.Option(help="Folder of a finished `standin-text train`.")] = Path("runs/standin-text"),
    out: Out = Path("runs/standin-llama"),
    hard: Annotated[bool, typer.Option(help="Rescale so that it is hard to quantize (function-preserving).")] = True,
) -> None:
    """Harden a trained model and save it as a Hugging Face folder in float16."""
    from mqbench.harness.models.standin_text.build import harden_and_export
    from mqbench.harness.models.standin_text.harden import EASY, Hardness

    harden_and_export(run, out, Hardness() if hard else EASY)
    typer.echo(f"text stand-in written to {out}")


@app.command()
def data(
    out: Out = Path("runs/WikiText-2"), seed: Annotated[int, typer.Option(help="Seed of the articles.")] = 0
) -> None:
    """Write the synthetic corpus as wiki.train.raw, wiki.valid.raw and wiki.test.raw."""
    from mqbench.harness.models.standin_text.corpus import write_corpus

    for path, size_bytes in write_corpus(out, seed).items():
        typer.echo(f"{size_bytes:8d} bytes  {path}")
