"""Options that several commands share, as typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_FAILED_CELLS = 1

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
