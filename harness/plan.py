"""From requests to the cells that must run. Everything that can be wrong with a request is found here, early."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mqbench.harness import discover
from mqbench.harness.backend import check_recipes
from mqbench.harness.errors import RequestError
from mqbench.harness.inputs import Inputs, TaskInput, modality_of
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import INTEGER, SIMULATED, CalibrationInfo, Cell, Record
from mqbench.harness.request import Request, check_device, recipes_of, resolve_bits, resolve_methods
from mqbench.harness.select import FLOAT_METHOD
from mqbench.harness.sources import ALL, Source, Sources, find_sources
from mqbench.harness.store import RecordStore
from mqbench.harness.tasks import Needs, TaskInfo, TaskKind, find_infos

if TYPE_CHECKING:
    from mqbench.harness.quant.session import Quantizer

FLOAT_RECIPE = Recipe(FLOAT_METHOD)
GroupKey = tuple[str, str, CalibrationInfo | None, str]


@dataclass(frozen=True)
class Group:
    """Cells that share one quantized model: it is loaded and quantized once for all of them."""

    source: Source
    recipe: Recipe
    calibration: CalibrationInfo | None
    cells: tuple[Cell, ...] = ()
    backend: str = SIMULATED

    @property
    def needs_calibration(self) -> bool:
        """A model that was quantized before brings its scales along."""
        return self.source.quantized is None and self.calibration is not None

    @property
    def label(self) -> str:
        return f"{self.source.label} {self.recipe.label} {self.recipe.bits}"


@dataclass(frozen=True)
class Plan:
    """What requests come to.

    Attributes:
        request: The first request: device, data and output folder are the same for all.
        cells: Every cell asked for, in the order of the table.
        groups: What must run: the cells without an ok record.
        records: Newest records of this folder by cell key.
        missing: Registered models without weights -> how to get them.
        num_rows: Rows to evaluate by cell key.
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
class _Wanted:
    """The checked parts of one request that need no files."""

    request: Request
    infos: tuple[TaskInfo, ...]
    methods: Mapping[str, Quantizer]
    recipes: Sequence[Recipe]
    device: str


def expand(request: Request) -> Plan:
    """Checks a request and lists what must run.

    Raises:
        MQBenchError: one of its kinds for each thing that can be wrong: unknown names and options, missing or damaged
            weights, unusable data, an empty or overlapping calibration set, a folder that cannot be written.
    """
    return expand_all([request])


def expand_all(requests: Sequence[Request]) -> Plan:
    """One plan for several requests: a cell that two of them ask for stands in it once.

    Raises:
        MQBenchError: as ``expand``.
    """
    wanted = [_wanted(request) for request in requests]
    store = RecordStore(requests[0].out)
    store.prepare()
    groups: dict[GroupKey, Group] = {}
    num_rows: dict[str, int] = {}
    missing: dict[str, str] = {}
    for one in wanted:
        sources = find_sources(one.request.models, one.request.models_dir, one.request.trust_remote_code)
        missing |= sources.missing
        for group in _groups_of_request(one, sources, num_rows):
            _merge(groups, group)
    records = store.latest()
    return Plan(
        request=requests[0],
        cells=tuple(cell for group in groups.values() for cell in group.cells),
        groups=tuple(rest for group in groups.values() if (rest := _without_done(group, records)).cells),
        records=records,
        missing=missing,
        num_rows=num_rows,
    )


def _wanted(request: Request) -> _Wanted:
    methods = resolve_methods(request.methods)
    pairs = resolve_bits(request.bits)
    infos = find_infos(request.tasks)
    if not infos:
        raise RequestError("no task to evaluate; give --tasks, or see 'mqbench tasks'")
    for info in infos:
        if info.kind is TaskKind.BLUEPRINT:
            raise RequestError(f"task '{info.name}' reads no weights; compute it with 'mqbench run --plan'")
        if info.kind is TaskKind.PROBE:
            _check_backend(info, request.backend)
    recipes = recipes_of(request, methods, pairs)
    device, by_name = check_device(request), {method.name: method for method in methods}
    check_recipes(request.backend, recipes, by_name)
    return _Wanted(request, infos, by_name, recipes, device)


def _check_backend(probe: TaskInfo, backend: str) -> None:
    if probe.compares_backends and backend != INTEGER:
        raise RequestError(f"task '{probe.name}' compares integers with the simulation; add --backend {INTEGER}")
    if backend == INTEGER and not probe.compares_backends:
        raise RequestError(f"task '{probe.name}' looks at float weights; leave --backend {INTEGER} out")


