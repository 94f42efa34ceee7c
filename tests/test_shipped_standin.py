"""The shipped weights are as hard to quantize as they claim, and the shipped records say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mqbench.harness import discover
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.standin.adapters import ADAPTERS
from mqbench.harness.models.standin.benchmarks import BENCHMARKS, split_examples
from mqbench.harness.models.standin.report import page, page_stem
from mqbench.harness.models.standin.study import batches_of
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Batch, QuantReport
from mqbench.harness.record import Record
from mqbench.harness.store import RecordStore

NAME = "standin-qwen2-vl"
FOLDER = Path(__file__).parents[1] / "harness" / "models" / "standin" / "weights" / NAME
RESULTS = Path(__file__).parents[1] / "results"
RECORDS = RESULTS / "records"
LEAST_FLOAT = {"textvqa": 75, "docvqa": 75, "ocrbench": 650, "mme": 2200, "scienceqa": 95}
TASKS = ("textvqa", "docvqa", "ocrbench", "mme", "scienceqa")


def load() -> LoadedModel:
    return discover.find_model(NAME).load(FOLDER, "cpu", torch.float32)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    model = load()
    drawn = [row for entry in BENCHMARKS for row in split_examples(entry)["calibration"][:32]]
    return [item.batch for item in batches_of(drawn, model.processor.tokenizer, model.model)]


def quantized(method: str, batches: list[Batch], **options: object) -> QuantReport:
    loaded = load()
    recipe = Recipe(method, "w8a8", "w8a8", 0, options)
    return discover.find_method(method).quantize(loaded.model, loaded.layout, recipe, batches)


@pytest.fixture(scope="module")
def rotated(batches) -> QuantReport:
    return quantized("mquant", batches, rounding="rtn")


def test_modality_gap_survives_rotation_and_online_hadamard(rotated):
    layout = load().layout
    for block in layout.text.blocks[:-1]:
        scales = rotated.layers[block.mlp_out].scales
        assert scales["visual"] >= 4 * scales["text"], block.mlp_out


def test_eq9_holds_for_the_vision_fc2_and_for_no_llm_layer(rotated, batches):
    """Over the norm of the columns in every block; for most columns in all blocks but the last (just under half)."""
    layout = load().layout
    assert layout.vision is not None
    *earlier, last = [block.mlp_out for block in layout.vision.blocks]
    assert all(rotated.layers[name].eq9_margin > 1 for name in earlier)
    assert 0.9 < rotated.layers[last].eq9_margin < 1
    by_norm = quantized("mquant", batches[:2], rounding="rtn", rms_rule="norm").layers
    assert all(by_norm[name].rms_split for name in (*earlier, last))
    assert not any(by_norm[block.mlp_out].rms_split for block in layout.text.blocks)


def test_norms_have_outlier_channels():
    """Four channels behind each block norm carry gains far above the rest."""
    loaded = load()
    for tower in loaded.layout.towers:
        for block in tower.blocks:
            for norm in (block.attention_norm, block.mlp_norm):
                gains = loaded.model.get_submodule(norm.name).weight.abs().sort(descending=True).values
                assert gains[0] >= 30 * gains[4:].median(), norm.name
                assert gains[3] >= 5 * gains[4:].max(), norm.name


def shipped_records() -> list[Record]:
    return [record for record in RecordStore(RECORDS).latest().values() if record.ok]


def recovery(records: list[Record], model: str, method: str, bits: tuple[str, str]) -> float:
    """Mean over the benchmarks of score / float score, in percent."""
    scores = {
        (record.cell.recipe.method, record.cell.recipe.vision, record.cell.recipe.text, record.cell.task): record.score
        for record in records
        if record.cell.model == model and not record.cell.recipe.options
    }
    ratios = [scores[method, *bits, task] / scores["none", "float", "float", task] for task in TASKS]
    return 100 * sum(ratios) / len(ratios)


METHODS = ("rtn", "smoothquant", "quarot", "mquant")


def test_shipped_records_separate_the_methods():
    records = shipped_records()
    kept = {method: recovery(records, NAME, method, ("w4a8", "w4a8")) for method in METHODS}
    assert kept["rtn"] < 60
    assert kept["rtn"] <= kept["smoothquant"] <= kept["quarot"] < kept["mquant"]


@pytest.mark.parametrize("name", [adapter.name for adapter in ADAPTERS if adapter.find_weights(None)])
def test_every_family_answers_and_needs_rotation(name):
    """Float scores far above guessing; what outlier channels do to methods without rotation. MSQ may gain nothing."""
    records = shipped_records()
    floats = {r.cell.task: r.score for r in records if (r.cell.model, r.cell.recipe.method) == (name, "none")}
    assert {task: floats[task] >= least for task, least in LEAST_FLOAT.items()} == dict.fromkeys(LEAST_FLOAT, True)
    for bits in (("w8a8", "w4a8"), ("w4a8", "w4a8")):
        kept = {method: recovery(records, name, method, bits) for method in METHODS}
        assert kept["rtn"] < 10 < 50 < kept["smoothquant"] < 85 < 90 < kept["quarot"]
        assert kept["mquant"] > max(97, kept["quarot"] - 0.5)


@pytest.mark.parametrize("name", [adapter.name for adapter in ADAPTERS])
def test_a_stand_ins_page_says_what_was_measured(name):
    stem = page_stem(name)
    measured = json.loads((RESULTS / stem / "measured.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{stem}.md").read_text(encoding="utf-8") == page(measured)
    kept = measured["scores"]["as shipped"]
    assert kept["RTN"] < 5 < kept["SmoothQuant"] < min(kept["QuaRot"], kept["MQuant"]) - 5
    assert measured["scores"]["neither"]["RTN"] > 0.9 * measured["scores"]["before hardening"]["float"]


def test_what_the_first_stand_ins_page_shows():
    measured = json.loads((RESULTS / "standin" / "measured.json").read_text(encoding="utf-8"))
    kept = measured["scores"]["as shipped"]
    ceiling = kept["W4 GPTQ, float activations"]
    assert kept["RTN"] < kept["SmoothQuant"] < kept["QuaRot"] <= kept["MQuant"] - 5
    assert kept["MQuant"] >= 0.98 * ceiling >= 0.98 * 0.95 * measured["scores"]["before hardening"]["float"]
