"""``mqbench standin``: make the shipped model and its benchmarks again, and stand-ins of other families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Make the shipped stand-in model and its mini benchmarks again, from seeds."
)
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
OutOrDefault = Annotated[Path | None, typer.Option(help="Folder to write to.")]
Run = Annotated[Path | None, typer.Option(help="Folder of a finished 'standin train'; by default that of --family.")]
Family = Annotated[str, typer.Option(help="qwen2-vl, glm-4v, internvl, llava, minicpm-v or qwen-vl.")]
QWEN2_VL = "qwen2-vl"
Gap = Annotated[
    float | None,
    typer.Option(min=0, help="Modality gap r at down_proj's input; 0 leaves it out (function-preserving)."),
]


@app.command()
def train(
    family: Family = QWEN2_VL,
    out: OutOrDefault = None,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and examples.")] = 0,
    from_nothing: Annotated[
        bool, typer.Option("--from-nothing", help="Initial weights also for a family that would start from qwen2-vl.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; by default the recipe's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; use 1 when anything else runs.")] = 2,
    fc2_mean: Annotated[bool, typer.Option(help="Train with large fc2 column means (Eq. 9).")] = True,
    specialise: Annotated[bool, typer.Option(help="Train MLP channels that specialise by modality.")] = True,
) -> None:
    """Train a stand-in, or resume the run in --out (runs/standin; of other families runs/train-FAMILY).

    qwen2-vl starts from nothing: an hour and a half on two CPU cores. Other families start from its shipped weights:
    their vision towers first learn its features, then the whole model learns the tasks. Half an hour on one CPU core.
    Leaves checkpoint.pt, loss.csv and loss.png in --out. Then run 'mqbench standin harden'.
    """
    import torch

    from mqbench.harness.errors import MQBenchError
    from mqbench.harness.models.standin.curve import plot_loss
    from mqbench.harness.models.standin.train import recipe
    from mqbench.harness.models.standin.train import train as run

    torch.set_num_threads(threads)
    default = recipe(family, from_nothing)
    folder = out or _run_folder(family)
    settings = replace(
        default,
        seed=seed,
        steps=default.steps if steps is None else steps,
        align_steps=default.align_steps if steps is None else min(steps // 3, default.align_steps),
        fc2_mean=default.fc2_mean if fc2_mean else 0.0,
        penalty_weight=default.penalty_weight if specialise else 0.0,
    )
    try:
        trainer = run(settings, folder, device)
    except ValueError as error:
        raise MQBenchError(str(error)) from error
    plot_loss(trainer.curve, folder / "loss.png")
    typer.echo(f"trained model in {folder}; next: mqbench standin harden --run {folder}")


def _run_folder(family: str) -> Path:
    return Path("runs/standin" if family == QWEN2_VL else f"runs/train-{family}")


@app.command()
def harden(
    family: Family = QWEN2_VL,
    run: Run = None,
    out: OutOrDefault = None,
    outliers: Annotated[bool, typer.Option(help="Outlier channels behind the norms (function-preserving).")] = True,
    gap: Gap = None,
) -> None:
    """Rescale a trained stand-in so that it is hard to quantize, and save it as a Hugging Face folder.

    Without --out it is written beside the run under its model's name (runs/standin-llava), where --models-dir finds it.
    """
    from mqbench.harness.models.standin.build import harden_and_export
    from mqbench.harness.models.standin.harden import Hardness

    hardness = Hardness() if gap is None else Hardness(modality_gap=gap)
    if not outliers:
        hardness = replace(hardness, outlier_gain=(1.0, 1.0))
    folder = harden_and_export(run or _run_folder(family), out, hardness)
    typer.echo(f"stand-in written to {folder}")


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
    family: Family = QWEN2_VL,
    run: Run = None,
    out: Out = Path("runs/standin-report"),
    gap: Gap = None,
) -> None:
    """Measure what makes a stand-in hard to quantize; write a page with plots. Fifteen minutes on a CPU core."""
    from mqbench.harness.models.standin.harden import Hardness
    from mqbench.harness.models.standin.report import write_report
    from mqbench.harness.models.standin.study import Study

    folder = run or _run_folder(family)
    written = write_report(folder, out, Study(folder, Hardness() if gap is None else Hardness(modality_gap=gap)))
    typer.echo(f"report written to {written}")
