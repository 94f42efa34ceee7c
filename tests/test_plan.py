"""Plans: which cells a request means, which still have to run, and that every mistake is found before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fakes.plugin import Workplace, make_workplace, write_tsv
from fakes.records import failed_record, make_record
from mqbench.harness.errors import (
    CalibrationError,
    DatasetError,
    MissingWeightsError,
    MQBenchError,
    NonFiniteError,
    OutputError,
    PluginError,
    RequestError,
    UnknownNameError,
)
from mqbench.harness.estimate import estimate_s, num_workers
from mqbench.harness.plan import expand
from mqbench.harness.record import Record
from mqbench.harness.request import Request
from mqbench.harness.store import RecordStore


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return make_workplace(tmp_path, monkeypatch)


def request_in(place: Workplace, **changes: Any) -> Request:
    settings = {
        "models": ("fake-model",),
        "methods": ("good", "bad"),
        "tasks": ("textvqa", "docvqa"),
        "bits": ("w8a8/w4a8", "w4a8"),
        "calib_samples": 4,
        "out": place.out,
        "data_dir": place.data,
        "models_dir": place.models,
        "batch_size": 2,
    }
    return Request(**{**settings, **changes})


def test_cells_are_baseline_plus_methods_times_bits_for_every_task(place: Workplace) -> None:
    plan = expand(request_in(place))
    labels = [cell.label for cell in plan.cells]
    settings = [
        "none float/float",
        *(f"{name} {bits}" for bits in ("w8a8/w4a8", "w4a8/w4a8") for name in ("good", "bad")),
    ]
    assert labels == [f"fake-model {setting} {task}" for setting in settings for task in ("textvqa", "docvqa")]
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)


def test_a_model_is_quantized_once_for_all_tasks(place: Workplace) -> None:
    plan = expand(request_in(place))
    assert [len(group.cells) for group in plan.groups] == [2] * 5
    assert [group.needs_calibration for group in plan.groups] == [False, True, True, True, True]


def test_settings_reach_the_cells(place: Workplace) -> None:
    plan = expand(request_in(place, seed=5, limit=2, dtype="bfloat16"))
    baseline, quantized = plan.cells[0], plan.cells[-1]
    assert (quantized.recipe.seed, quantized.limit, quantized.dtype, quantized.method_version) == (
        5,
        2,
        "bfloat16",
        "3",
    )
    assert quantized.calibration is not None
    assert (quantized.calibration.seed, quantized.calibration.num_samples) == (5, 4)
    assert str(place.root) not in str(quantized.calibration)
    assert baseline.calibration is None


def test_the_baseline_does_not_depend_on_seed_or_calibration(place: Workplace) -> None:
    keys = {expand(request_in(place, **change)).cells[0].key for change in ({}, {"seed": 1}, {"calib_samples": 3})}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"calib_samples": 3}, {"calib_split": "textvqa"}, {"limit": 3}, {"dtype": "float16"}]
)
def test_a_changed_setting_is_another_cell(place: Workplace, change: dict[str, Any]) -> None:
    before, after = (expand(request_in(place, **settings)).cells[-1].key for settings in ({}, change))
    assert before != after


def test_changed_data_or_weights_are_other_cells(place: Workplace) -> None:
    before = {cell.key for cell in expand(request_in(place)).cells}
    write_tsv(place.data / "TextVQA_VAL.tsv", ["another 0", "another 1"])
    after = {cell.key for cell in expand(request_in(place)).cells}
    assert len(before & after) == len(before) // 2
    save_file({"linear.weight": torch.ones(4, 4)}, place.models / "fake-model" / "model.safetensors")
    assert not before & {cell.key for cell in expand(request_in(place)).cells}


def store_first(place: Workplace, *records: Record) -> None:
    store = RecordStore(place.out)
    for record in records:
        store.append(record)


def test_cells_with_an_ok_record_are_left_out_and_failed_ones_run_again(place: Workplace) -> None:
    first = expand(request_in(place))
    store_first(place, make_record(first.cells[0]), failed_record(first.cells[1]), make_record(first.cells[2]))
    plan = expand(request_in(place))
    assert plan.cells == first.cells
    assert [cell for group in plan.groups for cell in group.cells] == [first.cells[1], *first.cells[3:]]


def test_a_finished_plan_has_nothing_to_run(place: Workplace) -> None:
    first = expand(request_in(place))
    store_first(place, *(make_record(cell) for cell in first.cells))
    assert expand(request_in(place)).groups == ()


def test_all_means_models_with_weights_and_lists_the_others(place: Workplace) -> None:
    plan = expand(request_in(place, models=("all",)))
    assert "fake-model" in {cell.model for cell in plan.cells}
    assert "absent-model" not in {cell.model for cell in plan.cells}
    assert plan.missing["absent-model"] == "put a folder fake-model into --models-dir"


def test_aliases_and_repeats_are_one_method(place: Workplace) -> None:
    plan = expand(request_in(place, methods=("g", "good", "none"), bits=("w4a8", "w4a8/w4a8")))
    assert [group.recipe.method for group in plan.groups] == ["none", "good"]


MISTAKES: list[tuple[dict[str, Any], type[MQBenchError], str]] = [
    ({"models": ("fake-modle",)}, UnknownNameError, "unknown model 'fake-modle'; did you mean 'fake-model'"),
    ({"models": ("absent-model",)}, MissingWeightsError, "weights of 'absent-model' were not found; put a folder"),
    ({"methods": ("goood",)}, PluginError, "unknown method 'goood'; did you mean 'good'"),
    ({"methods": ("broken",)}, PluginError, "of package 'fakeplugin' cannot be loaded"),
    ({"tasks": ("textvqq",)}, UnknownNameError, "unknown task 'textvqq'; did you mean 'textvqa'"),
    ({"tasks": ()}, RequestError, "no task"),
    ({"tasks": ("mme",)}, DatasetError, "no file for task 'mme'"),
    ({"bits": ("w9a8",)}, UnknownNameError, "unknown bit setting 'w9a8'"),
    ({"bits": ("float",)}, RequestError, "quantize nothing"),
    ({"dtype": "int8"}, UnknownNameError, "unknown dtype 'int8'"),
    ({"device": "tpu"}, RequestError, "unknown device 'tpu'"),
    ({"device": "cuda:99"}, RequestError, "torch sees"),
    ({"limit": 0}, RequestError, "--limit must be at least 1"),
    ({"batch_size": 0}, RequestError, "--batch-size must be at least 1"),
    ({"calib_samples": 0}, CalibrationError, "at least 1"),
    ({"calib_samples": 99}, CalibrationError, "--calib-samples 8 or less"),
    ({"calib_split": "mme"}, CalibrationError, "no calibration file"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES)
def test_a_mistake_is_found_before_any_work(
    place: Workplace, change: dict[str, Any], error: type[MQBenchError], message: str
) -> None:
    with pytest.raises(error, match=message):
        expand(request_in(place, **change))
    assert not (place.root / "control" / "log").exists()


def test_overlap_is_found_by_content(place: Workplace) -> None:
    write_tsv(place.data / "calibration" / "DocVQA_VAL.tsv", ["evaluated TextVQA_VAL 2", "x 1", "x 2", "x 3"])
    with pytest.raises(CalibrationError, match="calibration samples too"):
        expand(request_in(place, calib_samples=8))


def test_a_folder_that_cannot_be_written(place: Workplace) -> None:
    place.out.write_text("a file")
    with pytest.raises(OutputError, match="choose another --out"):
        expand(request_in(place))


def test_broken_weights_are_named(place: Workplace) -> None:
    path = place.models / "fake-model" / "model.safetensors"
    save_file({"a": torch.ones(2), "linear.weight": torch.tensor([1.0, float("inf")])}, path)
    with pytest.raises(NonFiniteError, match=r"weight 'linear.weight' of .* holds NaN or Inf"):
        expand(request_in(place))
    path.write_bytes(b"\x10\x00\x00\x00")
    with pytest.raises(MissingWeightsError, match="cannot be read"):
        expand(request_in(place))


def test_estimate_comes_from_earlier_records(place: Workplace) -> None:
    first = expand(request_in(place))
    assert estimate_s(first, 1) is None
    baseline, quantized = first.cells[0], first.cells[2]
    store_first(place, make_record(baseline, duration_s=4.0), make_record(quantized, duration_s=4.0, quantize_s=7.0))
    plan = expand(request_in(place))
    rows = sum(4 for group in plan.groups for _ in group.cells)
    assert estimate_s(plan, 1) == pytest.approx(rows * 2.0 + 4 * 7.0)
    assert estimate_s(plan, 2) == pytest.approx((rows * 2.0 + 4 * 7.0) / 2)


def test_estimate_falls_back_on_shipped_records_of_the_same_kind_of_device(place: Workplace) -> None:
    plan = expand(request_in(place))
    shipped = make_record(plan.cells[0], duration_s=4.0)
    elsewhere = dataclasses.replace(shipped, cell=dataclasses.replace(plan.cells[0], device="NVIDIA H100"))
    assert estimate_s(plan, 1, [elsewhere]) is None
    assert estimate_s(plan, 1, [elsewhere, shipped]) == pytest.approx(10 * 4 * 2.0)


def test_no_more_workers_than_groups(place: Workplace) -> None:
    plan = expand(request_in(place, methods=("good",), bits=("w4a8",), jobs=16))
    assert num_workers(plan) == 2
    assert num_workers(dataclasses.replace(plan, groups=())) == 1
