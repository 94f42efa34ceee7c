"""Records: keys, round trips and strict validation."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.records import CALIBRATION, failed_record, make_cell, make_record
from mqbench.harness.errors import RecordError
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import ADDED_FIELDS, SCHEMA_VERSION, Cell, Record, Sample, canonical_json

CHANGES: list[dict[str, Any]] = [
    {"model": "other"},
    {"weights_sha256": "b" * 64},
    {"recipe": Recipe("mquant", "w8a8", "w4a8", seed=1)},
    {"recipe": Recipe("mquant", "w8a8", "w4a8", options={"rms": False})},
    {"recipe": Recipe("mquant", "w4a8", "w8a8")},
    {"recipe": Recipe("quarot", "w8a8", "w4a8")},
    {"method_version": "2"},
    {"task": "mme"},
    {"limit": 8},
    {"data_sha256": "e" * 64},
    {"calibration": None},
    *(
        {"calibration": dataclasses.replace(CALIBRATION, **change)}
        for change in ({"dataset": "x"}, {"split": "x"}, {"num_samples": 2}, {"seed": 2}, {"sha256": "f" * 64})
    ),
    {"device": "NVIDIA H100"},
    {"dtype": "bfloat16"},
    {"batch_size": 1},
    {"backend": "integer"},
]


def test_every_field_of_a_cell_changes_its_key() -> None:
    keys = [make_cell().key, *(dataclasses.replace(make_cell(), **change).key for change in CHANGES)]
    assert len(set(keys)) == len(keys)
    assert {name for change in CHANGES for name in change} == {item.name for item in dataclasses.fields(Cell)}


def test_key_does_not_depend_on_the_order_of_options() -> None:
    one, two = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    keys = {make_cell(recipe=Recipe("mquant", "w8a8", "w4a8", options=options)).key for options in (one, two)}
    assert len(keys) == 1


def test_key_is_stable_across_versions() -> None:
    """A changed key would silently run every stored cell again: raise SCHEMA_VERSION and this value together."""
    assert make_cell().key == "d456e3f80f33ba6e0bc3be4aa4ec5ef3ce824edf3d8488f4fbb2e1a72d377c5f"


@pytest.mark.parametrize("record", [make_record(), failed_record(), make_record(make_cell(method="none"))])
def test_round_trip(record: Record) -> None:
    assert Record.from_json(json.loads(canonical_json(record.to_json()))) == record


def test_a_record_of_version_1_is_read_without_arrays() -> None:
    new = make_record().to_json()
    old = {name: new[name] for name in new.keys() - ADDED_FIELDS[2].keys()} | {"schema_version": 1}
    assert Record.from_json(old) == make_record()
    with pytest.raises(RecordError, match=r"lacks .*arrays"):
        Record.from_json({**old, "schema_version": 2})


def test_arrays_survive_the_file() -> None:
    record = make_record(arrays={"edges": [0.0, 0.1], "counts": [3.0]})
    assert Record.from_json(json.loads(canonical_json(record.to_json()))) == record


@settings(max_examples=60)
@given(prediction=st.text(), index=st.text(), score=st.none() | st.floats(allow_nan=False, allow_infinity=False))
def test_round_trip_keeps_any_answer_on_one_line(prediction: str, index: str, score: float | None) -> None:
    record = make_record(samples=(Sample(index, prediction, score),))
    try:
        prediction.encode()
    except UnicodeEncodeError:  # lone surrogates have no UTF-8 form
        return
    line = canonical_json(record.to_json()).encode()
    assert b"\n" not in line
    assert Record.from_json(json.loads(line)) == record


def test_a_newer_schema_is_refused_with_advice() -> None:
    data = make_record().to_json() | {"schema_version": SCHEMA_VERSION + 1, "invented": 1}
    with pytest.raises(RecordError, match=r"newer mqbench.*upgrade"):
        Record.from_json(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": None}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"status": "maybe"}, "maybe"),
        ({"score": "high"}, "score"),
        ({"score": None}, "finite score"),
        ({"score": True}, "score"),
        ({"samples": [{"index": "1"}]}, "prediction"),
        ({"cell": []}, "cell"),
        ({"key": "0" * 64}, "key does not fit"),
    ],
)
def test_invalid_data_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        Record.from_json(make_record().to_json() | change)


def test_a_missing_field_is_named() -> None:
    data = make_record().to_json()
    del data["cell"]["recipe"]["seed"]
    with pytest.raises(RecordError, match=r"recipe lacks .*seed"):
        Record.from_json(data)


def test_no_record_without_a_finite_score_or_a_reason() -> None:
    with pytest.raises(RecordError, match="finite score"):
        make_record(score=math.nan)
    with pytest.raises(RecordError, match="reason"):
        failed_record(reason="")


def test_not_a_number_never_reaches_the_file() -> None:
    with pytest.raises(RecordError, match="JSON"):
        canonical_json(make_record(metrics={"x": math.inf}).to_json())
