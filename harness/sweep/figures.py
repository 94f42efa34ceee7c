"""Figures of a system, by the names that records use."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mqbench.harness.runtime.interface import Runtime
from mqbench.harness.sweep.spec import LATENCY, MEMORY
from mqbench.harness.sweep.split import Split

PREFILL, TOTAL, PEAK = "prefill_ms", "total_ms", "peak_bytes"
HEADLINES: Mapping[str, str] = MappingProxyType({LATENCY: PREFILL, MEMORY: PEAK})
"""The figure that a record's score is, by sweep; ``TOTAL`` for the others."""
TIMED: Mapping[str, str] = MappingProxyType({LATENCY: PREFILL})
"""The figure that ratios compare, likewise."""

LINEAR_PARTS = ("vision gemm", "projector", "llm gemm")
BETWEEN_LINEARS = "quantize and norm"


def memory_figures(runtime: Runtime, build_peak: int, peak: int) -> dict[str, float]:
    """Bytes by kind; activations are what the peak has beyond weights, cache and workspace."""
    parts = runtime.memory()
    peak = max(peak, parts.total_bytes)
    return {
        "build_peak_bytes": float(build_peak),
        "peak_bytes": float(peak),
        "weights_bytes": float(parts.weights_bytes),
        "kv_cache_bytes": float(parts.kv_cache_bytes),
        "workspace_bytes": float(parts.workspace_bytes),
        "activations_bytes": float(peak - parts.total_bytes),
    }


def split_figures(split: Split) -> dict[str, float]:
    """``part:<part>_ms``, the vision tower's share and the sum over all kernels."""
    vision = split.vision_ms
    if vision is None:
        vision = sum(
            value for name, value in split.parts_ms.items() if name.startswith("vision") or name == "projector"
        )
    parts = {f"part:{name}_ms": value for name, value in split.parts_ms.items()}
    return {**parts, "vision_ms": vision, "kernels_ms": split.kernels_ms}


def launch_gap(system: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """What a prefill takes beyond its kernels; empty without a time split."""
    kernels = metrics.get(f"{system}.kernels_ms")
    return {} if kernels is None else {f"{system}.launch_gap_ms": metrics[f"{system}.{PREFILL}"] - kernels}


def linear_samples(split: Split) -> dict[str, list[float]]:
    """Kernel time of the products alone, and with norms, activation functions and quantization between them."""
    products = sum(split.parts_ms.get(name, 0.0) for name in LINEAR_PARTS)
    total = products + split.parts_ms.get(BETWEEN_LINEARS, 0.0)
    parts = {f"part:{name}_ms": [value] for name, value in split.parts_ms.items()}
    return {TOTAL: [total], "gemm_ms": [products], **parts}
