"""How long quantizing takes from end to end: a method on random weights and random calibration samples."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from mqbench.harness.discover import find_method
from mqbench.harness.errors import MQBenchError
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.session import Batch
from mqbench.harness.sweep.device import clock_of, memory_of
from mqbench.harness.sweep.figures import TOTAL
from mqbench.harness.sweep.inputs import make_turns
from mqbench.harness.sweep.measure import Settings
from mqbench.harness.sweep.outcome import OK, Outcome, note_of, summary
from mqbench.harness.sweep.protocol import figures
from mqbench.harness.sweep.spec import Point, QuantizeWork

ATTENTION = "sdpa"


def measure_quantize(point: Point, settings: Settings, skip: Mapping[str, str]) -> Outcome:
    """Times ``quantize`` of every method of the point, each on a model of its own; making the model is not timed.

    Raises:
        UnknownNameError: no such method.
    """
    work = point.work
    assert isinstance(work, QuantizeWork)
    device = torch.device(settings.device)
    metrics: dict[str, float] = {**figures(work.shape, settings.model.rules), "samples": float(work.samples)}
    arrays: dict[str, tuple[float, ...]] = {}
    notes, scores = dict(skip), {}
    for name in point.systems:
        if name in notes:
            continue
        try:
            samples, found = _measure(name, work, point.repeats, settings, device)
        except MQBenchError:
            raise
        except Exception as error:  # the record's note says what happened
            notes[name] = note_of(error)
            memory_of(device).release()
            continue
        arrays |= {f"{name}.{figure}": tuple(values) for figure, values in samples.items()}
        metrics |= summary(name, samples) | {f"{name}.{figure}": value for figure, value in found.items()}
        notes[name], scores[name] = OK, metrics[f"{name}.{TOTAL}"]
    return Outcome(metrics, arrays, notes, scores)


def _measure(
    name: str, work: QuantizeWork, repeats: int, settings: Settings, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Raw samples, and the memory's peak beyond the float model."""
    from mqbench.harness.models.qwen2_vl import qwen2_vl_layout

    method, clock, memory = find_method(name), clock_of(device), memory_of(device)
    vision, text = parse_bits(work.bits)
    recipe = Recipe(method.name, vision, text, settings.seed)
    samples: dict[str, list[float]] = {}
    peaks = []
    for _ in range(repeats):
        model = random_model(settings, device)
        batches = random_batches(work, settings, model, device)
        run = partial(method.quantize, model, qwen2_vl_layout(model), recipe, batches)
        clock.wait()
        started = time.perf_counter()
        # On a CPU memory is not watched: the profiler that sees it would be most of the time.
        report, watched = memory.watch(run) if device.type == "cuda" else (run(), None)
        clock.wait()
        samples.setdefault(TOTAL, []).append((time.perf_counter() - started) * 1e3)
        for step, seconds in report.step_s.items():
            samples.setdefault(f"step:{step}_ms", []).append(seconds * 1e3)
        peaks += [float(watched.peak_bytes)] if watched else []
        del model, batches, run
        memory.release()
    return samples, {"quantize_peak_bytes": max(peaks)} if peaks else {}


def random_model(settings: Settings, device: torch.device) -> Any:
    """A Transformers model with the random weights that its class starts with."""
    from transformers import Qwen2VLForConditionalGeneration

    config, dtype = settings.model.build_config(), getattr(torch, settings.dtype)
    torch.manual_seed(settings.seed)
    with torch.device(device) if device.type == "cuda" else nullcontext():
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    return model.to(device).eval().requires_grad_(False)


def random_batches(work: QuantizeWork, settings: Settings, model: Any, device: torch.device) -> list[Batch]:
    """One sample per batch, each with pixels and text of its own."""
    rules, dtype = settings.model.rules, getattr(torch, settings.dtype)
    return [
        make_turns(work.shape, rules, model.config, device=device, dtype=dtype, seed=settings.seed + number)[
            0
        ].as_batch()
        for number in range(work.samples)
    ]
