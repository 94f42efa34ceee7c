"""Options: what a method accepts, what it refuses and how, and that declared defaults are those that hold."""

from __future__ import annotations

from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fakes.sessions import tiny_session
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.errors import MQBenchError, RequestError, UnknownNameError
from mqbench.harness.quant.method import StepMethod, open_session
from mqbench.harness.quant.options import Option, check_options, declared_defaults, merge_options
from mqbench.harness.quant.scheme import Recipe
from mqbench.mquant.mquant import METHOD as MQUANT

METHODS: dict[str, StepMethod] = {point.name: point.load() for point in entry_points(group="mqbench.methods")}
SWITCH = Option("switch", True, kind=bool)
SHARE = Option("share", 0.5, kind=float, minimum=0, maximum=1)
SIZE = Option("size", 8, kind=int, minimum=1)
WORD = Option("word", "a", ("a", "b"))
BITS = Option("bits", None, (None, 4, 8))
OPEN = Option("open", None, ("x", "y"), help="x with switch, else y")


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        (SWITCH, [True, False], [1, 0, "true", None]),
        (SHARE, [0, 1, 0.3], [True, -0.1, 1.1, "0.5", None, float("nan"), float("inf")]),
        (SIZE, [1, 64], [0, 2.0, True, "8"]),
        (WORD, ["a", "b"], ["c", None, True, 1]),
        (BITS, [None, 4, 8], [5, "4", False]),
        (OPEN, ["x", "y"], [None, "z"]),
        (Option("any word", "", kind=str), ["", "free"], [1, None]),
    ],
    ids=lambda value: value.name if isinstance(value, Option) else "",
)
def test_values(option: Option, good: list[Any], bad: list[Any]) -> None:
    assert all(map(option.accepts, good)) and not any(map(option.accepts, bad))
    for value in good:
        option.check(value)
    for value in bad:
        with pytest.raises(UnknownNameError if option.choices else RequestError, match=option.name):
            option.check(value)


def test_messages_say_what_to_write() -> None:
    def message(**options: Any) -> str:
        with pytest.raises(MQBenchError) as caught:
            check_options(MQUANT, Recipe("mquant", options=options))
        return str(caught.value)

    assert message(rms_rul="any") == "unknown option of method 'mquant': 'rms_rul'; did you mean 'rms_rule'?"
    assert message(observer="percentil") == "unknown observer 'percentil'; did you mean 'percentile'?"
    assert message(rms_x0_bits=5) == "unknown rms_x0_bits '5'; known: 4, 8, null"
    assert message(rms=1) == "option 'rms' takes true or false, not 1"
    assert message(percentile=2) == "option 'percentile' takes a number from 0.5 up to 1, not 2"
    with pytest.raises(UnknownNameError, match=r"unknown option of method 'none': 'rms'; this method has no options"):
        check_options(METHODS["none"], Recipe("none", options={"rms": True}))


def test_a_plug_in_that_declares_nothing_takes_anything() -> None:
    check_options(SimpleNamespace(name="foreign"), Recipe("foreign", options={"whatever": object()}))


def test_quantize_refuses_before_anything_changes() -> None:
    model = tiny_model()
    before = set(dict(model.named_modules()))
    for options in ({"rmss": True}, {"rms": "yes"}):
        with pytest.raises(MQBenchError):
            MQUANT.quantize(model, tiny_layout(model), Recipe("mquant", "w8a8", "w8a8", options=options), [])
    assert set(dict(model.named_modules())) == before


def test_merging_keeps_the_first_declaration_and_the_order() -> None:
    other = Option("word", "b", ("b",))
    assert merge_options((SWITCH, WORD), (other, BITS)) == (SWITCH, WORD, BITS)
    assert declared_defaults((SWITCH, BITS, OPEN)) == {"switch": True, "bits": None}
    assert (BITS.default_text, OPEN.default_text, WORD.default_text) == ("null", "-", "a")


def test_an_option_is_the_recipes_then_the_methods_then_the_readers() -> None:
    session, _, _ = tiny_session(alpha=0.3)
    session.defaults = {"alpha": 0.9, "zero_point": True}
    assert (session.option("alpha", 1), session.option("zero_point", 1), session.option("other", 1)) == (0.3, True, 1)


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("chosen", [None, False, True])
def test_zero_point_makes_weight_grids_asymmetric(declared: bool, chosen: bool | None) -> None:
    model = tiny_model()
    recipe = Recipe("test", "float", "w4a16-g16", options={} if chosen is None else {"zero_point": chosen})
    options = (Option("zero_point", declared, kind=bool),)
    session = open_session(model, tiny_layout(model), recipe, [], options)
    text, vision = session.layout.text.blocks[0].mlp_out, session.layout.projector[0]
    assert session.weight_args(vision) is None
    args = session.weight_args(text)
    assert args is not None and (args.num_bits, args.group_size) == (4, 16)
    assert args.symmetric is not (declared if chosen is None else chosen)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_of_a_method_explains_itself(name: str) -> None:
    options = METHODS[name].options
    assert len({option.name for option in options}) == len(options)
    for option in options:
        assert option.help and option.values
        assert option.has_default or option.default is None, option.name


@pytest.mark.parametrize("name", sorted(METHODS))
def test_declared_defaults_are_those_that_hold(name: str) -> None:
    """A recipe that spells out every default gives the same model, to the last bit, as one that says nothing."""
    states = []
    for options in ({}, declared_defaults(METHODS[name].options)):
        model = tiny_model(torch.float32)
        bits = "float" if name == "none" else "w4a8-g20"
        batches = [tiny_batch(model, num_images=2, batch_size=3, seed=seed) for seed in range(2)]
        METHODS[name].quantize(model, tiny_layout(model), Recipe(name, bits, bits, options=options), batches)
        with torch.no_grad():
            states.append(model.state_dict() | {"logits": model(**batches[0]).logits})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