def _groups_of_request(wanted: _Wanted, sources: Sources, num_rows: dict[str, int]) -> list[Group]:
    inputs = Inputs(wanted.request)
    fitting = {source.label: _fitting(wanted, source) for source in sources.found}
    if not any(fitting.values()):
        names = ", ".join(info.name for info in wanted.infos)
        raise RequestError(f"no model asked for can run {names}; see 'mqbench models' and 'mqbench tasks'")
    groups: list[Group] = []
    for source in sources.found:
        if infos := fitting[source.label]:
            groups += _groups_of(source, infos, wanted, inputs, num_rows)
    inputs.check_overlap(sources.found)
    return groups


def _fitting(wanted: _Wanted, source: Source) -> tuple[TaskInfo, ...]:
    """The tasks that a model can run.

    Raises:
        RequestError: a model that was asked for by name can run none.
    """
    modality = modality_of(source)
    infos = tuple(info for info in wanted.infos if info.needs in (Needs.ANY, modality))
    if not infos and ALL not in wanted.request.models:
        names = ", ".join(info.name for info in wanted.infos)
        raise RequestError(f"model '{source.model}' is {modality}-only and cannot run {names}; give other --tasks")
    return infos


def _groups_of(
    source: Source, infos: Sequence[TaskInfo], wanted: _Wanted, inputs: Inputs, num_rows: dict[str, int]
) -> list[Group]:
    reads = {info: inputs.task(info, source) for info in infos}

    def group(recipe: Recipe, version: str, calibration: CalibrationInfo | None) -> Group:
        fitting = {info: read for info, read in reads.items() if info.fits(recipe.method == FLOAT_METHOD)}
        cells = tuple(_cell(source, recipe, version, calibration, info, read, wanted) for info, read in fitting.items())
        num_rows.update({cell.key: read.num_rows for cell, read in zip(cells, fitting.values(), strict=True)})
        return Group(source, recipe, calibration, cells, _backend_of(recipe, wanted))

    if source.recipe is not None and source.provenance is not None:
        return [group(source.recipe, source.provenance.method_version, source.provenance.calibration)]
    groups = [group(FLOAT_RECIPE, discover.method_version(discover.find_method(FLOAT_METHOD)), None)]
    for recipe in () if source.only_baseline else _recipes_for(source, wanted.recipes):
        method = wanted.methods[recipe.method]
        calibration = inputs.calibration(source) if needs_data(method, recipe) else None
        groups.append(group(recipe, discover.method_version(method), calibration))
    return groups


def _recipes_for(source: Source, recipes: Sequence[Recipe]) -> list[Recipe]:
    """A text-only model has no vision tower: settings that differ in it alone are one, those of it alone none."""
    if modality_of(source) is not Needs.TEXT:
        return list(recipes)
    text_only = [replace(recipe, vision="float") for recipe in recipes if recipe.text != "float"]
    return [recipe for number, recipe in enumerate(text_only) if recipe not in text_only[:number]]


def _cell(
    source: Source,
    recipe: Recipe,
    version: str,
    calibration: CalibrationInfo | None,
    info: TaskInfo,
    read: TaskInput,
    wanted: _Wanted,
) -> Cell:
    return Cell(
        model=source.label,
        weights_sha256=source.weights_sha256,
        recipe=recipe,
        method_version=version,
        task=info.name,
        limit=read.limit,
        data_sha256=read.data_sha256,
        calibration=read.calibration or calibration,
        device=wanted.device,
        dtype=wanted.request.torch_dtype,
        batch_size=wanted.request.batch_size,
        backend=_backend_of(recipe, wanted),
    )


def _backend_of(recipe: Recipe, wanted: _Wanted) -> str:
    """The float baseline has nothing to run in integers: it is the same cell under every backend."""
    return SIMULATED if recipe.method == FLOAT_METHOD else wanted.request.backend


def needs_data(method: Quantizer, recipe: Recipe) -> bool:
    """Methods may offer ``needs_data(recipe)``; one that does not is taken to calibrate."""
    asks = getattr(method, "needs_data", None)
    return True if asks is None else bool(asks(recipe))


def _merge(groups: dict[GroupKey, Group], new: Group) -> None:
    """Adds a group, or its cells to the group of the same quantized model."""
    recipe = f"{new.recipe.bits} {new.recipe.label} {new.recipe.seed}"
    key = new.source.label, recipe, new.calibration, new.backend
    old = groups.setdefault(key, replace(new, cells=()))
    known = {cell.key for cell in old.cells}
    groups[key] = replace(old, cells=(*old.cells, *(cell for cell in new.cells if cell.key not in known)))


def _without_done(group: Group, records: Mapping[str, Record]) -> Group:
    keys = {key for key, record in records.items() if record.ok}
    return replace(group, cells=tuple(cell for cell in group.cells if cell.key not in keys))


def rows_of(plan: Plan, cells: Iterable[Cell]) -> int:
    """Rows to evaluate in some of a plan's cells."""
    return sum(plan.num_rows[cell.key] for cell in cells)
