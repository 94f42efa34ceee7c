"""Discovery: lazy, tolerant of broken third-party packages, helpful with typos."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest

from mqbench.harness import discover
from mqbench.harness.errors import PluginError, UnknownNameError

Add = Callable[[str, str, object], None]


def make_method(name: str, *aliases: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, aliases=aliases, summary="", quantize=None, version="7")


def make_adapter(name: str) -> SimpleNamespace:
    return SimpleNamespace(**{**dict.fromkeys(discover.ADAPTER_NEEDS), "name": name})


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Registers an object under (group, name); an exception is raised when its module is imported."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(discover, "entry_points", lambda group: [point for point in points if point.group == group])

    def register(group: str, name: str, item: object) -> None:
        module = f"plugin_of_{name}"
        if not isinstance(item, Exception):
            fake = ModuleType(module)
            fake.ITEM = item  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module, fake)
        points.append(EntryPoint(name, f"{module}:ITEM", group))

    return register


@pytest.fixture
def methods(add: Add) -> dict[str, SimpleNamespace]:
    made = {name: make_method(name, *aliases) for name, aliases in {"alpha": ("a", "al"), "beta": ()}.items()}
    for name, method in made.items():
        add(discover.METHOD_GROUP, name, method)
    return made


def test_name_and_alias_find_the_same_method(methods: dict[str, SimpleNamespace]) -> None:
    assert discover.find_method("alpha") is methods["alpha"]
    assert discover.find_method("al") is methods["alpha"]
    assert discover.method_version(discover.find_method("a")) == "7"


def test_version_defaults_to_one(add: Add) -> None:
    method = make_method("old")
    del method.version
    add(discover.METHOD_GROUP, "old", method)
    assert discover.method_version(discover.find_method("old")) == "1"


def test_one_entry_point_registers_several_models(add: Add) -> None:
    adapters = [make_adapter("tiny"), make_adapter("huge")]
    add(discover.MODEL_GROUP, "family", adapters)
    assert discover.find_model("huge") is adapters[1]


def test_a_typo_gets_a_suggestion(methods: dict[str, SimpleNamespace], add: Add) -> None:
    add(discover.MODEL_GROUP, "family", [make_adapter("tiny")])
    with pytest.raises(UnknownNameError, match="unknown method 'alpah'; did you mean 'alpha'"):
        discover.find_method("alpah")
    with pytest.raises(UnknownNameError, match="unknown model 'tinny'; did you mean 'tiny'"):
        discover.find_model("tinny")
    with pytest.raises(UnknownNameError, match="known: a, al, alpha, beta"):
        discover.find_method("zzz")


def test_a_broken_package_is_named_and_hides_nothing(methods: dict[str, SimpleNamespace], add: Add) -> None:
    add(discover.METHOD_GROUP, "broken", ImportError())
    assert discover.find_method("a") is methods["alpha"]
    assert discover.all_methods().found == methods
    with pytest.raises(PluginError, match=r"'broken = plugin_of_broken:ITEM' cannot be loaded .*ModuleNotFoundError"):
        discover.find_method("broken")
    with pytest.raises(PluginError, match=r"unknown method 'alpah'; did you mean 'alpha'.* also, plug-in 'broken"):
        discover.find_method("alpah")


def test_a_plugin_that_lacks_something_is_refused(add: Add) -> None:
    add(discover.METHOD_GROUP, "half", SimpleNamespace(name="half", aliases=()))
    with pytest.raises(PluginError, match="lacks summary, quantize"):
        discover.find_method("half")
    add(discover.MODEL_GROUP, "single", make_adapter("single"))
    assert "must name a list of adapters" in str(discover.all_models().broken[0])


def test_other_plugins_are_not_imported(methods: dict[str, SimpleNamespace], add: Add) -> None:
    """The exact name of an entry point loads that one only, so a broken neighbour costs nothing."""
    add(discover.METHOD_GROUP, "aaa", ImportError())
    assert discover.find_method("beta") is methods["beta"]


def test_installed_methods_are_registered() -> None:
    names = {point.name for point in discover.registered(discover.METHOD_GROUP)}
    assert {"none", "rtn", "smoothquant", "quarot", "mquant"} <= names
