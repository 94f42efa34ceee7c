"""Plan files: many requests, one plan, no cell twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.plugin import Workplace, make_workplace
from mqbench.harness.environment import ROOT
from mqbench.harness.errors import MQBenchError, RequestError, UnknownNameError
from mqbench.harness.models.standin.adapters import ADAPTERS
from mqbench.harness.plan import expand_all
from mqbench.harness.planfile import BlueprintRun, PlanFile, read_plan_file
from mqbench.harness.request import Request

PAPER = ROOT / "results" / "plans" / "paper.toml"

PLAN = """
[[run]]
name = "first"
models = ["fake-model"]
methods = ["good", "bad"]
bits = ["w4a8"]
tasks = ["textvqa"]
calib_samples = 4

[[run]]
name = "second: one cell more"
models = ["fake-model"]
methods = ["good"]
bits = ["w4a8"]
tasks = ["textvqa", "docvqa"]
calib_samples = 4

[[run]]
name = "third: an option makes another model"
models = ["fake-model"]
methods = ["good"]
bits = ["w4a8"]
tasks = ["textvqa"]
calib_samples = 4
options = { switch = false }

[[run]]
name = "no weights"
models = ["all"]
tasks = ["visual_tokens"]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return make_workplace(tmp_path, monkeypatch)


def read(place: Workplace, text: str) -> PlanFile:
    path = place.root / "plan.toml"
    path.write_text(text)
    return read_plan_file(path, base_of(place))


def base_of(place: Workplace) -> Request:
    return Request(out=place.out, data_dir=place.data, models_dir=place.models, batch_size=2)


def test_runs_share_cells_and_quantized_models(place: Workplace) -> None:
    plan = expand_all(read(place, PLAN).requests)
    assert [cell.label for cell in plan.cells] == [
        "fake-model none float/float textvqa",
        "fake-model none float/float docvqa",
        "fake-model good w4a8/w4a8 textvqa",
        "fake-model good w4a8/w4a8 docvqa",
        "fake-model bad w4a8/w4a8 textvqa",
        "fake-model good[switch=false] w4a8/w4a8 textvqa",
    ]
    assert len(plan.groups) == 4
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)


def test_settings_of_the_command_hold_for_every_run(place: Workplace) -> None:
    file = read(place, PLAN)
    assert {(request.out, request.batch_size) for request in file.requests} == {(place.out, 2)}
    assert file.blueprints == (BlueprintRun(None, ("visual_tokens",)),)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", RequestError, r"must hold \[\[run\]\] entries"),
        ("[[rum]]", RequestError, "found: rum"),
        ("[[run]]\nname = ", RequestError, "cannot be read"),
        ('[[run]]\nname = "x"\nmethod = ["rtn"]', RequestError, r"run 1 \(x\): unknown key 'method'; known: name"),
        ('[[run]]\nmethods = "rtn"', RequestError, "'methods' must be a list of names"),
        ("[[run]]\ncalib_samples = true", RequestError, "'calib_samples' must be of type int"),
        ('[[run]]\ntasks = ["textvqq"]', UnknownNameError, "did you mean 'textvqa'"),
        ('[[run]]\ntasks = ["model_size", "mme"]', RequestError, r"in a run of their own, without \['mme'\]"),
        ('[[run]]\ntasks = ["model_size"]\nbits = ["w4a8"]', RequestError, r"without \['bits'\]"),
    ],
)
def test_a_wrong_plan_is_one_line(place: Workplace, text: str, error: type[MQBenchError], message: str) -> None:
    with pytest.raises(error, match=message):
        read(place, text)


def test_a_plan_that_is_not_there(place: Workplace) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_plan_file(place.root / "none.toml", base_of(place))


def test_the_papers_plan_is_sound(tmp_path: Path) -> None:
    """Every name, option and bit setting exists, and every cell has one place."""
    plan = expand_all(read_plan_file(PAPER, Request(out=tmp_path)).requests)
    further = {adapter.name for adapter in ADAPTERS if adapter.find_weights(None)}
    assert {cell.model for cell in plan.cells} == {"standin-qwen2-vl", "standin-llama", *further}
    assert {cell.recipe.method for cell in plan.cells if cell.model in further} >= {"rtn", "quarot", "mquant"}
    methods = {"none", "rtn", "smoothquant", "gptq", "awq", "quarot", "mquant"}
    assert {cell.recipe.method for cell in plan.cells} == methods
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)
    text_only = [cell for cell in plan.cells if cell.model == "standin-llama"]
    assert {cell.task for cell in text_only} >= {"wikitext2", "weight_distribution"}
    assert all(cell.recipe.vision == "float" for cell in text_only)
