"""What a user asks for, and every check that needs neither data nor weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqbench.harness import discover
from mqbench.harness.environment import device_kind
from mqbench.harness.errors import RequestError, UnknownNameError
from mqbench.harness.quant.options import check_options, declared_defaults
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.record import INTEGER, SIMULATED
from mqbench.harness.select import FLOAT_METHOD
from mqbench.harness.store import DEFAULT_OUT

if TYPE_CHECKING:
    from mqbench.harness.quant.session import Quantizer

TABLE3_METHODS = ("rtn", "smoothquant", "quarot", "mquant")
TABLE3_BITS = ("w8a8/w4a8", "w4a8/w4a8")
AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16", "float64")
BACKENDS = (SIMULATED, INTEGER)
LOCAL, RAY = "local", "ray"
EXECUTORS = (LOCAL, RAY)


@dataclass(frozen=True)
class Request:
    """What a user asks ``mqbench eval`` for; see its help for each option.

    Attributes:
        options: Recipe options by ``KEY`` (every method that knows it) or ``METHOD.KEY``.
        executor: Who runs groups: worker processes of this machine, or a Ray cluster.
        offload: Transformer blocks wait in host memory and come to the device one at a time.
        trust_remote_code: Models that need it may run code from their own files.
    """

    models: tuple[str, ...] = ("all",)
    methods: tuple[str, ...] = TABLE3_METHODS
    tasks: tuple[str, ...] = ("all",)
    bits: tuple[str, ...] = TABLE3_BITS
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    calib_samples: int = 256
    calib_split: str = "mixed"
    device: str = "cpu"
    dtype: str = AUTO
    backend: str = SIMULATED
    out: Path = DEFAULT_OUT
    data_dir: Path | None = None
    models_dir: Path | None = None
    jobs: int | None = None
    batch_size: int = 16
    offload: bool = False
    executor: str = LOCAL
    trust_remote_code: bool = False

    @property
    def torch_dtype(self) -> str:
        """``auto`` is float32 on CPU, where it is fastest, and bfloat16, the checkpoints' own, on a GPU."""
        if self.dtype != AUTO:
            return self.dtype
        return "bfloat16" if self.device.startswith("cuda") else "float32"


def resolve_methods(names: Sequence[str]) -> tuple[Quantizer, ...]:
    """Methods by name or alias, each once. The float baseline is always planned, so ``none`` adds nothing.

    Raises:
        UnknownNameError: a name is not registered.
    """
    methods = {method.name: method for method in map(discover.find_method, names)}
    methods.pop(FLOAT_METHOD, None)
    return tuple(methods.values())


def resolve_bits(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(vision, text) settings, each pair once.

    Raises:
        UnknownNameError: a part is no bit setting.
        RequestError: nothing would be quantized.
    """
    pairs = tuple(dict.fromkeys(parse_bits(text) for text in texts))
    if ("float", "float") in pairs:
        raise RequestError("bits 'float/float' quantize nothing; the float baseline always runs, leave them out")
    return pairs


def check_device(request: Request) -> str:
    """The device's kind.

    Raises:
        UnknownNameError: no such dtype, backend or executor.
        RequestError: a number that makes no sense, or a device that torch cannot use.
    """
    if request.dtype not in (AUTO, *DTYPES):
        raise UnknownNameError("dtype", request.dtype, (AUTO, *DTYPES))
    if request.backend not in BACKENDS:
        raise UnknownNameError("backend", request.backend, BACKENDS)
    if request.executor not in EXECUTORS:
        raise UnknownNameError("executor", request.executor, EXECUTORS)
    if request.executor == RAY:
        from mqbench.harness.ray_run import import_ray

        import_ray()
    for name, value in (("--batch-size", request.batch_size), ("--jobs", request.jobs), ("--limit", request.limit)):
        if value is not None and value < 1:
            raise RequestError(f"{name} must be at least 1, got {value}")
    kind, _, index = request.device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise RequestError(f"unknown device '{request.device}'; use cpu, cuda or cuda:N")
    if kind == "cuda":
        import torch

        if int(index or 0) >= torch.cuda.device_count():
            raise RequestError(f"device '{request.device}' is not there; torch sees {torch.cuda.device_count()} GPU(s)")
    elif request.offload:
        raise RequestError("--offload keeps blocks in host memory, and so does '--device cpu' anyway; leave one out")
    return device_kind(request.device)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """``["rms=false", "mquant.rms_rule=norm"]`` as a mapping; values are JSON where they parse, ``none`` is null.

    Raises:
        RequestError: a word has no ``=``.
    """
    options = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not name.strip():
            raise RequestError(f"'{word}' sets nothing; write --set KEY=VALUE or --set METHOD.KEY=VALUE")
        options[name.strip()] = _parse_value(value.strip())
    return options


def recipes_of(request: Request, methods: Sequence[Quantizer], pairs: Sequence[tuple[str, str]]) -> list[Recipe]:
    """Every quantization asked for, in the order of the table: bit settings, and methods within them.

    Raises:
        UnknownNameError: an option that no method asked for has, or a value that is none of its choices.
        RequestError: a value of the wrong kind.
    """
    options = {method.name: options_of(method, request.options) for method in methods}
    _check_used(request.options, methods)
    recipes = [
        Recipe(method.name, vision, text, request.seed, options[method.name])
        for vision, text in pairs
        for method in methods
    ]
    by_name = {method.name: method for method in methods}
    for recipe in recipes:
        check_options(by_name[recipe.method], recipe)
    return recipes


def options_of(method: Quantizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options meant for one method, those at their default left out: equal recipes get equal records.

    A plug-in that declares no options is given all of them.
    """
    declared = getattr(method, "options", None)
    known = None if declared is None else {option.name for option in declared}
    wanted = {key: value for key, value in options.items() if "." not in key and (known is None or key in known)}
    prefix = f"{method.name}."
    wanted |= {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
    defaults = declared_defaults(declared or ())
    return {key: value for key, value in wanted.items() if key not in defaults or defaults[key] != value}


def _check_used(options: Mapping[str, Any], methods: Sequence[Quantizer]) -> None:
    if any(getattr(method, "options", None) is None for method in methods):
        return
    declared = {option.name for method in methods for option in getattr(method, "options", ())}
    prefixes = tuple(f"{method.name}." for method in methods)
    for name in options:
        if name not in declared and not name.startswith(prefixes):
            raise UnknownNameError("recipe option", name, declared)


def _parse_value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
