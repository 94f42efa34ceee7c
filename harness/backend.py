"""Which backend a cell runs on: what was asked for, what came of it, and how a record says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mqbench.harness.errors import RequestError
from mqbench.harness.record import INTEGER, Backend

if TYPE_CHECKING:
    from mqbench.harness.models.adapter import LoadedModel
    from mqbench.harness.plan import Group
    from mqbench.harness.quant.integer import BackendReport


def choose_backend(loaded: LoadedModel, group: Group) -> BackendReport | None:
    """Puts a quantized model on the backend of its group; None when that is the simulated one.

    Raises:
        RequestError: integers are asked for, and no layer can run in integers.
    """
    if group.backend != INTEGER:
        return None
    from mqbench.harness.quant.integer import use_integer_backend

    report = use_integer_backend(loaded.model)
    if not report.integer:
        reasons = "; ".join(sorted(set(report.simulated.values()))) or "none is quantized"
        raise RequestError(f"no layer of {group.label} can run in integers: {reasons}; leave --backend {INTEGER} out")
    return report


def backend_of(report: BackendReport | None) -> Backend:
    """``REAL`` when every quantized layer ran in integers, ``MIXED`` when some did."""
    if report is None:
        return Backend.SIMULATED
    return Backend.REAL if report.complete else Backend.MIXED


def layers_of(report: BackendReport | None) -> dict[str, Any]:
    """For a record's environment: how many layers ran in integers, and why which quantized ones did not."""
    if report is None:
        return {}
    return {"integer_layers": len(report.integer), "simulated_layers": dict(report.simulated)}
