"""What stands below a table: what a reader must know to read its places."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mqbench.harness.record import Backend, Record
from mqbench.harness.select import FLOAT_METHOD
from mqbench.harness.sweep_records import CPU, SWEEP_PREFIX, is_clamped, is_grouped, is_sweep
from mqbench.harness.table_spec import TableSpec
from mqbench.harness.tasks import TaskKind, task_info

BACKENDS = {
    Backend.SIMULATED: "simulated (quantize-dequantize)",
    Backend.REAL: "integer kernels",
    Backend.MIXED: "integer kernels, some simulated",
}
STANDIN_PREFIX = "standin"
STANDIN_NOTE = " (a synthetic stand-in: no evidence about real checkpoints)"
MEASURE_COMMAND = "mqbench run --plan results/plans/paper.toml"
SWEEP_COMMAND = "mqbench sweep {name}"
CLAMPED = "Clamped: the model makes the image smaller, to its largest input; such sizes are one input"
GROUPED = "Systems that did not fit into memory together ran in groups with the first one, and are compared through it"
CPU_CHECK = "Functional check on a CPU: its times say nothing about a GPU"
RANDOM_WEIGHTS = "random:"
CAPTION_PACKAGES = ("mqbench", "torch", "transformers")
NUM_COMMIT_CHARACTERS = 12


def caption(records: Sequence[Record], spec: TableSpec, has_delta: bool = True) -> str:
    """Models, device, arithmetic, calibration, rows evaluated, and how to read a place.

    Args:
        records: Those shown.
        spec: The table.
        has_delta: Some place shows a difference to float.
    """
    sweeps = [record for record in records if is_sweep(record.cell.task)]
    others = [record for record in records if not is_sweep(record.cell.task)]
    parts = [f"Table {spec.number}. {spec.title}"]
    parts += _facts(others) if others else [] if spec.tasks and spec.tasks == spec.sweeps else [_nothing(spec)]
    parts += sweep_facts(sweeps, spec.sweeps) if spec.sweeps else []
    parts += [spec.note.rstrip(".")] if spec.note else []
    parts += [_reading(spec, has_delta)] if spec.tasks else []
    return ". ".join(parts) + "."


def sweep_facts(records: Sequence[Record], tasks: Collection[str]) -> list[str]:
    """Sentences on where and how sweeps ran, and on those of ``tasks`` that have no record."""
    missing = sorted(set(tasks) - {record.cell.task for record in records})
    devices = sorted({record.cell.device for record in records})
    parts = [_timed_on(device, [record for record in records if record.cell.device == device]) for device in devices]
    parts += [CPU_CHECK] if CPU in devices else []
    parts += [CLAMPED] if any(map(is_clamped, records)) else []
    parts += [GROUPED] if any(map(is_grouped, records)) else []
    if missing:
        names = " and ".join(task.removeprefix(SWEEP_PREFIX) for task in missing)
        commands = " and ".join(f"'{sweep_command(task)}'" for task in missing)
        parts.append(f"Nothing was measured ({names}): no record of a GPU fits; run {commands} on a machine with one")
    return parts


def sweep_command(task: str) -> str:
    """The command that makes records of a sweep."""
    return SWEEP_COMMAND.format(name=task.removeprefix(SWEEP_PREFIX))


def _timed_on(device: str, records: Sequence[Record]) -> str:
    """Device, software, commit, model, weights and repeats of its records."""
    environments = [record.environment for record in records]
    repeats = sorted({record.cell.limit for record in records if record.cell.limit is not None})
    random = any(record.cell.weights_sha256.startswith(RANDOM_WEIGHTS) for record in records)
    models = sorted({f"{record.cell.model}, {record.cell.dtype}" for record in records})
    software = " | ".join(sorted({_software(environment) for environment in environments}))
    spread = f"{'-'.join(map(str, dict.fromkeys([repeats[0], repeats[-1]])))} repeats" if repeats else ""
    parts = [" | ".join(models), "random weights" if random else "", f"medians of {spread}" if spread else ""]
    return f"Timed on {device} ({software}): {', '.join(filter(None, parts))}"


def _software(environment: Mapping[str, Any]) -> str:
    """Driver, packages and commit, as far as a record has them."""
    packages, git = environment.get("packages") or {}, environment.get("git") or {}
    parts = [f"driver {environment['driver']}" if environment.get("driver") else ""]
    parts += [f"{name} {packages[name]}" for name in CAPTION_PACKAGES if name in packages]
    changed = " with changes" if git.get("dirty") else ""
    parts += [f"commit {git['commit'][:NUM_COMMIT_CHARACTERS]}{changed}"] if git.get("commit") else []
    return ", ".join(filter(None, parts)) or "versions unknown"


def _facts(records: Sequence[Record]) -> list[str]:
    names = sorted({record.cell.model for record in records})
    named = [f"{name}{STANDIN_NOTE if name.startswith(STANDIN_PREFIX) else ''}" for name in names]
    devices = sorted({f"{record.cell.device}, {record.cell.dtype}" for record in records})
    backends = sorted({BACKENDS[record.backend] for record in records if record.cell.recipe.method != FLOAT_METHOD})
    benchmark = any(task_info(record.cell.task).kind is TaskKind.BENCHMARK for record in records)
    limits = sorted({"all" if record.cell.limit is None else f"at most {record.cell.limit}" for record in records})
    return [
        f"Models: {', '.join(named)}",
        f"Device: {' | '.join(devices)}" + (f"; quantized layers: {', '.join(backends)}" if backends else ""),
        f"Calibration: {_calibration(records)}",
        f"Rows {'per benchmark' if benchmark else 'evaluated'}: {', '.join(limits)}",
    ]


def _calibration(records: Sequence[Record]) -> str:
    found = {record.cell.calibration for record in records if record.cell.calibration is not None}
    texts = [
        f"{info.num_samples} samples of {info.dataset}, split {info.split}, seed {info.seed}, sha256 {info.sha256[:12]}"
        for info in sorted(found, key=lambda info: (info.num_samples, info.dataset, info.split, info.seed))
    ]
    return "; ".join(texts) or "none"


def _nothing(spec: TableSpec) -> str:
    if not spec.tasks:
        return "The paper's data; there is nothing to measure"
    return f"Nothing was measured: no record fits; '{MEASURE_COMMAND}' makes them"


def _reading(spec: TableSpec, has_delta: bool) -> str:
    paper = f" [paper: {spec.paper_model}]" if spec.paper_model else " [paper]" if spec.paper else ""
    memory = "; OOM: out of memory" if spec.sweeps else ""
    return f"Each place: measured{' (delta to float)' if has_delta else ''}{paper}; -: not measured{memory}"
