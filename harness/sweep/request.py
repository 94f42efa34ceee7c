"""What a user asks a sweep for, and every check that needs no model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqbench.harness.errors import RequestError, UnknownNameError
from mqbench.harness.request import parse_options
from mqbench.harness.store import DEFAULT_OUT
from mqbench.harness.sweep.measure import Settings
from mqbench.harness.sweep.model import STANDIN, find_sweep_model
from mqbench.harness.sweep.spec import ATTENTION, CHECK, PAPER, QUANTIZE, Point, points_of

CPU, CUDA = "cpu", "cuda"
PAPER_MODEL = "qwen2-vl-7b"
CPU_MEANING = "'--device cpu' checks on small inputs that everything runs, its times say nothing about speed"
DTYPES: Mapping[str, str] = {CPU: "float32", CUDA: "bfloat16"}


@dataclass(frozen=True)
class SweepRequest:
    """Options of ``mqbench sweep NAME``; None and empty ones leave the protocol as it is.

    Attributes:
        sizes: Values by size, as comma-separated text.
    """

    sweep: str
    model: str | None = None
    config: Path | None = None
    settings: tuple[str, ...] = ()
    max_pixels: int | None = None
    systems: str | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    repeats: int | None = None
    seed: int = 0
    device: str = CUDA
    out: Path = DEFAULT_OUT


def resolve(request: SweepRequest) -> tuple[tuple[Point, ...], Settings]:
    """The points and how to measure them. Nothing that takes memory is built.

    Raises:
        RequestError: an option makes no sense, or this machine has no such device.
        UnknownNameError: no such model, system, size or entry.
    """
    kind, devices = check_devices(request.device, request.sweep)
    profile = CHECK if kind == CPU else PAPER
    name = request.model
    if name is None and request.config is None:
        name = STANDIN if kind == CPU else PAPER_MODEL
    model = find_sweep_model(name, request.config, parse_options(request.settings), request.max_pixels)
    systems = None if request.systems is None else _names(request.systems)
    changes = {key: _values(key, text) for key, text in request.sizes.items()}
    points = points_of(request.sweep, profile, changes, systems, request.repeats)
    check_systems(request.sweep, points[0].systems)
    if request.seed < 0:
        raise RequestError(f"--seed must be at least 0, got {request.seed}")
    model.check()
    return points, Settings(devices[0], DTYPES[kind], request.seed, model, devices[1:])


def check_devices(text: str, sweep: str) -> tuple[str, tuple[str, ...]]:
    """Kind and names of the devices that a model is spread over, mostly one.

    Raises:
        RequestError: one is not there or named twice, or the sweep needs a single one.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip()) or (text,)
    kinds = [check_device(name) for name in names]
    if len(names) > 1 and (CPU in kinds or CUDA in names or len(set(names)) < len(names)):
        raise RequestError(f"--device '{text}': several devices are different GPUs with numbers, cuda:0,cuda:1")
    if len(names) > 1 and sweep in (ATTENTION, QUANTIZE):
        raise RequestError(f"'mqbench sweep {sweep}' runs on one device; give one to --device")
    return kinds[0], names


def check_device(device: str) -> str:
    """Its kind, ``cpu`` or ``cuda``.

    Raises:
        RequestError: it is not there, or kernels would be interpreted.
    """
    kind, _, index = device.partition(":")
    if kind not in (CPU, CUDA) or (index and not index.isdigit()):
        raise RequestError(f"unknown device '{device}'; use cuda, cuda:N or cpu")
    if kind == CPU:
        return kind
    import torch

    if int(index or 0) >= torch.cuda.device_count():
        raise RequestError(f"no NVIDIA GPU for '{device}'; {CPU_MEANING}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RequestError("TRITON_INTERPRET=1 interprets kernels on the CPU; unset it to measure them")
    return kind


def check_systems(sweep: str, names: Sequence[str]) -> None:
    """Raises ``UnknownNameError`` for a name that the sweep does not know, ``RequestError`` for simulated ones."""
    if sweep == QUANTIZE:
        from mqbench.harness.discover import find_method

        for name in names:
            find_method(name)
        return
    if sweep == ATTENTION:
        from mqbench.harness.sweep.attention import contenders

        return _check_known("attention", names, contenders())
    from mqbench.harness.discover import METHOD_GROUP, registered
    from mqbench.harness.runtime.systems import SYSTEMS

    methods = {point.name for point in registered(METHOD_GROUP)}
    for name in names:
        if name not in SYSTEMS and name in methods:
            raise RequestError(
                f"'{name}' is a method: its arithmetic is simulated and has no latency; systems: {', '.join(SYSTEMS)}"
            )
    _check_known("system", names, SYSTEMS)


def _check_known(kind: str, names: Sequence[str], known: Sequence[str] | Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UnknownNameError(kind, name, known)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise RequestError("--systems names nothing; give at least one, separated by commas")
    return names


def _values(key: str, text: str) -> list[Any]:
    """``"280,560"`` as integers; bit settings stay text."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    option = "--" + key.replace("_", "-")
    if not words:
        raise RequestError(f"{option} is empty; give whole numbers, separated by commas")
    if key == "bits":
        return words
    if not all(word.lstrip("-").isdigit() for word in words):
        raise RequestError(f"{option} takes whole numbers, separated by commas; got '{text}'")
    return [int(word) for word in words]
