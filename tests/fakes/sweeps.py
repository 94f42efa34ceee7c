"""Made-up records of sweeps on two GPUs: known ratios, one clamped size, a point without memory, a missing one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fakes.records import make_cell, make_record
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import Backend, Record, Sample, Status

LARGE, SMALL = "GPU A (made up)", "GPU B (made up)"
DEVICES = (LARGE, SMALL)
SPEEDS: Mapping[str, float] = {
    "bf16-eager": 1.0,
    "bf16-graph": 1.25,
    "awq-w4a16-g128": 0.8,
    "w8a8-token": 1.6,
    "w8a8-token-unfused": 1.4,
    "w4a8-token": 1.5,
    "w4a8-token-unfused": 1.2,
    "w4a8-tensor": 2.1,
    "w4a8-msq": 1.75,
    "mquant-w4a8": 2.0,
    "w4a8-rows": 1.9,
}
"""Every system's speed, as a multiple of the first one's."""

PARTS = {"vision gemm": 0.2, "vision attention": 0.25, "projector": 0.05, "llm gemm": 0.3, "llm attention": 0.1}
LARGEST_PX = 3584
ENVIRONMENT = {
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "packages": {"mqbench": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0", "numpy": "2.0"},
    "driver": "550.1",
}


def point(
    name: str,
    options: Mapping[str, Any],
    metrics: Mapping[str, float],
    device: str = LARGE,
    failures: Mapping[str, str] | None = None,
    **changes: Any,
) -> Record:
    """A record of one point.

    Args:
        name: Of the sweep.
        options: Of the recipe.
        metrics: By name.
        device: GPU, or ``cpu``.
        failures: System -> why it has no metrics.
        changes: Of the cell.
    """
    settings: dict[str, Any] = {
        "model": "qwen2-vl-7b",
        "weights_sha256": "random:0",
        "recipe": Recipe("sweep", options=dict(options)),
        "calibration": None,
        "device": device,
        "dtype": "bfloat16",
        "batch_size": options.get("batch", 1),
        "backend": "integer",
        "limit": 20,
        "data_sha256": str(sorted(options.items())),
    }
    cell = make_cell(f"sweep_{name}", **(settings | changes))
    failures = failures or {}
    systems = {key.partition(".")[0] for key in metrics if "." in key}
    samples = [Sample(system, "ok", 1.0) for system in sorted(systems - failures.keys())]
    samples += [Sample(system, reason, None) for system, reason in failures.items()]
    kept = {key: value for key, value in metrics.items() if key.partition(".")[0] not in failures}
    return make_record(cell, 1.0, metrics=kept, samples=tuple(samples), environment=ENVIRONMENT, backend=Backend.REAL)


def no_memory(
    name: str, options: Mapping[str, Any], device: str = LARGE, metrics: Mapping[str, float] | None = None
) -> Record:
    """A point at which every system ran out of memory."""
    cell = point(name, options, {}, device).cell
    return make_record(
        cell, None, status=Status.FAILED, reason="out of memory: 24 GiB wanted", metrics=metrics or {}, samples=(),
        environment=ENVIRONMENT, backend=Backend.REAL,
    )  # fmt: skip


def of_systems(**figures: float) -> dict[str, float]:
    """Each figure of the first system, and of all others by their speed."""
    return {f"{name}.{figure}": value / speed for name, speed in SPEEDS.items() for figure, value in figures.items()}


def sweep_records(devices: Iterable[str] = DEVICES) -> list[Record]:
    """What ``mqbench sweep`` writes, in small."""
    return [record for device in devices for record in _device(device)]


def _device(device: str) -> list[Record]:
    slow = 1.0 if device == LARGE else 3.0
    records = []
    for px in (280, 560, 840, 1960, 2800, 3080, 5600):
        if (device, px) != (SMALL, 560):
            records += [_latency(px, device, slow), _memory(px, device)]
            records.append(point("linears", _image(px), of_systems(total_ms=slow * px / 20), device))
    three = _image(2240, images=3, text_tokens=50)
    records.append(point("linears", three, of_systems(total_ms=1700.0 * slow), device))
    decode = of_systems(prefill_ms=3000.0 * slow, decode_ms=20.0 * slow)
    records.append(point("latency", three | {"decode_tokens": 2000}, decode, device))
    for tokens, time in ((100, 0.03), (900, 0.06), (2500, 0.3), (8100, 2.0)):
        metrics = {"causal.total_ms": time * slow, "aifs.total_ms": time * slow * 1.01}
        records.append(point("attention", {"tokens": tokens}, metrics, device))
    return records + _generations(device, slow)


def _generations(device: str, slow: float) -> list[Record]:
    records = []
    for count in (1, 2, 3, 4):
        prefill, decode = 2500.0 * slow * count, 18000.0 * slow * count
        metrics = of_systems(prefill_ms=prefill, decode_total_ms=decode, total_ms=prefill + decode)
        batch = {"image_px": 2240, "batch": count, "decode_tokens": 512}
        fits = device == LARGE or count < 4
        records.append(point("batch", batch, metrics, device) if fits else no_memory("batch", batch, device))
        turns = {"image_px": 2240, "turns": count, "decode_tokens": 512}
        if count < 4:
            records.append(point("turns", turns, metrics, device))
    return records


def _image(px: int, **changes: Any) -> dict[str, Any]:
    return {"image_px": px, "images": 1, "text_tokens": 15} | changes


def _size(px: int) -> dict[str, float]:
    side = round(min(px, LARGEST_PX) / 28)
    return {"visual_tokens": float(side**2), "clamped": float(px > LARGEST_PX)}


def _latency(px: int, device: str, slow: float) -> Record:
    """The baseline does not fit at 5600 px on the small GPU."""
    time = slow * min(px, LARGEST_PX) / 2
    parts = of_systems(**{f"part:{part}_ms": share * time for part, share in PARTS.items()})
    quantize = {f"{name}.part:quantize and norm_ms": 0.05 * time for name in SPEEDS if "bf16" not in name}
    figures = of_systems(prefill_ms=time, limit_ms=time / 2, launch_gap_ms=0.01 * time)
    failures = {"bf16-eager": "out of memory: 24 GiB wanted"} if (device, px) == (SMALL, 5600) else {}
    return point("latency", _image(px), _size(px) | figures | parts | quantize, device, failures)


def _memory(px: int, device: str) -> Record:
    weights = {name: 2.0**30 * (15 if "bf16" in name else 5) for name in SPEEDS}
    metrics = _size(px)
    for name, own in weights.items():
        activations, cache = px * 2.0**20, px * 2.0**18
        metrics |= {
            f"{name}.weights_bytes": own,
            f"{name}.activations_bytes": activations,
            f"{name}.kv_cache_bytes": cache,
            f"{name}.peak_bytes": own + activations + cache,
        }
    failures = {"bf16-eager": "out of memory: 24 GiB wanted"} if (device, px) == (SMALL, 5600) else {}
    return point("memory", _image(px), metrics, device, failures)
