"""Records with made-up figures for tests of storage and tables."""

from __future__ import annotations

from typing import Any

from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import Backend, CalibrationInfo, Cell, Record, Sample, Status

CALIBRATION = CalibrationInfo("mini", "calib", 256, 0, "c" * 64)


def make_cell(
    task: str = "textvqa",
    method: str = "mquant",
    bits: str = "w8a8/w4a8",
    model: str = "standin-qwen2-vl",
    **changes: Any,
) -> Cell:
    is_float = method == "none"
    vision, text = ("float", "float") if is_float else bits.split("/")
    settings: dict[str, Any] = {
        "model": model,
        "weights_sha256": "a" * 64,
        "recipe": Recipe(method, vision, text),
        "method_version": "1",
        "task": task,
        "limit": None,
        "data_sha256": "d" * 64,
        "calibration": None if is_float else CALIBRATION,
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 16,
    }
    return Cell(**{**settings, **changes})


def make_record(cell: Cell | None = None, score: float | None = 82.5, **changes: Any) -> Record:
    settings: dict[str, Any] = {
        "cell": cell or make_cell(),
        "status": Status.OK,
        "started_at": "2026-01-02T03:04:05+00:00",
        "duration_s": 1.5,
        "score": score,
        "metrics": {"Overall": score},
        "samples": (Sample("1", "ein Löwe\n=1+1", 1.0), Sample("2", "007", None)),
        "environment": {"python": "3.11.9", "gpu": []},
        "backend": Backend.SIMULATED,
    }
    return Record(**{**settings, **changes})


def failed_record(cell: Cell | None = None, reason: str = "ValueError: broken") -> Record:
    return make_record(cell, None, status=Status.FAILED, reason=reason, metrics={}, samples=())
