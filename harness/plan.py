"""From a request to the cells that must run. Everything that can be wrong with a request is found here, early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mqbench.harness import discover
from mqbench.harness.environment import device_kind
from mqbench.harness.errors import CalibrationError, RequestError, UnknownNameError
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.record import CalibrationInfo, Cell, Record
from mqbench.harness.select import FLOAT_METHOD
from mqbench.harness.sources import Source, find_sources
from mqbench.harness.store import DEFAULT_OUT, RecordStore

if TYPE_CHECKING:
    from mqbench.harness.datasets.calibration import Calibration
    from mqbench.harness.datasets.files import TaskData
    from mqbench.harness.quant.session import Quantizer

TABLE3_METHODS = ("rtn", "smoothquant", "quarot", "mquant")
TABLE3_BITS = ("w8a8/w4a8", "w4a8/w4a8")
AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
FLOAT_RECIPE = Recipe(FLOAT_METHOD)


@dataclass(frozen=True)
class Request:
    """What a user asks ``mqbench eval`` for; see its help for each option."""

    models: tuple[str, ...] = ("all",)
    methods: tuple[str, ...] = TABLE3_METHODS
    tasks: tuple[str, ...] = ("all",)
    bits: tuple[str, ...] = TABLE3_BITS
    limit: int | None = None
    seed: int = 0
    calib_samples: int = 256
    calib_split: str = "mixed"
    device: str = "cpu"
    dtype: str = AUTO
    out: Path = DEFAULT_OUT
    data_dir: Path | None = None
    models_dir: Path | None = None
    jobs: int | None = None
    batch_size: int = 16

    @property
    def torch_dtype(self) -> str:
        """``auto`` is float32 on CPU, where it is fastest, and bfloat16, the checkpoints' own, on a GPU."""
        if self.dtype != AUTO:
            return self.dtype
        return "bfloat16" if self.device.startswith("cuda") else "float32"


@dataclass(frozen=True)
class Group:
    """Cells that share one quantized model: it is loaded and quantized once for all of them."""

    source: Source
    recipe: Recipe
    calibration: CalibrationInfo | None
    cells: tuple[Cell, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """A model that was quantized before brings its scales along."""
        return self.source.quantized is None and self.calibration is not None

    @property
    def label(self) -> str:
        return f"{self.source.label} {self.recipe.method} {self.recipe.bits}"


@dataclass(frozen=True)
class Plan:
    """What a request comes to.

    Attributes:
        request: The request.
        cells: Every cell asked for, in the order of the table.
        groups: What must run: the cells without an ok record.
        records: Newest records of this folder by cell key.
        missing: Registered models without weights -> how to get them.
        num_rows: Rows to evaluate by task.
    """

    request: Request
    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]
    records: Mapping[str, Record] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    num_rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_to_run(self) -> int:
        return sum(len(group.cells) for group in self.groups)


@dataclass(frozen=True)
class _Inputs:
    """The checked parts of a request."""

    methods: tuple[Quantizer, ...]
    bits: tuple[tuple[str, str], ...]
    data: Mapping[str, TaskData]
    calibration: Calibration | None
    device: str


def expand(request: Request) -> Plan:
    """Checks a request and lists what must run.

    Raises:
        MQBenchError: one of its kinds for each thing that can be wrong: unknown names, missing or damaged weights,
            unusable data, an empty or overlapping calibration set, a folder that cannot be written.
    """
    methods = resolve_methods(request.methods)
    bits = resolve_bits(request.bits)
    device = check_device(request)
    store = RecordStore(request.out)
    store.prepare()
    sources = find_sources(request.models, request.models_dir)
    data = load_data(request)
    quantizes = any(source.recipe is None and not source.only_baseline for source in sources.found)
    calibration = load_calibration_set(request, quantizes and needs_calibration(methods, bits))
    check_overlap(data, calibration, sources.found)
    inputs = _Inputs(methods, bits, data, calibration, device)
    groups = [group for source in sources.found for group in _groups_of(source, request, inputs)]
    records = store.latest()
    return Plan(
        request=request,
        cells=tuple(cell for group in groups for cell in group.cells),
        groups=tuple(rest for group in groups if (rest := _without_done(group, records)).cells),
        records=records,
        missing=sources.missing,
        num_rows={name: len(rows) for name, rows in data.items()},
    )


def resolve_methods(names: Sequence[str]) -> tuple[Quantizer, ...]:
    """Methods by name or alias, each once. The float baseline is always planned, so ``none`` adds nothing.

    Raises:
        UnknownNameError: a name is not registered.
    """
    methods = {method.name: method for method in map(discover.find_method, names)}
    methods.pop(FLOAT_METHOD, None)
    return tuple(methods.values())


