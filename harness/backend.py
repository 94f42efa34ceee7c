"""Which backend a cell runs on: what was asked for, what came of it, and how a record says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mqbench.harness.errors import RequestError
from mqbench.harness.quant.options import declared_defaults
from mqbench.harness.record import INTEGER, Backend

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mqbench.harness.models.adapter import LoadedModel
    from mqbench.harness.plan import Group
    from mqbench.harness.quant.integer import BackendReport
    from mqbench.harness.quant.scheme import Recipe, Scheme
    from mqbench.harness.quant.session import Quantizer

PACKED_BITS, MAX_BITS = 4, 8


def check_recipes(backend: str, recipes: Sequence[Recipe], methods: Mapping[str, Quantizer]) -> None:
    """What bits and options alone say about the integer backend, before any work.

    Args:
        backend: What is asked for.
        recipes: What is to run on it.
        methods: Their methods by name.

    Raises:
        RequestError: under a recipe no layer could run in integers.
    """
    for recipe in recipes if backend == INTEGER else ():
        defaults = declared_defaults(getattr(methods[recipe.method], "options", None) or ())
        zero_point = bool({**defaults, **recipe.options}.get("zero_point", False))
        if not any(_has_integers(scheme, zero_point) for scheme in (recipe.vision_scheme, recipe.text_scheme)):
            raise RequestError(
                f"no layer of {recipe.label} {recipe.bits} can run in integers: these need symmetric weights of up to "
                f"{MAX_BITS} bits without groups and activations of at most {MAX_BITS} bits, or weights alone at "
                f"{PACKED_BITS} bits or less; give other --bits, or leave --backend {INTEGER} out"
            )


def _has_integers(scheme: Scheme, zero_point: bool) -> bool:
    weights, activations = scheme.weights, scheme.activations
    if weights is None:
        return False
    if activations is None:
        return weights.num_bits <= PACKED_BITS
    largest = max(weights.num_bits, activations.num_bits)
    return largest <= MAX_BITS and weights.group_size is None and not zero_point


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
