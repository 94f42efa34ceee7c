"""Stand-ins of every family: one recipe, inputs of the family's own adapter, exact hardening, files that load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from mqbench.harness import discover
from mqbench.harness.datasets.catalog import TASKS
from mqbench.harness.datasets.files import load_task
from mqbench.harness.errors import UnknownNameError
from mqbench.harness.evaluate import build_messages
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.models.standin import build, tasks
from mqbench.harness.models.standin.adapters import ADAPTERS, SHIPPED_WEIGHTS
from mqbench.harness.models.standin.architecture import DEFAULT_SIZE, Size
from mqbench.harness.models.standin.benchmarks import BENCHMARKS, Benchmark, split_examples
from mqbench.harness.models.standin.build import harden_and_export
from mqbench.harness.models.standin.family import MODULES, find_standin, text_channels_of
from mqbench.harness.models.standin.feed import message_of
from mqbench.harness.models.standin.harden import Hardness, harden
from mqbench.harness.models.standin.objective import TrainBatch, answer_entropy, training_loss
from mqbench.harness.models.standin.prompts import PromptStyle
from mqbench.harness.models.standin.tasks import Example
from mqbench.harness.models.standin.train import Trainer, TrainSettings
from mqbench.harness.quant.layout import NormPlace

SMALL = Size(
    vision_depth=2,
    vision_width=64,
    vision_heads=2,
    text_depth=3,
    text_width=96,
    text_mlp=192,
    text_heads=4,
    text_kv_heads=2,
)
SHIPPED_BYTES = 8 * 2**20
FAMILIES = [name for name in MODULES if name != "qwen2-vl"]


def settings(family: str, steps: int = 2) -> TrainSettings:
    return TrainSettings(
        family=family,
        steps=steps,
        batch_size=4,
        text_only_every=3,
        learning_rate=3e-3,
        warmup_steps=5,
        curriculum=(1000, 2000),
        blend=(1000, 2000),
        bfloat16=False,
    )


def style_of(adapter: Any) -> PromptStyle:
    style = find_standin(adapter.name.removeprefix("standin-")).style
    assert style is not None
    return style


def examples(count: int = 3) -> list[Example]:
    rng = Random(4)
    return [tasks.textvqa(rng, 0.4) for _ in range(count)]


@pytest.fixture(scope="module", params=FAMILIES)
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    family = request.param
    return Trainer(settings(family), tmp_path_factory.mktemp("runs") / family, size=SMALL)


@pytest.fixture(scope="module")
def loaded(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel]:
    """The adapter, and what it loads from a hardened and exported run."""
    trainer.save()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "MEASURED_EXAMPLES", 4)
        folder = harden_and_export(trainer.directory, None, Hardness())
    assert folder == trainer.directory.parent / f"standin-{trainer.settings.family}"
    adapter = next(item for item in ADAPTERS if item.name == folder.name)
    assert adapter.find_weights(folder.parent) == folder
    return adapter, adapter.load(folder, "cpu", torch.float32)


def test_every_linear_is_in_the_layout(trainer: Trainer) -> None:
    find_standin(trainer.settings.family).layout(trainer.model).check(trainer.model)


def test_shipped_size_stays_below_eight_mebibytes(trainer: Trainer) -> None:
    standin = find_standin(trainer.settings.family)
    with torch.device("meta"):
        model = standin.model_class()(standin.build_config(trainer.tokenizer, DEFAULT_SIZE))
    assert 2 * sum(tensor.numel() for tensor in model.state_dict().values()) < SHIPPED_BYTES


def test_loss_falls(trainer: Trainer, tmp_path: Path) -> None:
    own = Trainer(settings(trainer.settings.family, 20), tmp_path, size=SMALL)
    entropies = [own.train_step()[0] for _ in range(20)]
    pictured = [value for step, value in enumerate(entropies) if step % 3 != 2]
    assert sum(pictured[-3:]) < 0.8 * sum(pictured[:3])


def test_answers_come_from_the_picture(trainer: Trainer, tmp_path: Path) -> None:
    """Four pictures and one question are learnt by heart; with each other's pictures the first letters are wrong."""
    own = Trainer(settings(trainer.settings.family), tmp_path, size=SMALL)
    rng = Random(0)
    made = [tasks.first_reading(rng, 0) for _ in range(4)]
    assert len({example.prompt for example in made}) == 1
    assert len({example.answer[0] for example in made}) == 4
    batch = first_letters(own.feed.collate(made))
    optimizer = torch.optim.AdamW(own.model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    for _ in range(100):
        loss, _, _ = training_loss(own.feed, own.model, batch, 0.0, 0.0, 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        exchanged = own.feed.collate([replace(one, image=two.image) for one, two in zip(made, made[::-1], strict=True)])
        logits = [own.feed.logits_and_activations(own.model, item)[0] for item in (batch, exchanged)]
    right, wrong = (float(answer_entropy(item, batch.labels)) for item in logits)
    assert right < 0.3, "guessing costs log 4"
    assert wrong > 2


def first_letters(batch: TrainBatch) -> TrainBatch:
    """The batch with all labels masked but the first at which answers differ."""
    differs = (batch.labels != batch.labels[:1]).any(0)
    masked = torch.full_like(batch.labels, -100)
    place = int(differs.long().argmax())
    masked[:, place] = batch.labels[:, place]
    return replace(batch, labels=masked)


def test_branches_start_small(trainer: Trainer) -> None:
    """The gain of a norm behind a branch, or the linear that ends it, shrinks with the depth of its tower."""
    tower = find_standin(trainer.settings.family).layout(trainer.model).vision
    assert tower is not None
    block, depth = tower.blocks[0], len(tower.blocks)
    if tower.norm_place is NormPlace.POST:
        gain = trainer.model.get_submodule(block.mlp_norm.name).weight
        torch.testing.assert_close(gain, torch.full_like(gain, (2 * depth) ** -0.5))
    else:
        weight = trainer.model.get_submodule(block.attention.out).weight
        assert float(weight.detach().std()) == pytest.approx(0.7 / (2 * depth * weight.shape[1]) ** 0.5, rel=0.1)


@pytest.mark.parametrize("with_image", [True, False])
def test_training_sees_what_the_adapter_encodes(
    trainer: Trainer, loaded: tuple[Any, LoadedModel], tmp_path: Path, with_image: bool
) -> None:
    adapter, model = loaded
    made = examples() if with_image else [tasks.scienceqa(Random(n), 0.4, context="NO") for n in range(3)]
    batch = trainer.feed.collate(made)
    messages = [
        message_of(example, tmp_path / f"{number}.bmp", style_of(adapter)) for number, example in enumerate(made)
    ]
    expected = adapter.encode(model, messages, [example.answer for example in made])
    for row, (ids, mask) in enumerate(zip(expected["input_ids"], expected["attention_mask"], strict=True)):
        wanted = [*ids[mask.bool()].tolist(), trainer.tokenizer.eos_token_id]
        assert batch.input_ids[row, : len(wanted)].tolist() == wanted
        answer = batch.labels[row][batch.labels[row] != -100].tolist()
        assert trainer.tokenizer.decode(answer[:-1]).strip() == made[row].answer
    for name, tensor in batch.pictures.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert bool(batch.visual.any()) == with_image
    assert torch.equal(batch.visual, batch.input_ids == model.layout.image_token_id)


@pytest.mark.parametrize("entry", BENCHMARKS, ids=lambda entry: entry.name)
def test_benchmarks_are_asked_as_in_training(loaded: tuple[Any, LoadedModel], entry: Benchmark, tmp_path: Path) -> None:
    """VLMEvalKit's wrapper of the family makes the tokens that training made: all rows of every benchmark."""
    adapter, model = loaded
    task = next(task for task in TASKS.values() if task.dataset == entry.name)
    made = split_examples(entry)[""]
    for example, message in zip(made, build_messages(task, load_task(task), model.layout.family), strict=True):
        trained = adapter.encode(model, [message_of(example, tmp_path / "0.bmp", style_of(adapter))])
        assert torch.equal(adapter.encode(model, [message])["input_ids"], trained["input_ids"])


def test_questions_start_behind_what_prompts_share(trainer: Trainer) -> None:
    questions = [Example(made.image, made.question, "x") for made in examples()]
    batch = trainer.feed.collate(questions)
    starts = batch.input_ids[:, batch.question_start :]
    assert trainer.tokenizer.decode(starts[0]).startswith(questions[0].question)
    assert not batch.visual[:, batch.question_start :].any()


def test_objective_computes_what_the_model_computes(trainer: Trainer) -> None:
    batch = trainer.feed.collate(examples())
    with torch.no_grad():
        got, inner = trainer.feed.logits_and_activations(trainer.model, batch)
        expected = trainer.model(**trainer.feed.model_inputs(batch)).logits
    answered = batch.labels != -100
    torch.testing.assert_close(got[answered], expected[answered], rtol=1e-4, atol=1e-4)
    assert [tuple(x.shape) for x in inner] == [(*batch.input_ids.shape, SMALL.text_mlp)] * SMALL.text_depth


def test_bfloat16_steps_attend_in_float32(trainer: Trainer) -> None:
    batch = trainer.feed.collate(examples())
    with torch.no_grad():
        wanted, _ = trainer.feed.logits_and_activations(trainer.model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            got, _ = trainer.feed.logits_and_activations(trainer.model, batch)
    assert float((got - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize(
    "hardness",
    [Hardness(modality_gap=0), Hardness(outlier_gain=(1, 1)), Hardness()],
    ids=["outliers", "gap", "both"],
)
def test_hardening_changes_no_output(trainer: Trainer, hardness: Hardness) -> None:
    standin = find_standin(trainer.settings.family)
    generator = torch.Generator().manual_seed(0)
    model = standin.build_model(trainer.model.config, seed=1).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name or name.endswith("bias"):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    layout = standin.layout(model)
    feed = standin.feed(model, trainer.tokenizer)
    batch = feed.collate(examples())
    before, inner_before = feed.logits_and_activations(model, batch)
    channels = text_channels_of(model, layout)
    harden(model, layout, hardness, feed, [batch], channels)
    after, inner_after = feed.logits_and_activations(model, batch)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3 * float(before.abs().max()))
    widened = [float(b.abs().max() / a.abs().max()) for a, b in zip(inner_before, inner_after, strict=True)]
    if hardness.modality_gap:
        assert max(widened[:-1]) > 1.5
    assert widened[-1] == pytest.approx(1, abs=1e-2)


def test_vision_stream_has_outlier_channels(loaded: tuple[Any, LoadedModel]) -> None:
    """Four channels behind each block norm carry gains far above the rest, wherever the norm stands."""
    _, model = loaded
    for tower in (model.layout.vision, model.layout.text):
        assert tower is not None
        for norm in tower.block_norms:
            weight: Any = model.model.get_submodule(norm.name).weight
            gains = weight.abs().sort(descending=True).values
            assert gains[0] >= 30 * gains[4:].median(), norm.name


def test_exported_folder_answers(loaded: tuple[Any, LoadedModel], tmp_path: Path) -> None:
    adapter, model = loaded
    made = examples()
    messages = [
        message_of(example, tmp_path / f"{number}.bmp", style_of(adapter)) for number, example in enumerate(made)
    ]
    answers = adapter.generate(model, adapter.encode(model, messages), 4)
    assert len(answers) == len(made)
    assert answers == adapter.generate(model, adapter.encode(model, messages), 4)


def test_a_folder_of_ones_own_comes_before_the_shipped_one(tmp_path: Path) -> None:
    for adapter in ADAPTERS:
        shipped = SHIPPED_WEIGHTS / adapter.name
        assert adapter.find_weights(None) == shipped
        assert adapter.find_weights(tmp_path) == shipped
        (tmp_path / adapter.name).mkdir()
        assert adapter.find_weights(tmp_path) == tmp_path / adapter.name
        assert f"mqbench standin train --family {adapter.name.removeprefix('standin-')}" in adapter.how_to_get
        assert discover.find_model(adapter.name) == adapter


def test_unknown_family_is_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'llava'"):
        find_standin("lava")