def resolve_bits(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(vision, text) presets, each pair once.

    Raises:
        UnknownNameError: a part is no preset.
        RequestError: nothing would be quantized.
    """
    pairs = tuple(dict.fromkeys(parse_bits(text) for text in texts))
    if ("float", "float") in pairs:
        raise RequestError("bits 'float/float' quantize nothing; the float baseline always runs, leave them out")
    return pairs


def check_device(request: Request) -> str:
    """The device's kind.

    Raises:
        UnknownNameError: no such dtype.
        RequestError: a number that makes no sense, or a device that torch cannot use.
    """
    if request.dtype not in (AUTO, *DTYPES):
        raise UnknownNameError("dtype", request.dtype, (AUTO, *DTYPES))
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
    return device_kind(request.device)


def load_data(request: Request) -> dict[str, TaskData]:
    """The rows of every task asked for.

    Raises:
        UnknownNameError: no such task.
        DatasetError: a file is unusable.
    """
    from mqbench.harness.datasets.catalog import find_tasks
    from mqbench.harness.datasets.files import load_task

    tasks = find_tasks(request.tasks)
    if not tasks:
        raise RequestError("no task to evaluate; give --tasks, or see 'mqbench tasks'")
    return {task.name: load_task(task, request.data_dir, request.limit) for task in tasks}


def needs_calibration(methods: Sequence[Quantizer], bits: Sequence[tuple[str, str]]) -> bool:
    """Whether any recipe of a request reads calibration samples."""
    return any(_needs_data(method, Recipe(method.name, *pair)) for method in methods for pair in bits)


def load_calibration_set(request: Request, needed: bool) -> Calibration | None:
    """The calibration set, or None when nothing reads it.

    Raises:
        CalibrationError: it is empty or has fewer samples than asked for.
    """
    from mqbench.harness.datasets.calibration import load_calibration

    if not needed:
        return None
    return load_calibration(request.calib_split, request.calib_samples, request.seed, request.data_dir)


def check_overlap(data: Mapping[str, TaskData], calibration: Calibration | None, sources: Sequence[Source]) -> None:
    """No evaluated row was calibrated on, now or when a quantized folder was made.

    Raises:
        CalibrationError: one was.
    """
    for rows in data.values():
        if calibration is not None:
            calibration.refuse_overlap(rows)
        for source in sources:
            seen = source.provenance is not None and set(source.provenance.prompt_hashes) & set(rows.prompt_hashes)
            if seen:
                raise CalibrationError(
                    f"'{source.quantized}' was calibrated on {len(seen)} evaluated row(s) of {rows.source}; "
                    "quantize again with another --calib-split or --data-dir"
                )


def calibration_info(calibration: Calibration) -> CalibrationInfo:
    """The form that records keep: a user's folder is named without its path."""
    dataset = "shipped" if calibration.dataset == "shipped" else "data-dir"
    return CalibrationInfo(dataset, calibration.split, calibration.num_samples, calibration.seed, calibration.hash)


def _groups_of(source: Source, request: Request, inputs: _Inputs) -> list[Group]:
    if source.recipe is not None and source.provenance is not None:
        version, calibration = source.provenance.method_version, source.provenance.calibration
        return [_group(source, source.recipe, version, calibration, request, inputs)]
    float_version = discover.method_version(discover.find_method(FLOAT_METHOD))
    groups = [_group(source, FLOAT_RECIPE, float_version, None, request, inputs)]
    if source.only_baseline:
        return groups
    info = None if inputs.calibration is None else calibration_info(inputs.calibration)
    for vision, text in inputs.bits:
        for method in inputs.methods:
            recipe = Recipe(method.name, vision, text, request.seed)
            used = info if _needs_data(method, recipe) else None
            groups.append(_group(source, recipe, discover.method_version(method), used, request, inputs))
    return groups


def _group(
    source: Source, recipe: Recipe, version: str, calibration: CalibrationInfo | None, request: Request, inputs: _Inputs
) -> Group:
    cells = tuple(
        Cell(
            model=source.label,
            weights_sha256=source.weights_sha256,
            recipe=recipe,
            method_version=version,
            task=task,
            limit=request.limit,
            data_sha256=rows.content_hash,
            calibration=calibration,
            device=inputs.device,
            dtype=request.torch_dtype,
            batch_size=request.batch_size,
        )
        for task, rows in inputs.data.items()
    )
    return Group(source, recipe, calibration, cells)


def _without_done(group: Group, records: Mapping[str, Record]) -> Group:
    keys = {key for key, record in records.items() if record.ok}
    return replace(group, cells=tuple(cell for cell in group.cells if cell.key not in keys))


def _needs_data(method: Quantizer, recipe: Recipe) -> bool:
    """Methods may offer ``needs_data(recipe)``; one that does not is taken to calibrate."""
    needs_data = getattr(method, "needs_data", None)
    return True if needs_data is None else bool(needs_data(recipe))
