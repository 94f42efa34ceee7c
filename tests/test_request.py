"""Recipe options on their way from the command line into recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from mqbench.harness.errors import MQBenchError, RequestError, UnknownNameError
from mqbench.harness.quant.options import Option
from mqbench.harness.request import Request, options_of, parse_options, recipes_of, resolve_methods


@dataclass(frozen=True)
class Method:
    name: str
    options: tuple[Option, ...] | None


ONE = Method("one", (Option("rms", True, kind=bool), Option("rule", "a", choices=("a", "b"))))
TWO = Method("two", (Option("rms", True, kind=bool), Option("bits", 8, kind=int)))


def options_by_method(options: dict[str, Any], methods: tuple[Any, ...] = (ONE, TWO)) -> dict[str, dict[str, Any]]:
    recipes = recipes_of(Request(options=options), methods, [("w4a8", "w4a8")])
    return {recipe.method: dict(recipe.options) for recipe in recipes}


def test_words_become_values_of_their_kind() -> None:
    words = ["rms=false", "two.bits=4", "rule=b", "kv_bits=none", "percentile=1.0", "name=mse"]
    expected = {"rms": False, "two.bits": 4, "rule": "b", "kv_bits": None, "percentile": 1.0, "name": "mse"}
    assert parse_options(words) == expected


@pytest.mark.parametrize("word", ["rms", "=false"])
def test_a_word_without_a_key_or_value_is_refused(word: str) -> None:
    with pytest.raises(RequestError, match="write --set KEY=VALUE"):
        parse_options([word])


def test_a_plain_key_reaches_every_method_that_has_it_and_a_named_one_only_its_own() -> None:
    assert options_by_method({"rms": False}) == {"one": {"rms": False}, "two": {"rms": False}}
    assert options_by_method({"two.rms": False, "rule": "b"}) == {"one": {"rule": "b"}, "two": {"rms": False}}


def test_a_named_key_wins_over_a_plain_one() -> None:
    assert options_by_method({"rms": False, "one.rms": True}) == {"one": {}, "two": {"rms": False}}


def test_a_value_that_is_the_default_changes_no_recipe() -> None:
    assert options_by_method({"rms": True, "rule": "a"}) == {"one": {}, "two": {}}


def test_a_plug_in_without_declared_options_gets_them_all() -> None:
    assert options_of(Method("foreign", None), {"anything": 1, "one.rms": False}) == {"anything": 1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rsm": False}, UnknownNameError, "unknown recipe option 'rsm'; did you mean 'rms'"),
        ({"three.rms": False}, UnknownNameError, "unknown recipe option 'three.rms'"),
        ({"one.bits": 4}, UnknownNameError, "option of method 'one'"),
        ({"rule": "c"}, UnknownNameError, "unknown rule 'c'"),
        ({"bits": "four"}, RequestError, "option 'bits' takes a whole number"),
    ],
)
def test_what_no_method_takes_is_refused(options: dict[str, Any], error: type[MQBenchError], message: str) -> None:
    with pytest.raises(error, match=message):
        options_by_method(options)


def test_the_shipped_methods_declare_what_the_papers_ablations_switch() -> None:
    methods = {method.name: method for method in resolve_methods(("rtn", "smoothquant", "quarot", "mquant"))}
    mquant = {option.name for option in methods["mquant"].options}  # type: ignore[attr-defined]
    assert {"msq", "aifs", "ln2rms", "rotation", "online_hadamard", "rounding"} <= mquant
    assert {"rms", "rms_rule", "rms_side", "rms_x0_bits"} <= mquant
    for method in methods.values():
        names = {option.name for option in method.options}  # type: ignore[attr-defined]
        assert {"activations", "observer", "percentile", "zero_point"} <= names
