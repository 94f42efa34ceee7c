"""The integer backend computes what the simulated one does.

Where both run in float64, no value comes near a rounding boundary by accident, and they must agree in every token. In
float32 they differ in the last bits of sums, a few activations round to the other neighbour, and a deep model amplifies
that: there the yardstick is the simulated backend itself with more exact sums.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fakes.sessions import add_fc2_means
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness import discover
from mqbench.harness.errors import MQBenchError, NonFiniteError
from mqbench.harness.execute import Executor, Finished
from mqbench.harness.finite import finite_outputs
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.standin.benchmarks import BENCHMARKS, split_examples
from mqbench.harness.models.standin.study import Scored, batches_of
from mqbench.harness.plan import expand
from mqbench.harness.quant import linear as linear_module
from mqbench.harness.quant.integer import (
    BackendReport,
    quant_linears,
    use_integer_backend,
    use_simulated_backend,
)
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.serialize import STRUCTURE_FILE, TENSORS_FILE, load_quantized, save_quantized
from mqbench.harness.quant.session import Batch, QuantReport
from mqbench.harness.record import Backend
from mqbench.harness.request import Request
from mqbench.harness.select import settings_of
from mqbench.harness.store import RecordStore

STANDIN = "standin-qwen2-vl"
FOLDER = Path(__file__).parents[1] / "harness" / "models" / "standin" / "weights" / STANDIN
SAME_TOKENS = 0.995


def method_named(name: str) -> Any:
    (entry,) = entry_points(group="mqbench.methods", name=name)
    return entry.load()


def quantized(
    recipe: Recipe, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[LoadedModel, QuantReport, Batch]:
    """The tiny Qwen2-VL with Eq. 9 true of every fc2, quantized on two batches, and a left-padded batch of images."""
    model = tiny_model(torch.float32, seed)
    add_fc2_means(model, 0.5)
    model.to(dtype)
    loaded = LoadedModel("tiny", model, None, tiny_layout(model))
    batches = [tiny_batch(model, num_images=2, batch_size=3, seed=seed) for seed in range(2)]
    report = method_named(recipe.method).quantize(model, loaded.layout, recipe, batches)
    return loaded, report, tiny_batch(model, num_images=2, batch_size=3, seed=7)


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).logits[batch["attention_mask"].bool()]


CASES = [
    ("rtn", "w8a8/w4a8", {}),
    ("rtn", "w5a6/w3a4", {"activations": "token"}),
    ("rtn", "w8a8/w4a8", {"activations": "modality"}),
    ("smoothquant", "w8a8/w8a8", {}),
    ("quarot", "w4a8/w4a8", {"online_out_hadamard": True}),
    ("quarot", "w4a8/w4a8", {"activations": "token"}),
    # Static: a token that sees itself alone has values k * s of its KV grid, and k / max(k) * 127 is often a tie.
    ("quarot", "w4a8/w4a8", {"kv_bits": 4}),
    ("mquant", "w8a8/w4a8", {"rms_rule": "any"}),
    ("mquant", "w4a8/w4a8", {"rms_rule": "any", "rms_x0_bits": 8, "activations": "token"}),
    ("mquant", "w4a8/w4a8", {"rms_rule": "any", "rms_side": "weight"}),
    ("mquant", "w4a8/w4a8", {"rms_rule": "any", "rms_side": "activation"}),
    ("mquant", "w4a8/w4a8", {"rms_rule": "any", "rms_side": "weight", "activations": "token"}),
    ("gptq", "w4a16-g20/w4a16", {}),
    ("awq", "w4a16-g20/w3a16-g16", {}),
    ("rtn", "float/w4a16-g20", {"zero_point": True}),
    ("mquant", "w4a16-g20/w4a16-g20", {"rms_rule": "any", "zero_point": True}),
]


@pytest.mark.parametrize(("method", "bits", "options"), CASES)
def test_both_backends_compute_the_same(method: str, bits: str, options: dict[str, Any]) -> None:
    vision, text = bits.split("/")
    loaded, _, batch = quantized(Recipe(method, vision, text, options=options))
    expected = logits(loaded.model, batch)
    report = use_integer_backend(loaded.model)
    assert report.complete
    assert len(report.integer) == (len(quant_linears(loaded.model)) if vision != "float" else 14)
    torch.testing.assert_close(logits(loaded.model, batch), expected, rtol=0, atol=1e-9)
    use_simulated_backend(loaded.model)
    assert torch.equal(logits(loaded.model, batch), expected)


def test_a_split_layer_is_among_those_compared() -> None:
    """Else the cases above would say nothing about x0 * w0."""
    for side in ("both", "weight", "activation"):
        options = {"rms_rule": "any", "rms_side": side}
        loaded, report, _ = quantized(Recipe("mquant", "w4a8", "w4a8", options=options))
        use_integer_backend(loaded.model)
        split = [name for name, layer in report.layers.items() if layer.rms_split]
        assert split
        assert all(quant_linears(loaded.model)[name].integer.w0 is not None for name in split)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_linear_alone_in_low_precision(dtype: torch.dtype) -> None:
    """On the input that the simulated model gives it: closer to the float64 result than twice the simulated one is."""
    loaded, _, batch = quantized(Recipe("mquant", "w8a8", "w4a8", options={"rms_rule": "any"}), dtype)
    seen = recorded(loaded.model, batch)
    use_integer_backend(loaded.model)
    for name, (x, visual, simulated) in seen.items():
        linear = quant_linears(loaded.model)[name]
        if linear.input_quantizer is not None and linear.input_quantizer.context is not None:
            linear.input_quantizer.context.visual = visual
        found = linear(x)
        assert found.dtype == dtype
        truth = exact_output(linear, x)
        magnitude = truth.abs().max()
        own_error = (simulated - truth).abs().max()
        assert (found - truth).abs().max() <= 2 * own_error + torch.finfo(dtype).eps * magnitude, name


@torch.no_grad()
def recorded(model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor | None, Tensor]]:
    """Input, visual mask and output of every linear in one pass."""
    seen: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = args[0], module.input_quantizer.visual, output

        return hook

    handles = [linear.register_forward_hook(record(name)) for name, linear in quant_linears(model).items()]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def exact_output(linear: Any, x: Tensor) -> Tensor:
    """What the linear stands for, in float64 on the activations as the simulated backend rounds them."""
    quantizer = linear.input_quantizer
    prepared, x0 = linear.prepare_input(x)
    scale = quantizer._scale_of(prepared).double()
    levels = (prepared.float() / scale.float()).round().clamp(quantizer.args.quant_min, quantizer.args.quant_max)
    weight = linear.integer.unpacked().double() * linear.weight_scale.double()
    y = F.linear(levels.double() * scale, weight, None if linear.bias is None else linear.bias.double())
    return y if x0 is None else y + x0.double() * linear.integer.w0.double()


@torch.no_grad()
def test_decoding_gives_the_same_tokens() -> None:
    loaded, _, batch = quantized(Recipe("mquant", "w8a8", "w4a8", options={"kv_bits": 8}))
    expected = loaded.model.generate(**batch, max_new_tokens=12)
    assert use_integer_backend(loaded.model).complete
    assert torch.equal(loaded.model.generate(**batch, max_new_tokens=12), expected)


# --- memory, switching, saving


def test_the_float_weight_is_freed_and_comes_back() -> None:
    loaded, _, _ = quantized(Recipe("mquant", "w8a8", "w4a8"), torch.float32)
    before = {name: linear.weight.clone() for name, linear in quant_linears(loaded.model).items()}
    use_integer_backend(loaded.model)
    for name, linear in quant_linears(loaded.model).items():
        assert linear.weight.shape == before[name].shape
        assert linear.weight.untyped_storage().nbytes() == 4
        assert linear.weight.isnan().all()
        packed = linear.weight_num_bits == 4
        assert linear.integer.levels.nbytes == before[name].numel() // (2 if packed else 1)
        assert "integer" in repr(linear)
    assert use_integer_backend(loaded.model).complete  # a second call changes nothing
    use_simulated_backend(loaded.model)
    for name, linear in quant_linears(loaded.model).items():
        assert torch.equal(linear.weight, before[name])


@pytest.mark.parametrize("bits", ["w8a8/w4a8", "w4a16-g20/w4a16-g20"])
def test_saving_does_not_depend_on_the_backend(tmp_path: Path, bits: str) -> None:
    recipe = Recipe("mquant", *bits.split("/"))
    loaded, report, batch = quantized(recipe, torch.float32)
    save_quantized(loaded.model, report, recipe, tmp_path / "simulated", "tiny")
    use_integer_backend(loaded.model)
    expected = logits(loaded.model, batch)
    save_quantized(loaded.model, report, recipe, tmp_path / "integer", "tiny")
    assert torch.equal(logits(loaded.model, batch), expected)  # it still runs in integers
    for name in (STRUCTURE_FILE, TENSORS_FILE):
        assert filecmp.cmp(tmp_path / "simulated" / name, tmp_path / "integer" / name, shallow=False)
    model = tiny_model(torch.float32, seed=99)
    after = LoadedModel("tiny", model, None, tiny_layout(model))
    load_quantized(tmp_path / "integer", after, method_named("mquant").restore)
    assert use_integer_backend(model).complete
    assert torch.equal(logits(model, batch), expected)


# --- what stays simulated


@pytest.mark.parametrize(
    ("bits", "options", "reason"),
    [
        ("w4a8/w16a16int", {}, "its weight is in floating point"),
        ("w4a8/w8a16int", {}, "its activations have 16 bits"),
        ("w4a8/w4a8-g20", {}, "one scale per output channel"),
        ("w4a8/w8a16", {}, "weights of 8 bits are not packed"),
        ("float/w4a8", {"zero_point": True}, "symmetric grid"),
        ("w4a8/w4a8", {"quantize_tokens": "text"}, "only its text tokens"),
    ],
)
def test_what_the_operations_do_not_cover_is_listed_with_its_reason(
    bits: str, options: dict[str, Any], reason: str
) -> None:
    vision, text = bits.split("/")
    loaded, _, batch = quantized(Recipe("rtn", vision, text, options=options))
    expected = logits(loaded.model, batch)
    report = use_integer_backend(loaded.model)
    assert not report.complete
    assert len(report.simulated) == 14
    assert all(reason in found for found in report.simulated.values())
    assert bool(report.floating) is (vision == "float")
    assert len(report.integer) + len(report.simulated) + len(report.floating) == len(quant_linears(loaded.model))
    torch.testing.assert_close(logits(loaded.model, batch), expected, rtol=0, atol=1e-9)


def test_a_weight_off_its_grid_stays_simulated() -> None:
    loaded, _, _ = quantized(Recipe("rtn", "w8a8", "w8a8"))
    name, linear = next(iter(quant_linears(loaded.model).items()))
    linear.weight.data[0, 0] += 1e-3
    report = use_integer_backend(loaded.model)
    assert report.simulated == {name: "a later step moved its weight off its grid"}


def test_a_float_model_has_nothing_to_report() -> None:
    loaded, _, _ = quantized(Recipe("none"))
    assert not use_integer_backend(loaded.model).complete


def test_nan_that_integers_would_swallow_is_named() -> None:
    """Static levels of NaN are 0, so the logits alone would look fine."""
    loaded, _, batch = quantized(Recipe("rtn", "w8a8", "w8a8"))
    use_integer_backend(loaded.model)
    layer = loaded.layout.text.blocks[0].mlp_out

    def spoil(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.full_like(args[0], torch.nan),)

    with finite_outputs(loaded.model, loaded.layout):
        assert logits(loaded.model, batch).isfinite().all()
    loaded.model.get_submodule(layer).register_forward_pre_hook(spoil)
    assert logits(loaded.model, batch).isfinite().all()
    with finite_outputs(loaded.model, loaded.layout), pytest.raises(NonFiniteError, match=f"the input of '{layer}'"):
        logits(loaded.model, batch)


# --- the shipped stand-in


def standin(dtype: torch.dtype) -> LoadedModel:
    return discover.find_model(STANDIN).load(FOLDER, "cpu", dtype)


@cache
def rows_of(start: int, stop: int, dtype: torch.dtype) -> list[Scored]:
    """Rows of every benchmark with their answers, in batches, floating-point inputs in ``dtype``."""
    loaded = standin(torch.float32)
    drawn = [row for entry in BENCHMARKS for row in split_examples(entry)["calibration"][start:stop]]
    found = batches_of(drawn, loaded.processor.tokenizer, loaded.model)
    for item in found:
        for key, value in item.batch.items():
            item.batch[key] = value.to(dtype) if value.is_floating_point() else value
    return found


def quantized_standin(method: str, bits: str, dtype: torch.dtype) -> LoadedModel:
    loaded = standin(dtype)
    vision, text = bits.split("/")
    options = {"rounding": "rtn"} if method in ("quarot", "mquant") else {}
    recipe = Recipe(method, vision, text, 0, options)
    calibration = [item.batch for item in rows_of(0, 4, dtype)]
    discover.find_method(method).quantize(loaded.model, loaded.layout, recipe, calibration)
    return loaded


@torch.no_grad()
def predictions(model: nn.Module, items: Sequence[Scored], everywhere: bool) -> tuple[Tensor, Tensor]:
    """Greedy token and logits at every token that is not padding, or at those that predict the answer."""
    parts = []
    for item in items:
        wanted = item.batch["attention_mask"].bool() if everywhere else (item.labels != -100).roll(-1, 1)
        parts.append(model(**item.batch).logits[wanted])
    found = torch.cat(parts)
    return found.argmax(-1), found


METHODS = ("rtn", "quarot", "mquant")


@pytest.mark.parametrize("bits", ["w8a8/w8a8", "w4a8/w4a8"])
@pytest.mark.parametrize("method", METHODS)
def test_standin_gives_the_same_tokens_in_float64(method: str, bits: str) -> None:
    loaded = quantized_standin(method, bits, torch.float64)
    items = rows_of(32, 36, torch.float64)
    expected, expected_logits = predictions(loaded.model, items, everywhere=True)
    assert use_integer_backend(loaded.model).complete
    found, found_logits = predictions(loaded.model, items, everywhere=True)
    assert (found == expected).double().mean() >= SAME_TOKENS
    torch.testing.assert_close(found_logits, expected_logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_standin_in_float32_differs_by_no_more_than_the_order_of_sums_does(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = quantized_standin(method, "w4a8/w4a8", torch.float32)
    items = rows_of(32, 52, torch.float32)
    expected, _ = predictions(loaded.model, items, everywhere=False)
    with monkeypatch.context() as patch:
        patch.setattr(linear_module, "F", ExactSums)
        exact, _ = predictions(loaded.model, items, everywhere=False)
    assert use_integer_backend(loaded.model).complete
    found, _ = predictions(loaded.model, items, everywhere=False)
    labels = torch.cat([item.labels[item.labels != -100] for item in items])
    noise = (exact != expected).double().mean()
    assert (found != exact).double().mean() <= noise + 0.005
    assert abs(discordance(found, expected, labels)) <= 2.6  # of a standard normal: 1 % of fair coins exceed it


class ExactSums:
    """``torch.nn.functional`` for ``QuantLinear``, summing in float64."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


