"""Probes against computations that a reader can check: all inputs kept, dense Hadamard matrices, counting by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fakes.sessions import add_fc2_means, hard_model
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.errors import CalibrationError, NonFiniteError, RequestError
from mqbench.harness.evaluated import EvaluatedBatch
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.probe_activations import EDGES, KINDS, histogram
from mqbench.harness.probe_values import rounded, shown_blocks
from mqbench.harness.probe_weights import MAX_GROUPS, channel_peaks, conditions
from mqbench.harness.probes import PROBES, ProbeContext
from mqbench.harness.quant.integer import quant_linears, use_integer_backend
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.session import Batch, LayerReport, QuantReport
from mqbench.harness.tasks import TASK_INFOS, TaskKind, TaskResult
from mqbench.kernels.hadamard import hadamard_matrix, padded_size
from mqbench.mquant.mquant import METHOD as MQUANT

FLOAT = Recipe("none")


def context(
    model: nn.Module,
    batches: Sequence[Batch] = (),
    report: QuantReport | None = None,
    recipe: Recipe = FLOAT,
    layout: Layout | None = None,
) -> ProbeContext:
    loaded = LoadedModel("tiny", model, None, layout or tiny_layout(model))
    return ProbeContext(loaded, recipe, report, lambda: batches)


def quantized(model: nn.Module, batches: Sequence[Batch], bits: str = "w8a8", **options: Any) -> ProbeContext:
    recipe = Recipe("mquant", *parse_bits(bits), 0, options)
    report = MQUANT.quantize(model, tiny_layout(model), recipe, batches)
    return context(model, batches, report, recipe)


def padded_batches(model: nn.Module) -> list[Batch]:
    """Rows of different lengths; one batch has a row without an image."""
    return [tiny_batch(model, 2, 3, seed=1), tiny_batch(model, 1, 3, seed=2, text_rows=1)]


def check_small(result: TaskResult) -> None:
    values = [value for series in result.arrays.values() for value in series]
    assert 0 < len(values) < 5000
    assert values == rounded(values)
    assert all(math.isfinite(value) for value in [*values, *result.metrics.values(), result.score])


def test_catalog_and_probes_say_the_same() -> None:
    infos = {name: info for name, info in TASK_INFOS.items() if info.kind is TaskKind.PROBE}
    assert infos.keys() == PROBES.keys()
    for name, probe in PROBES.items():
        assert (probe.name, probe.needs, probe.uses_calibration) == (
            name,
            infos[name].needs,
            infos[name].uses_calibration,
        )


# --- activation ranges -----------------------------------------------------------------------------------------------


@torch.no_grad()
def kept_inputs(model: nn.Module, batches: Sequence[Batch], module: str) -> dict[str, Tensor]:
    """Every value that entered a module, by modality, by single tokens."""
    kept: dict[str, list[Tensor]] = {"text": [], "visual": []}
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for batch in batches:
        model(**batch)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for column, token in enumerate(ids):
                if batch["attention_mask"][row, column]:
                    kind = "visual" if token == model.config.image_token_id else "text"
                    kept[kind].append(seen[-1][row, column])
    handle.remove()
    return {kind: torch.cat(rows) for kind, rows in kept.items()}


def test_activation_ranges_against_all_inputs_kept() -> None:
    model = tiny_model()
    batches = padded_batches(model)
    result = PROBES["activation_ranges"].run(context(model, batches))
    for kind, modules in KINDS.items():
        ratios = []
        for index, block in enumerate(tiny_layout(model).text.blocks):
            (module,) = modules(block)
            inputs = kept_inputs(model, batches, module)
            for modality, values in inputs.items():
                assert result.arrays[f"{kind}.{modality}.min"][index] == rounded([values.min().item()])[0]
                assert result.arrays[f"{kind}.{modality}.max"][index] == rounded([values.max().item()])[0]
                counts = np.histogram(values.numpy(), [-np.inf, *EDGES, np.inf])[0]
                share = result.arrays[f"{kind}.block{index}.{modality}.share"]
                assert share == rounded(counts / len(values))
            ratios.append((inputs["visual"].abs().max() / inputs["text"].abs().max()).item())
        assert result.metrics[f"{kind}.ratio_median"] == pytest.approx(sum(ratios) / 2, rel=1e-9)
        assert result.metrics[f"{kind}.ratio_max"] == pytest.approx(max(ratios), rel=1e-9)
    assert result.score == result.metrics["mlp_out.ratio_median"]
    check_small(result)


def test_padding_does_not_count() -> None:
    model = tiny_model()
    batch = tiny_batch(model, 1, 1, seed=3)
    extra = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0}
    padded = {
        name: torch.cat([torch.full((1, 4), extra[name]), tensor], 1) if name in extra else tensor
        for name, tensor in batch.items()
    }
    plain, same = (PROBES["activation_ranges"].run(context(model, [inputs])).metrics for inputs in (batch, padded))
    assert same == pytest.approx(plain, rel=1e-9)


def test_reordered_tokens_keep_their_modality() -> None:
    metrics = []
    for aifs in (True, False):
        model = tiny_model()
        metrics.append(PROBES["activation_ranges"].run(quantized(model, padded_batches(model), aifs=aifs)).metrics)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


def test_quantized_inputs_are_seen_behind_the_transform_and_without_channel_0() -> None:
    model = hard_model(0, fc2_mean=0.5, gap=20.0).double()
    batches = padded_batches(model)
    probed = quantized(model, batches, rms_rule="any")
    ratios = PROBES["activation_ranges"].run(probed).arrays["mlp_out.ratio"]
    assert probed.report is not None
    layers = [probed.report.layers[block.mlp_out] for block in tiny_layout(model).text.blocks]
    assert any(layer.rms_split for layer in layers)
    for ratio, layer in zip(ratios, layers, strict=True):
        assert ratio == pytest.approx(layer.scales["visual"] / layer.scales["text"], rel=0.2)


def test_no_hook_stays() -> None:
    model = tiny_model()
    PROBES["activation_ranges"].run(context(model, padded_batches(model)))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=50))
def test_histogram_is_numpys(values: list[float]) -> None:
    expected = np.histogram(np.array(values), [-np.inf, *EDGES, np.inf])[0]
    assert histogram(torch.tensor(values, dtype=torch.float64)).tolist() == expected.tolist()


def test_activation_ranges_refuses() -> None:
    model = tiny_model()
    run, layout = PROBES["activation_ranges"].run, tiny_layout(model)
    with pytest.raises(RequestError, match="takes no images"):
        run(context(model, layout=replace(layout, vision=None, image_token_id=None)))
    with pytest.raises(CalibrationError, match="no calibration sample holds an image"):
        run(context(model, [tiny_batch(model, 1, 2, text_rows=2)]))
    with pytest.raises(RequestError, match="quantized LLM activations"):
        run(quantized(tiny_model(), padded_batches(model), bits="w8a16"))
    model.get_submodule(layout.text.blocks[1].mlp_out).weight.data.fill_(float("nan"))
    model.get_submodule(layout.text.blocks[0].mlp_out).weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1' holds"):
        run(context(model, padded_batches(model)))


# --- Eq. 9 -----------------------------------------------------------------------------------------------------------


def report_of(layout: Layout, margins: dict[str, Sequence[float]]) -> QuantReport:
    layers = {}
    for tower in layout.towers:
        for block, margin in zip(tower.blocks, margins[tower.part], strict=True):
            rules = {"median": margin > 1, "any": margin > 0.5, "norm": margin > 0.8}
            layers[block.mlp_out] = LayerReport(block.mlp_out, tower.part, eq9_margin=margin, eq9_rules=rules)
    return QuantReport(layers)


def test_eq9_counts() -> None:
    model = tiny_model()
    report = report_of(tiny_layout(model), {"vision": (1.4, 1.2), "text": (0.9, 0.2)})
    result = PROBES["eq9"].run(context(model, report=report))
    assert result.score == 50
    assert dict(result.metrics) == {
        "vision.blocks": 2, "vision.met": 2, "vision.ratio_percent": 100.0,
        "vision.met_any": 2, "vision.ratio_percent_any": 100.0,
        "vision.met_norm": 2, "vision.ratio_percent_norm": 100.0,
        "vision.margin_median": pytest.approx(1.3), "vision.margin_min": 1.2,
        "text.blocks": 2, "text.met": 0, "text.ratio_percent": 0.0,
        "text.met_any": 1, "text.ratio_percent_any": 50.0, "text.met_norm": 1, "text.ratio_percent_norm": 50.0,
        "text.margin_median": pytest.approx(0.55), "text.margin_min": 0.2,
    }  # fmt: skip
    assert result.arrays == {"vision.margin": [1.4, 1.2], "text.margin": [0.9, 0.2]}


def test_eq9_of_a_quantized_model() -> None:
    model = tiny_model(torch.float32)
    add_fc2_means(model, 1.0)
    probed = quantized(model, padded_batches(model), bits="w8a8")
    assert probed.report is not None
    result = PROBES["eq9"].run(probed)
    split = sum(layer.rms_split for layer in probed.report.layers.values())
    assert result.metrics["vision.met"] + result.metrics["text.met"] == split > 0
    assert result.metrics["vision.margin_min"] > 1
    for part in ("vision", "text"):
        assert result.metrics[f"{part}.met"] <= result.metrics[f"{part}.met_any"]
    check_small(result)


def test_eq9_of_a_text_model() -> None:
    model = tiny_model()
    layout = replace(tiny_layout(model), vision=None)
    result = PROBES["eq9"].run(context(model, report=report_of(layout, {"text": (1.5, 0.2)}), layout=layout))
    assert result.score == 50
    assert not any(name.startswith("vision") for name in result.metrics)


def test_eq9_needs_a_method_that_tests_it() -> None:
    model = tiny_model()
    with pytest.raises(RequestError, match="needs method mquant"):
        PROBES["eq9"].run(context(model))
    with pytest.raises(RequestError, match="needs method mquant"):
        PROBES["eq9"].run(quantized(model, padded_batches(model), rms=False))


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weight_distribution_against_dense_matrices() -> None:
    model = tiny_model()
    add_fc2_means(model, 0.5)
    result = PROBES["weight_distribution"].run(context(model))
    factors: dict[str, list[float]] = {"vision": [], "text": []}
    for tower in tiny_layout(model).towers:
        for index, block in enumerate(tower.blocks):
            weight = model.get_submodule(block.mlp_out).weight.detach()
            behind = weight @ hadamard_matrix(weight.shape[1]).T
            with_rms = behind.clone()
            with_rms[:, 0] = 0
            shown = {"original": weight, "fht": behind, "rms": with_rms}
            for name, values in shown.items():
                peaks = [float(values[:, channel].abs().max()) for channel in range(values.shape[1])]
                stored = result.arrays[f"{tower.part}.block{index}.{name}.channel_peak"]
                assert stored == pytest.approx(peaks, rel=1e-5, abs=1e-12)
                assert sum(result.arrays[f"{tower.part}.block{index}.{name}.share"]) == pytest.approx(1, abs=1e-4)
            factors[tower.part].append(float(behind.abs().max() / with_rms.abs().max()))
    assert result.score == result.metrics["vision.rms_factor"] == pytest.approx(sum(factors["vision"]) / 2)
    assert result.score > 2
    assert result.metrics["text.rms_factor"] == pytest.approx(sum(factors["text"]) / 2)
    check_small(result)


def test_shares_are_numpys() -> None:
    model = tiny_model()
    result = PROBES["weight_distribution"].run(context(model))
    weight = model.get_submodule(tiny_layout(model).text.blocks[0].mlp_out).weight.detach().numpy()
    counts, _ = np.histogram(weight, result.arrays["text.block0.edges"])
    assert result.arrays["text.block0.original.share"] == pytest.approx(counts / weight.size, abs=1.5 / weight.size)


def test_weight_distribution_of_a_text_model() -> None:
    model = tiny_model()
    layout = replace(tiny_layout(model), vision=None)
    result = PROBES["weight_distribution"].run(context(model, layout=layout))
    assert result.score == result.metrics["text.rms_factor"]
    assert all(name.startswith("text.") for name in (*result.metrics, *result.arrays))


def test_weight_distribution_wants_float_weights() -> None:
    model = tiny_model()
    with pytest.raises(RequestError, match="--methods none"):
        PROBES["weight_distribution"].run(quantized(model, padded_batches(model)))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))
def test_conditions_keep_the_energy(rows: int, width: int, seed: int) -> None:
    weight = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    states = conditions(weight)
    assert states["fht"].shape == (rows, padded_size(width))
    torch.testing.assert_close(states["fht"].norm(), weight.norm(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states["rms"], states["fht"][:, 1:])
    spike = weight.sum(1) / math.sqrt(padded_size(width))
    torch.testing.assert_close(states["fht"][:, 0], spike, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 700), st.integers(0, 99))
def test_wide_weights_are_stored_in_groups(width: int, seed: int) -> None:
    weight = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    group = math.ceil(width / MAX_GROUPS)
    expected = [weight[:, start : start + group].abs().max().item() for start in range(0, width, group)]
    assert channel_peaks(weight, group).tolist() == expected
    assert len(expected) <= MAX_GROUPS


def test_shown_blocks() -> None:
    assert [list(shown_blocks(count)) for count in (1, 2, 3, 4, 32)] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 16, 31]]


# --- backend_agreement


def asked_and_answered(model: nn.Module, answer_lengths: Sequence[int]) -> EvaluatedBatch:
    """Rows with an image whose last ``answer_lengths`` tokens are the answers; every row is answered alike."""
    forced = tiny_batch(model, num_images=1, batch_size=len(answer_lengths), seed=7)
    given = forced["attention_mask"].sum(1) - torch.tensor(answer_lengths)
    longest = int(given.max())
    prompts = {"attention_mask": torch.arange(longest) >= longest - given[:, None]}
    return EvaluatedBatch(prompts, forced, lambda: ["the same"] * len(answer_lengths))


def spoil_integers(model: nn.Module, spoiled: Tensor) -> None:
    """The model predicts the least likely token where ``spoiled`` (B, T), but only when it runs in integers."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if all(linear.integer is not None for linear in quant_linears(model).values()):
            output.logits = torch.where(spoiled[..., None], -output.logits, output.logits)

    model.register_forward_hook(hook)


@pytest.mark.parametrize("everywhere", [False, True])
def test_answer_tokens_are_counted_apart(everywhere: bool) -> None:
    """Answers of 1 and 2 tokens: 5 predictions of an answer or its end; all are spoiled, or the last of each row."""
    model = tiny_model()
    probed = quantized(model, [tiny_batch(model, 2, 3)])
    assert use_integer_backend(model).complete
    batch = asked_and_answered(model, [1, 2])
    spoiled = torch.full_like(batch.forced["input_ids"], everywhere).bool()
    spoiled[:, -1] = True
    spoil_integers(model, spoiled)
    metrics = PROBES["backend_agreement"].run(replace(probed, evaluated=lambda: [batch])).metrics
    tokens = int(batch.forced["attention_mask"].sum())
    assert tokens > 10
    assert (metrics["tokens"], metrics["answer_tokens"], metrics["answers"]) == (tokens, 5, 2)
    assert metrics["agreement_percent"] == (0 if everywhere else 100 * (tokens - 2) / tokens)
    assert metrics["answer_tokens_percent"] == (0 if everywhere else 60)
    assert metrics["same_answers_percent"] == 100
    assert metrics["float64_sums_agreement_percent"] == metrics["float64_sums_answer_tokens_percent"] == 100
