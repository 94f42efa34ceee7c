"""What stands below a table: what a reader must know to read its places."""

from __future__ import annotations

from collections.abc import Sequence

from mqbench.harness.record import Backend, Record
from mqbench.harness.select import FLOAT_METHOD
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


def caption(records: Sequence[Record], spec: TableSpec, has_delta: bool = True) -> str:
    """Models, device, arithmetic, calibration, rows evaluated, and how to read a place.

    Args:
        records: Those shown.
        spec: The table.
        has_delta: Some place shows a difference to float.
    """
    parts = [f"Table {spec.number}. {spec.title}", *(_facts(records) if records else [_nothing(spec)])]
    parts += [spec.note.rstrip(".")] if spec.note else []
    parts += [_reading(spec, has_delta)] if spec.tasks else []
    return ". ".join(parts) + "."


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
    return f"Each place: measured{' (delta to float)' if has_delta else ''}{paper}; -: not measured"
