"""``mqbench gate`` as a command. What computes is imported when it runs, so that ``--help`` stays instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mqbench.harness.errors import OutputError
from mqbench.harness.gate_verdict import Correction, GateOptions, Outcome

EXIT_GATE_FAILED = 1
STDOUT = "-"


def gate(
    baseline: Annotated[Path, typer.Option(help="Folder of records.jsonl to compare with.")],
    candidate: Annotated[Path, typer.Option(help="Folder of records.jsonl to judge.")],
    max_drop: Annotated[
        float, typer.Option(help="Largest loss: percentage points of accuracy, percent of perplexity.")
    ] = 1.0,
    confidence: Annotated[float, typer.Option(help="Of each verdict: of either bound of a loss's interval.")] = 0.95,
    min_recovery: Annotated[
        float | None, typer.Option(help="Smallest recovery in percent of the candidate's own float records.")
    ] = None,
    max_latency_ratio: Annotated[float, typer.Option(help="Candidate over baseline; 0: not checked.")] = 1.05,
    max_memory_ratio: Annotated[float, typer.Option(help="Peak memory likewise; 0: not checked.")] = 1.05,
    where: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, repeatable: use only records with this setting.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="A setting that may differ, repeatable, e.g. weights_sha256.")
    ] = None,
    resamples: Annotated[
        int, typer.Option(help="Bootstrap draws; more are made where the confidence needs them.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    undecided: Annotated[Outcome, typer.Option(help="Whether too few samples to tell pass or fail.")] = Outcome.PASS,
    missing: Annotated[
        Outcome, typer.Option(help="Whether cells that the candidate lacks pass or fail.")
    ] = Outcome.FAIL,
    correction: Annotated[
        Correction, typer.Option(help="bonferroni: the confidence holds for all checks together.")
    ] = Correction.NONE,
    json_file: Annotated[str | None, typer.Option("--json", help="Also write JSON; - for stdout.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML.")] = None,
) -> None:
    """Compare a candidate's records with a baseline's; fail when accuracy dropped.

    Answers are paired row by row. A cell fails when its loss exceeds --max-drop with the chosen confidence, passes when
    it is below with that confidence, and is undecided otherwise (results/gate.md says what n rows can show).
    Exit code 0: pass; 1: a check failed; 2: the records cannot be compared, the error says why.

    Examples:

      mqbench gate --baseline results/records --candidate runs

      mqbench gate --baseline main --candidate runs --where 'task=["textvqa","docvqa"]' --missing pass --junit gate.xml

      mqbench gate --baseline a --candidate b --where 'method=["none","mquant"]' --min-recovery 97
    """
    from mqbench.harness.commands import terminal_width
    from mqbench.harness.gate import compare
    from mqbench.harness.gate_pairs import load_folder
    from mqbench.harness.gate_report import render, to_json, to_junit
    from mqbench.harness.select import parse_filters

    options = GateOptions(
        max_drop=max_drop,
        confidence=confidence,
        min_recovery=min_recovery,
        max_latency_ratio=max_latency_ratio or None,
        max_memory_ratio=max_memory_ratio or None,
        num_resamples=resamples,
        seed=seed,
        undecided=undecided,
        missing=missing,
        correction=correction,
        allow=tuple(allow or ()),
    )
    filters = parse_filters(where or [])
    report = compare(load_folder(baseline, filters), load_folder(candidate, filters), options)
    people = sys.stderr if json_file == STDOUT else sys.stdout
    people.write(render(report, terminal_width(), color=people.isatty()))
    if json_file == STDOUT:
        sys.stdout.write(to_json(report))
    elif json_file is not None:
        _write(Path(json_file), to_json(report))
    if junit is not None:
        _write(junit, to_junit(report))
    if not report.ok:
        raise typer.Exit(EXIT_GATE_FAILED)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}; choose another file") from error
