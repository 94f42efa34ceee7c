"""Bit settings: every word of the grammar, what it means, and what it refuses."""

from __future__ import annotations

import itertools

import pytest

from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Scheme, Strategy, parse_bits, scheme_named

WEIGHTS = {"16": None} | {str(bits): QuantArgs(bits, strategy=Strategy.CHANNEL) for bits in range(2, 9)}
ACTIVATIONS = {"16": None, "16int": QuantArgs(16)} | {str(bits): QuantArgs(bits) for bits in range(4, 9)}


@pytest.mark.parametrize(("weight", "activation"), list(itertools.product(WEIGHTS, ACTIVATIONS)))
def test_every_pair_of_bits(weight: str, activation: str) -> None:
    name = f"w{weight}a{activation}"
    assert scheme_named(name) == Scheme(WEIGHTS[weight], ACTIVATIONS[activation])
    expected = "float" if name == "w16a16" else name
    assert parse_bits(f"float/{name.upper()}") == ("float", expected)


@pytest.mark.parametrize("group_size", [1, 64, 128, 1000])
def test_group_sizes_belong_to_the_weights(group_size: int) -> None:
    scheme = scheme_named(f"w4a8-g{group_size}")
    assert scheme.weights == QuantArgs(4, strategy=Strategy.GROUP, group_size=group_size)
    assert scheme.activations == QuantArgs(8)


def test_one_setting_stands_for_both_towers() -> None:
    assert parse_bits(" w4a16-g128 ") == ("w4a16-g128", "w4a16-g128")
    assert parse_bits("w8a8/w4a8") == ("w8a8", "w4a8")
    assert parse_bits("w16a16") == parse_bits("float") == ("float", "float")
    assert Recipe("rtn", *parse_bits("w16a16/w4a4")).bits == "float/w4a4"


@pytest.mark.parametrize(
    "text",
    ["", "w1a8", "w9a8", "w4a3", "w4", "a8", "w4a8-g0", "w4a8g64", "w4a8-g", "w16a8-g64", "w16inta8", "int4"],
)
def test_a_wrong_side_teaches_the_grammar(text: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"unknown bit setting '{text}'; write VISION/LLM.*w8a8/w4a8"):
        parse_bits(f"float/{text}")


def test_three_sides_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown bit setting 'w8a8/w8a8/w8a8'; write VISION/LLM"):
        parse_bits("w8a8/w8a8/w8a8")


def test_label_names_options_by_name_and_json_value() -> None:
    assert Recipe("mquant").label == "mquant"
    options = {"rms_x0_bits": None, "aifs": False, "rms_rule": "norm", "percdamp": 0.02}
    label = 'mquant[aifs=false,percdamp=0.02,rms_rule="norm",rms_x0_bits=null]'
    assert Recipe("mquant", options=options).label == label
    assert Recipe("mquant", options=dict(reversed(options.items()))).label == label
