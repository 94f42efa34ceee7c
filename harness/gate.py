"""``mqbench gate``: is a candidate worse than a baseline, cell by cell, and is that more than chance?

Every cell's answers are paired row by row. A verdict needs confidence in either direction: *fail* when the lower bound
of the loss is above ``max_drop``, *pass* when the upper bound is below it, *undecided* otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from mqbench.harness.errors import GateError
from mqbench.harness.gate_checks import (
    Bench,
    check_ratio,
    check_recovery,
    check_scores,
    has_clusters,
    has_ratio,
    has_unknown_twins,
)
from mqbench.harness.gate_pairs import (
    ALLOWED_ANYWAY,
    CELL_SETTINGS,
    Pair,
    check_allowed,
    compared_settings,
    pair_records,
)
from mqbench.harness.gate_verdict import RATIOS, Check, Correction, GateOptions, Outcome, Report, Verdict
from mqbench.harness.record import Backend, Record
from mqbench.harness.select import FLOAT_METHOD
from mqbench.harness.sources import FOLDER_MARK
from mqbench.harness.tasks import TaskKind, task_info

Job = Callable[[Bench], Check]
FLOAT_SETTINGS = ("data_sha256", "limit", "dtype", "device", "batch_size")
"""Settings in which a quantized record and its float record must agree."""


def compare(baseline: Iterable[Record], candidate: Iterable[Record], options: GateOptions | None = None) -> Report:
    """Compares two sets of records.

    Args:
        baseline: In the order written; the newest of each cell counts.
        candidate: The same.
        options: Limits and statistics.

    Raises:
        GateError: records that cannot be compared, or none in common.
        UnknownNameError: ``options.allow`` names no setting.
    """
    options = options or GateOptions()
    pairs = pair_records(baseline, candidate, check_allowed(options.allow))
    gated = [pair for pair in pairs if _is_gated(pair)]
    if not any(pair.baseline and pair.candidate for pair in gated):
        raise GateError("no cell is in both folders; evaluate the baseline's models, methods, bits and tasks")
    jobs = list(_jobs(gated, options))
    confidence = options.confidence
    if options.correction is Correction.BONFERRONI:
        confidence = 1 - (1 - confidence) / len(jobs)
    bench = Bench(options, confidence)
    checks = tuple(_with_outcome(job(bench), options) for job in jobs)
    return Report(options, checks, tuple(_notes(pairs, gated)), confidence)


def _jobs(pairs: Sequence[Pair], options: GateOptions) -> Iterator[Job]:
    yield from (partial(check_scores, pair) for pair in pairs)
    if options.min_recovery is not None:
        yield from _recovery_jobs(pairs)
    for kind in RATIOS:
        yield from (partial(check_ratio, pair, kind) for pair in pairs if has_ratio(pair, kind, options))


def _recovery_jobs(pairs: Sequence[Pair]) -> Iterator[Job]:
    """One for each quantized recipe of the candidate, over its accuracy benchmarks."""
    floats: dict[str, Record] = {}
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.candidate is None or not pair.candidate.ok or not task_info(pair.place.task).higher_is_better:
            continue
        if pair.candidate.cell.recipe.method == FLOAT_METHOD:
            floats[_float_key(pair.candidate)] = pair.candidate
        else:
            groups.setdefault(_recipe_key(pair), []).append(pair)
    for group in groups.values():
        known = {pair.place.task: floats.get(_float_key(pair.either)) for pair in group}
        yield partial(check_recovery, group, {task: record for task, record in known.items() if record is not None})


def _float_key(record: Record) -> str:
    settings = compared_settings(record)
    model = record.cell.model.partition(FOLDER_MARK)[0]
    return repr([model, record.cell.task, *(settings.get(name) for name in FLOAT_SETTINGS)])


def _recipe_key(pair: Pair) -> str:
    settings = compared_settings(pair.either)
    shared = [settings.get(name) for name in CELL_SETTINGS if name not in ("data_sha256", *ALLOWED_ANYWAY)]
    return repr([pair.place[:3], shared])


def _is_gated(pair: Pair) -> bool:
    """Probes and figures have no rows to pair; a failed cell counts all the same."""
    records = [record for record in (pair.baseline, pair.candidate) if record is not None]
    return any(record.samples for record in records) or (pair.candidate is not None and not pair.candidate.ok)


def _with_outcome(check: Check, options: GateOptions) -> Check:
    outcomes = {Verdict.FAIL: Outcome.FAIL, Verdict.UNDECIDED: options.undecided, Verdict.MISSING: options.missing}
    return replace(check, fails=outcomes.get(check.verdict, Outcome.PASS) is Outcome.FAIL)


def _notes(pairs: Sequence[Pair], gated: Sequence[Pair]) -> Iterator[str]:
    """What a reader must know about the comparison."""
    if any(task_info(pair.place.task).kind is TaskKind.PERPLEXITY for pair in gated):
        yield "perplexity: the loss is its relative increase in %, from the likelihoods of the same windows"
    yield from _row_notes([pair for pair in gated if task_info(pair.place.task).kind is TaskKind.BENCHMARK])
    if len(gated) < len(pairs):
        yield f"{len(pairs) - len(gated)} record(s) without rows (probes, figures) are not gated"
    simulated = [pair for pair in gated if _has_simulated_figures(pair)]
    if simulated:
        yield f"latency and memory of {len(simulated)} simulated cell(s) are not gated: a simulation has no speed"
    yield from _package_notes(gated)


def _row_notes(pairs: Sequence[Pair]) -> Iterator[str]:
    """What holds for the rows of benchmarks."""
    records = [pair.candidate for pair in pairs if pair.candidate is not None and pair.candidate.ok]
    if any(record.cell.task == "mme" for record in records):
        yield "mme: the loss counts single answers; the headline scores beside it also count pairs of answers"
    if any(has_unknown_twins(record) for record in records):
        yield "mme: two rows share each image, the records do not say which: every row counts as half a unit"
    if not all(has_clusters(record) or has_unknown_twins(record) for record in records):
        yield "rows of one image are taken as independent: these records do not say which rows share an image"
    if not all("prompts_sha256" in compared_settings(record) for record in records):
        yield "prompts are not recorded: equal rows and an equal VLMEvalKit version stand for them"


def _has_simulated_figures(pair: Pair) -> bool:
    records = [record for record in (pair.baseline, pair.candidate) if record is not None]
    return any(record.backend is Backend.SIMULATED and set(RATIOS.values()) & set(record.metrics) for record in records)


def _package_notes(pairs: Sequence[Pair]) -> Iterator[str]:
    """Packages whose version differs; results may change with it."""
    found: dict[str, None] = {}
    for pair in pairs:
        if pair.baseline is not None and pair.candidate is not None:
            old, new = (_packages(record) for record in (pair.baseline, pair.candidate))
            found |= {
                f"{name} {old[name]} -> {new[name]}": None for name in old if new.get(name, old[name]) != old[name]
            }
    if found:
        yield f"made with other versions: {', '.join(found)}"


def _packages(record: Record) -> Mapping[str, str]:
    return record.environment.get("packages") or {}
