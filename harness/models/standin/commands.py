"""``mqbench standin``: make the shipped model and its benchmarks again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Make the shipped stand-in model and its mini benchmarks again, from seeds."
)
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
Gap = Annotated[
    float | None,
    typer.Option(min=0, help="Modality gap r at down_proj's input; 0 leaves it out (function-preserving)."),
]


@app.command()
def train(
    out: Out = Path("runs/standin"),
    seed: Annotated[int, typer.Option(help="Seed of initial weights and examples.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps; about 0.6 s each on one CPU core.")] = 10600,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; use 1 when anything else runs.")] = 2,
    fc2_mean: Annotated[bool, typer.Option(help="Train with large fc2 column means (Eq. 9).")] = True,
    specialise: Annotated[bool, typer.Option(help="Train MLP channels that specialise by modality.")] = True,
) -> None:
    """Train from nothing, or resume the run in --out. An hour or so on a CPU; minutes on a GPU.

    Leaves checkpoint.pt, loss.csv and loss.png in --out. Then run `mqbench standin harden`.
    """
    import torch

    from mqbench.harness.errors import MQBenchError
    from mqbench.harness.models.standin.curve import plot_loss
    from mqbench.harness.models.standin.train import TrainSettings
    from mqbench.harness.models.standin.train import train as run

    torch.set_num_threads(threads)
    defaults = TrainSettings()
    settings = TrainSettings(
        seed=seed,
        steps=steps,
        fc2_mean=defaults.fc2_mean if fc2_mean else 0.0,
        penalty_weight=defaults.penalty_weight if specialise else 0.0,
    )
    try:
        trainer = run(settings, out, device)
    except ValueError as error:
        raise MQBenchError(str(error)) from error
    plot_loss(trainer.curve, out / "loss.png")
    typer.echo(f"trained model in {out}; next: mqbench standin harden --run {out}")


@app.command()
def harden(
    run: Annotated[Path, typer.Option(help="Folder of a finished `standin train`.")] = Path("runs/standin"),
    out: Out = Path("runs/standin-qwen2-vl"),
    outliers: Annotated[bool, typer.Option(help="Outlier channels behind the norms (function-preserving).")] = True,
    gap: Gap = None,
) -> None:
    """Rescale a trained stand-in so that it is hard to quantize, and save it as a Hugging Face folder."""
    from dataclasses import replace

    from mqbench.harness.models.standin.build import harden_and_export
    from mqbench.harness.models.standin.harden import Hardness

    hardness = Hardness() if gap is None else Hardness(modality_gap=gap)
    if not outliers:
        hardness = replace(hardness, outlier_gain=(1.0, 1.0))
    harden_and_export(run, out, hardness)
    typer.echo(f"stand-in written to {out}")


@app.command()
def data(
    out: Out = Path("runs/standin-data"), seed: Annotated[int, typer.Option(help="Seed of the examples.")] = 0
) -> None:
    """Write the five mini benchmarks and their calibration splits (TSV + PNG)."""
    from mqbench.harness.models.standin.benchmarks import write_benchmarks

    for path, rows in write_benchmarks(out, seed).items():
        typer.echo(f"{rows:5d} rows  {path}")


@app.command()
def report(
    run: Annotated[Path, typer.Option(help="Folder of a finished `standin train`.")] = Path("runs/standin"),
    out: Out = Path("runs/standin-report"),
    gap: Gap = None,
) -> None:
    """Measure what makes the stand-in hard to quantize and write standin.md with its plots. Ten minutes on a CPU."""
    from mqbench.harness.models.standin.harden import Hardness
    from mqbench.harness.models.standin.report import write_report
    from mqbench.harness.models.standin.study import Study

    write_report(run, out, Study(run, Hardness() if gap is None else Hardness(modality_gap=gap)))
    typer.echo(f"report written to {out / 'standin.md'}")
