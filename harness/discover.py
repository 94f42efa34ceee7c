"""Methods and models by name, through entry points; nothing is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

from mqbench.harness.errors import PluginError, UnknownNameError

if TYPE_CHECKING:
    from mqbench.harness.models.adapter import ModelAdapter
    from mqbench.harness.models.family import Family
    from mqbench.harness.quant.session import Quantizer

METHOD_GROUP = "mqbench.methods"
MODEL_GROUP = "mqbench.models"
FAMILY_GROUP = "mqbench.families"
METHOD_NEEDS = ("name", "aliases", "summary", "quantize")
FAMILY_NEEDS = ("name", "build", "layout", "tiny_config", "tiny_inputs", "configs")
ADAPTER_NEEDS = ("name", "paper_name", "how_to_get", "find_weights", "load", "encode", "generate")


@dataclass(frozen=True)
class Registry:
    """What was found: healthy plug-ins by name, and one error per broken one."""

    found: dict[str, Any] = field(default_factory=dict)
    broken: tuple[PluginError, ...] = ()


def registered(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, by name. Reads metadata only."""
    return tuple(sorted(entry_points(group=group), key=lambda point: point.name))


def find_method(name: str) -> Quantizer:
    """A method by name or alias.

    Raises:
        UnknownNameError: nobody registers it.
        PluginError: its package is broken.
    """
    for point in registered(METHOD_GROUP):
        if point.name == name:
            return cast("Quantizer", _load_method(point))
    registry = all_methods()
    for method in registry.found.values():
        if name in method.aliases:
            return cast("Quantizer", method)
    raise _unknown("method", name, registry)


def all_methods() -> Registry:
    """Every method, broken plug-ins kept apart, so that one of them cannot hide the others."""
    return _collect(METHOD_GROUP, lambda point: [_load_method(point)])


def find_model(name: str) -> ModelAdapter:
    """A model adapter by name.

    Raises:
        UnknownNameError: nobody registers it.
        PluginError: nobody healthy registers it, and a registered package is broken.
    """
    return cast("ModelAdapter", _named("model", name, all_models()))


def all_models() -> Registry:
    """Every model adapter, broken plug-ins kept apart."""
    return _collect(MODEL_GROUP, _load_adapters)


def find_family(name: str) -> Family:
    """A model family by name, with what proves its layout.

    Raises:
        UnknownNameError: nobody registers it.
        PluginError: nobody healthy registers it, and a registered package is broken.
    """
    return cast("Family", _named("family", name, all_families()))


def all_families() -> Registry:
    """Every model family, broken plug-ins kept apart."""
    return _collect(FAMILY_GROUP, lambda point: [_load_family(point)])


def family_of(model: str) -> Family:
    """The family of a registered model: the one that lists it in ``configs``, or whose module has the adapter's class.

    Raises:
        UnknownNameError: no such model.
        PluginError: no healthy family has it, so nothing can be proved.
    """
    adapter = find_model(model)
    registry = all_families()
    for family in registry.found.values():
        if model in family.configs:
            return cast("Family", family)
    points = {point.module: point for point in registered(FAMILY_GROUP)}
    for base in type(adapter).__mro__:  # a subclass comes before the family that it builds on
        if base.__module__ in points:
            return cast("Family", _load_family(points[base.__module__]))
    broken = f"; also, {registry.broken[0]}" if registry.broken else ""
    raise PluginError(
        f"no family of group '{FAMILY_GROUP}' lists model '{model}' in its configs; register one to prove it{broken}"
    )


def method_version(method: Quantizer) -> str:
    """Version that the method declares as ``version``; part of every cell's key."""
    return str(getattr(method, "version", "1"))


def _named(kind: str, name: str, registry: Registry) -> Any:
    if name not in registry.found:
        raise _unknown(kind, name, registry)
    return registry.found[name]


def _collect(group: str, load: Any) -> Registry:
    found: dict[str, Any] = {}
    broken: list[PluginError] = []
    for point in registered(group):
        try:
            loaded = load(point)
        except PluginError as error:
            broken.append(error)
            continue
        for item in loaded:
            found.setdefault(item.name, item)
    return Registry(found, tuple(broken))


def _load_method(point: EntryPoint) -> Any:
    method = _load(point)
    _require(point, method, METHOD_NEEDS)
    return method


def _load_family(point: EntryPoint) -> Any:
    family = _load(point)
    _require(point, family, FAMILY_NEEDS)
    return family


def _load_adapters(point: EntryPoint) -> list[Any]:
    adapters = _load(point)
    if not isinstance(adapters, Iterable):
        raise PluginError(f"{_describe(point)} must name a list of adapters, not a {type(adapters).__name__}")
    listed = list(adapters)
    for adapter in listed:
        _require(point, adapter, ADAPTER_NEEDS)
    return listed


def _load(point: EntryPoint) -> Any:
    # Importing a plug-in runs foreign code, which can fail in any way; the error that users see names it.
    try:
        return point.load()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(
            f"{_describe(point)} cannot be loaded ({reason}); repair or uninstall that package"
        ) from error


def _require(point: EntryPoint, item: Any, names: Iterable[str]) -> None:
    missing = list(_missing(item, names))
    if missing:
        raise PluginError(f"{_describe(point)} lacks {', '.join(missing)}; repair or uninstall that package")


def _missing(item: Any, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not hasattr(item, name))


def _describe(point: EntryPoint) -> str:
    package = "" if point.dist is None else f" of package '{point.dist.name}'"
    return f"plug-in '{point.name} = {point.value}'{package}"


def _unknown(kind: str, name: str, registry: Registry) -> UnknownNameError | PluginError:
    aliases = {alias for item in registry.found.values() for alias in getattr(item, "aliases", ())}
    unknown = UnknownNameError(kind, name, {*registry.found, *aliases})
    return PluginError(f"{unknown}; also, {registry.broken[0]}") if registry.broken else unknown