def discordance(one: Tensor, other: Tensor, labels: Tensor) -> float:
    """McNemar's statistic of two sets of answers: wins minus losses over the root of their number."""
    wins = ((one == labels) & (other != labels)).sum().item()
    losses = ((one != labels) & (other == labels)).sum().item()
    return (wins - losses) / math.sqrt(max(wins + losses, 1))


# --- mqbench eval --backend integer


def request_for(out: Path, **changes: Any) -> Request:
    return Request(
        **{
            "models": (STANDIN,),
            "methods": ("rtn",),
            "tasks": ("textvqa",),
            "bits": ("w4a8",),
            "limit": 4,
            "calib_samples": 4,
            "out": out,
            **changes,
        }
    )


def run_cells(out: Path, **changes: Any) -> list[Finished]:
    """Plans and runs in this process."""
    request = request_for(out, **changes)
    finished: list[Finished] = []
    plan = expand(request)
    executor = Executor(
        request, "cpu", lambda message: finished.append(message) if isinstance(message, Finished) else None
    )
    for group in plan.groups:
        executor.run_group(group)
    return finished


def test_records_say_what_ran_and_stand_beside_simulated_ones(tmp_path: Path) -> None:
    assert [cell.reason for cell in run_cells(tmp_path)] == ["", ""]
    assert [cell.reason for cell in run_cells(tmp_path, backend="integer")] == [""]  # the baseline is done
    assert run_cells(tmp_path) == run_cells(tmp_path, backend="integer") == []
    assert [cell.reason for cell in run_cells(tmp_path, backend="integer", bits=("w8a8/w8a16",))] == [""]
    only_text = {"quantize_tokens": "text"}  # what bits and the grid's options do not show
    (failed,) = run_cells(tmp_path, backend="integer", bits=("float/w8a8",), options=only_text)
    assert "can run in integers: only its text tokens have quantized activations" in failed.reason
    records = [record for record in RecordStore(tmp_path).load() if record.cell.recipe.method == "rtn"]
    assert [record.backend for record in records[:3]] == [Backend.SIMULATED, Backend.REAL, Backend.MIXED]
    assert [settings_of(record)["backend"] for record in records[:3]] == ["simulated", "real", "mixed"]
    assert records[0].cell.key != records[1].cell.key
    assert "backend" not in records[0].cell.to_json()
    assert records[1].environment["integer_layers"] == 47
    assert records[1].environment["simulated_layers"] == {}
    assert len(records[2].environment["simulated_layers"]) == 28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "int"}, "unknown backend 'int'; did you mean 'integer'"),
        ({"tasks": ("eq9",)}, "looks at float"),
        ({"tasks": ("backend_agreement",), "backend": "simulated"}, "add --backend integer"),
        *(
            ({"bits": (bits,)}, f"no layer of rtn {bits} can run in integers: .*; give other --bits, or leave")
            for bits in ("w8a16/w8a16", "w16a8/w16a8", "float/w4a16int", "float/w4a8-g64")
        ),
        ({"bits": ("w4a8",), "methods": ("awq",)}, "no layer of awq w4a8/w4a8 can run in integers"),
    ],
)
def test_a_request_that_makes_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Found before anything is loaded."""
    with pytest.raises(MQBenchError, match=message):
        expand(request_for(tmp_path, **{"backend": "integer", **changes}))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_whole_standin_on_evaluated_rows(tmp_path: Path, dtype: str) -> None:
    """``backend_agreement`` for MQuant at 4 bits: the same function, and in float32 no more than other sums do."""
    changes: dict[str, Any] = {
        "methods": ("mquant",),
        "tasks": ("backend_agreement",),
        "dtype": dtype,
        "calib_samples": 16,
    }
    changes["options"] = {"rounding": "rtn"}
    (finished,) = run_cells(tmp_path, backend="integer", **changes)
    assert finished.reason == ""
    (record,) = RecordStore(tmp_path).load()
    metrics = record.metrics
    assert record.backend is Backend.REAL
    assert metrics["agreement_percent"] == record.score
    assert metrics["tokens"] > 500
    assert metrics["answers"] == 20
    assert 40 <= metrics["answer_tokens"] < metrics["tokens"] / 2
    if dtype == "float64":
        assert record.score >= 100 * SAME_TOKENS
        assert metrics["answer_tokens_percent"] == metrics["same_answers_percent"] == 100
        assert metrics["max_logit_difference"] < 1e-6
    else:
        assert metrics["max_logit_difference"] > 0
        assert record.score >= metrics["float64_sums_agreement_percent"] - 1


@torch.no_grad()
def test_the_standin_generates_through_transformers() -> None:
    loaded = quantized_standin("mquant", "w4a8/w4a8", torch.float64)
    (item, *_) = rows_of(32, 33, torch.float64)
    expected = loaded.model.generate(**item.batch, max_new_tokens=8, do_sample=False)
    assert use_integer_backend(loaded.model).complete
    assert torch.equal(loaded.model.generate(**item.batch, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7], CASES[12]])
@torch.no_grad()
def test_linears_compile_into_one_graph(case: tuple[str, str, dict[str, Any]]) -> None:
    method, bits, options = case
    loaded, _, _ = quantized(Recipe(method, *bits.split("/"), options=options), torch.float32)
    use_integer_backend(loaded.model)
    kinds = {(linear.in_features, linear.x0_bypass): linear for linear in quant_linears(loaded.model).values()}
    for (width, _), linear in kinds.items():
        torch._dynamo.reset()
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), linear(x), rtol=1e-6, atol=1e-6)


def test_report_of_nothing_is_not_complete() -> None:
    assert not BackendReport((), {}, ("a",)).complete
