"""The stand-in's generator, tokenizer, training objective and hardening."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from mqbench.harness.models.standin import tasks, vocabulary
from mqbench.harness.models.standin.architecture import Size
from mqbench.harness.models.standin.benchmarks import BENCHMARKS, NO_IMAGE, write_benchmarks
from mqbench.harness.models.standin.harden import Hardness, harden
from mqbench.harness.models.standin.objective import answer_entropy, prompt_entropy, specialisation_penalty
from mqbench.harness.models.standin.qwen2_vl import (
    IMAGE_START,
    NUM_VISUAL_TOKENS,
    STANDIN,
    Qwen2VLFeed,
    collate,
    logits_and_activations,
)
from mqbench.harness.models.standin.tokenizer import build_tokenizer, render_prompt
from mqbench.harness.models.standin.train import Trainer, TrainSettings, exact_match, make_examples

TINY = TrainSettings(
    steps=4, batch_size=4, text_only_every=3, warmup_steps=2, curriculum=(0, 2), blend=(0, 1), bfloat16=False
)
MAKERS = {
    "textvqa": tasks.textvqa,
    "docvqa": tasks.docvqa,
    "ocrbench": tasks.ocrbench,
    "mme": tasks.mme,
    "open": tasks.open_question,
    "scienceqa": tasks.scienceqa,
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    size = Size(vision_depth=2, vision_width=32, vision_heads=2, text_depth=3, text_width=64, text_mlp=96, text_heads=4)
    built = STANDIN.build_model(STANDIN.build_config(tokenizer, size), seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in built.named_parameters():
        if "norm" in name or name.endswith(("bias", "ln_q.weight")):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return built.double().requires_grad_(False)


def pictured(count: int, seed: int = 0):
    rng = Random(seed)
    return [tasks.textvqa(rng, 0.6) for _ in range(count)]


@pytest.mark.parametrize("name", MAKERS)
def test_examples_depend_only_on_the_seed(name):
    first, second = (MAKERS[name](Random(7), 0.6) for _ in range(2))
    assert (first.prompt, first.answer) == (second.prompt, second.answer)
    if first.image is not None:
        assert first.image.tobytes() == second.image.tobytes()


@pytest.mark.parametrize("name", MAKERS)
def test_tokenizer_is_lossless_and_prompts_are_short(tokenizer, name):
    rng = Random(1)
    for _ in range(50):
        example = MAKERS[name](rng, 0.6)
        text = render_prompt(example.prompt, 0) + example.answer
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 40


def test_characters_that_are_read_are_single_pieces(tokenizer):
    rng = Random(2)
    for _ in range(100):
        text = tasks.random_string(rng)
        if text not in vocabulary.words():
            assert len(tokenizer(text)["input_ids"]) == len(text)


def test_mme_pairs_share_a_picture_and_disagree():
    for category in tasks.MME:
        yes, no = tasks.mme_pair(Random(category), 0.6, category)
        assert yes.image is no.image
        assert (yes.answer, no.answer) == ("Yes", "No")
        assert yes.question != no.question


def test_scienceqa_answer_is_the_letter_of_a_right_option():
    rng = Random(5)
    for subject in tasks.SUBJECTS:
        facts = vocabulary.CATEGORIES[tasks.SUBJECTS[subject]]
        for _ in range(20):
            example = tasks.scienceqa(rng, 0.6, subject, "NO")
            kind = next(kind for kind in facts if example.question == vocabulary.FACT_QUESTION.format(category=kind))
            right = [option for option in example.options if option in facts[kind]]
            assert right == [example.options["ABCD".index(example.answer)]]


def test_objective_computes_what_transformers_computes(model, tokenizer):
    batch = collate(pictured(3), tokenizer)
    patches = batch.pictures["patches"].double()
    expected = model(
        input_ids=batch.input_ids,
        attention_mask=torch.ones_like(batch.input_ids),
        pixel_values=torch.stack([patches.view(3, -1, 3, 196)] * 2, 3).flatten(2).flatten(0, 1),
        image_grid_thw=torch.tensor([[1, 8, 12]] * 3),
        mm_token_type_ids=(batch.input_ids == model.config.image_token_id).int(),
    ).logits
    assert (batch.input_ids[:, IMAGE_START : IMAGE_START + NUM_VISUAL_TOKENS] == model.config.image_token_id).all()
    assert torch.equal(batch.visual, batch.input_ids == model.config.image_token_id)
    got, _ = logits_and_activations(model, replace(batch, pictures={"patches": patches}))
    # Transformers' norms and rotary embeddings cast to float32 inside.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_exact_match_agrees_with_greedy_decoding(model, tokenizer):
    """Whatever the model says first is exactly matched; anything else is not."""
    single = model.float()
    example = pictured(1)[0]
    batch = collate([example], tokenizer)
    start = int((batch.labels[0] != -100).nonzero()[0])
    ids = batch.input_ids[:, :start]
    for _ in range(2):
        longer = replace(batch, input_ids=ids, labels=ids)
        ids = torch.cat([ids, logits_and_activations(single, longer)[0][:, -1:].argmax(-1)], dim=1)
    said = ids[0, start:]
    labels = torch.cat([torch.full((start,), -100), said])[None]
    predicted = logits_and_activations(single, replace(batch, input_ids=ids, labels=labels))[0][:, :-1].argmax(-1)
    assert ((predicted == labels[:, 1:]) | (labels[:, 1:] == -100)).all()
    assert exact_match(single, Qwen2VLFeed(tokenizer), [example], "cpu") == [tokenizer.decode(said) == example.answer]
    model.double()


@pytest.mark.parametrize(
    "hardness",
    [Hardness(modality_gap=0), Hardness(outlier_gain=(1, 1)), Hardness()],
    ids=["outliers", "gap", "both"],
)
def test_hardening_changes_no_output(model, tokenizer, hardness):
    copied = STANDIN.build_model(model.config, seed=0).double().requires_grad_(False)
    copied.load_state_dict(model.state_dict())
    batch = collate(pictured(4), tokenizer)
    batch = replace(batch, pictures={"patches": batch.pictures["patches"].double()})
    before, inner_before = logits_and_activations(copied, batch)
    harden(copied, STANDIN.layout(copied), hardness, Qwen2VLFeed(tokenizer), [batch], text_channels=32)
    after, inner_after = logits_and_activations(copied, batch)
    # Transformers' norms cast to float32 inside.
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4 * float(before.abs().max()))
    widened = [float(b.abs().max() / a.abs().max()) for a, b in zip(inner_before, inner_after, strict=True)]
    if hardness.modality_gap:
        assert max(widened[:-1]) > 1.5
    assert widened[-1] == pytest.approx(1, abs=1e-3)


def test_outlier_channels_stand_out(model, tokenizer):
    copied = STANDIN.build_model(model.config, seed=0).double().requires_grad_(False)
    copied.load_state_dict(model.state_dict())
    feed, hardness = Qwen2VLFeed(tokenizer), Hardness(modality_gap=0)
    harden(copied, STANDIN.layout(copied), hardness, feed, [], text_channels=32)
    norm = copied.model.language_model.layers[0].input_layernorm
    gains = (norm.weight / model.model.language_model.layers[0].input_layernorm.weight).sort().values
    torch.testing.assert_close(gains[:-4], torch.ones_like(gains[:-4]))
    torch.testing.assert_close(
        gains[-4:], torch.logspace(0, 1, 4, base=2.5, dtype=torch.float64) * 60, rtol=1e-5, atol=0
    )


def test_penalty_is_zero_for_separated_modalities_and_one_for_mixed():
    visual = torch.zeros(2, 10, dtype=torch.bool)
    visual[0, 2:5] = visual[1, 3:6] = True
    mixed = torch.ones(2, 10, 12)
    separated = torch.zeros(2, 10, 12)
    separated[..., 4:] = visual[..., None]
    separated[..., :4] = ~visual[..., None]
    assert float(specialisation_penalty([mixed, mixed], visual, 4)) == pytest.approx(1, abs=1e-4)
    assert float(specialisation_penalty([separated, mixed], visual, 4)) == pytest.approx(0, abs=1e-4)


def test_short_answers_weigh_as_much_as_long_ones():
    labels = torch.full((2, 9), -100)
    labels[0, 3:8] = 1
    labels[1, 3] = 1
    logits = torch.zeros(2, 9, 4)
    logits[1, :, 1] = 20
    assert float(answer_entropy(logits, labels)) == pytest.approx(math.log(4) / 2, rel=1e-5)


def test_prompt_entropy_counts_the_questions_tokens_only(tokenizer):
    batch = collate(
        [tasks.scienceqa(Random(0), 0, "NAT", "NO"), tasks.scienceqa(Random(1), 0, "LAN", "TXT")], tokenizer
    )
    perfect = torch.nn.functional.one_hot(batch.input_ids, len(tokenizer)).float().roll(-1, 1) * 50
    assert float(prompt_entropy(perfect, batch)) == pytest.approx(0, abs=1e-6)
    answers = perfect.clone()
    for row, labels in enumerate(batch.labels):
        answers[row, int((labels != -100).nonzero()[0]) - 1 :] = 0
    assert float(prompt_entropy(answers, batch)) == pytest.approx(0, abs=1e-6)
    perfect[:, 4] = 0
    assert float(prompt_entropy(perfect, batch)) > 0.1


def test_first_steps_are_those_of_the_shipped_weights_recipe(tmp_path: Path):
    """Losses from before there were other families: initial weights, examples, objective and optimizer are the same."""
    trainer = Trainer(TINY, tmp_path)
    seen = torch.tensor([trainer.train_step() for _ in range(4)])
    entropies = [6.590908050537109, 5.615376949310303, 5.8667731285095215, 4.18256950378418]
    penalties = [1.2177910804748535, 2.1635000705718994, 0.0, 2.096374273300171]
    torch.testing.assert_close(seen, torch.tensor([entropies, penalties]).T, rtol=1e-5, atol=0)


def test_training_resumes_to_the_same_weights(tmp_path: Path):
    whole = Trainer(TINY, tmp_path / "whole")
    list(whole.run(validate_every=100, save_every=100, log_every=1))
    part = Trainer(TINY, tmp_path / "part")
    steps = part.run(validate_every=100, save_every=2, log_every=1)
    for _ in range(3):
        next(steps)
    again = Trainer(TINY, tmp_path / "part")
    assert again.resume()
    assert again.step == 2
    list(again.run(validate_every=100, save_every=100, log_every=1))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert (tmp_path / "part" / "loss.csv").read_text() == (tmp_path / "whole" / "loss.csv").read_text()


def test_resuming_with_other_settings_is_refused(tmp_path: Path):
    trainer = Trainer(TINY, tmp_path)
    trainer.save()
    with pytest.raises(ValueError, match="other settings"):
        Trainer(TrainSettings(steps=5), tmp_path).resume()


def test_every_nth_step_is_text_only():
    kinds = [{example.image is None for example in make_examples(TINY, step)} for step in range(6)]
    assert kinds == [{False}, {False}, {True}] * 2


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("entry", BENCHMARKS, ids=lambda entry: entry.name)
def test_benchmarks_are_complete_and_apart_from_calibration(written: Path, entry):
    contents = {}
    for split in (".", "calibration"):
        folder = written / split / entry.name
        rows = read(folder / f"{entry.name}.tsv")
        assert len({row["index"] for row in rows}) == len(rows) == (entry.num_items if split == "." else 256)
        pictures = [row["image_path"] for row in rows if row["image_path"] != NO_IMAGE]
        contents[split] = {(folder / path).read_bytes() for path in pictures}
    assert not contents["."] & contents["calibration"]


def test_shipped_benchmarks_are_what_the_generator_writes(written: Path):
    """Rows are compared as text; pixels may differ between builds of the font renderer."""
    shipped = Path(__file__).parents[1] / "harness" / "datasets" / "data"
    for benchmark in BENCHMARKS:
        name = Path(benchmark.name) / f"{benchmark.name}.tsv"
        assert read(shipped / name) == read(written / name)
        assert read(shipped / "calibration" / name) == read(written / "calibration" / name)


def test_model_card_says_first_that_it_is_synthetic():
    folder = Path(__file__).parents[1] / "harness" / "models" / "standin" / "weights" / "standin-qwen2-vl"
    assert "synthetic stand-in" in (folder / "README.md").read_text().splitlines()[0]
    assert (folder / "model.safetensors").stat().st_size <= 8 * 2**20
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2VLForConditionalGeneration"]
