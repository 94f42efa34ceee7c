"""``mqbench eval``, ``run`` and ``quantize``: the commands that run models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mqbench.harness.cli_options import (
    EXIT_FAILED_CELLS,
    AsJson,
    Backend,
    BatchSize,
    CalibSamples,
    CalibSplit,
    DataDir,
    Device,
    DryRun,
    Dtype,
    Executor,
    Jobs,
    ModelsDir,
    Offload,
    Options,
    Out,
    Seed,
    TrustRemoteCode,
)
from mqbench.harness.errors import RequestError
from mqbench.harness.store import DEFAULT_OUT


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


def _names(text: str, option: str) -> tuple[str, ...]:
    """``"a, b"`` as a tuple.

    Raises:
        RequestError: it names nothing.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise RequestError(f"{option} names nothing; give at least one, separated by commas")
    return names
