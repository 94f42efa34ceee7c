"""The text stand-in: corpus, tokenizer, training, hardening, and the folder that ships."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mqbench.harness.cli import main
from mqbench.harness.datasets.text import load_corpus, refuse_overlap
from mqbench.harness.models.llama import ADAPTERS
from mqbench.harness.models.standin_text import grammar
from mqbench.harness.models.standin_text.architecture import CONTEXT_LENGTH, Size, build_config, build_model
from mqbench.harness.models.standin_text.corpus import SPLIT_ARTICLES, Article, joined_text, raw_text, write_corpus
from mqbench.harness.models.standin_text.harden import EASY, Hardness, aligned_signs, down_activity, harden
from mqbench.harness.models.standin_text.tokenizer import VOCABULARY_SIZE, build_tokenizer
from mqbench.harness.models.standin_text.train import Trainer, TrainSettings, make_rows

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "harness" / "models" / "standin_text" / "weights" / "standin-llama"
TINY = TrainSettings(steps=4, batch_size=1, warmup_steps=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


# --- corpus ----------------------------------------------------------------------------------------------------------


def test_the_shipped_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    sizes = write_corpus(tmp_path)
    shipped = ROOT / "harness" / "datasets" / "data" / "WikiText-2"
    assert {path.name for path in sizes} == {path.name for path in shipped.iterdir()}
    for path, size_bytes in sizes.items():
        assert path.read_bytes() == (shipped / path.name).read_bytes()
        assert size_bytes == path.stat().st_size


def test_no_paragraph_stands_in_two_splits() -> None:
    for split in ("valid", "test"):
        refuse_overlap(load_corpus("train"), load_corpus(split))
    refuse_overlap(load_corpus("valid"), load_corpus("test"))


def test_training_text_and_shipped_text_share_no_paragraph() -> None:
    seen = "".join(raw_text(f"train-0-{step}", 12) for step in range(200)).splitlines()
    assert not {line for line in seen if len(line.split()) > 25} & set(load_corpus("test").text.splitlines())


def test_lines_have_wikitexts_form() -> None:
    lines = raw_text("form", 50).removesuffix("\n").split("\n")
    for line in lines:
        assert line == " " or re.fullmatch(r" = .+ = | = = .+ = = | [A-Z0-9].* [.] ", line), line
    titles = [line for line in lines if re.fullmatch(r" = [^=]+ = ", line)]
    assert len(titles) == 50
    assert len(set(titles)) > 45


def test_joined_text_is_what_the_perplexity_task_tokenizes() -> None:
    path = load_corpus("test").source
    assert joined_text(path.read_text(encoding="utf-8")) == load_corpus("test").text


@pytest.mark.parametrize("seed", range(20))
def test_facts_stay_and_years_go_on(seed: int) -> None:
    article = Article(Random(seed))
    text = " ".join(article.lines())
    years = [int(year) for year in re.findall(r"\b1[789]\d\d\b", text)]
    assert years == sorted(years) and len(years) > 2
    names = set(re.findall(r"[A-Z][a-z]+(?:ton|ford|wick|ham|burg|mouth)\b", text))
    assert names <= {article.facts["name"], article.facts["town"]}


def test_verbs_agree_with_their_subjects() -> None:
    text = raw_text("agreement", 300)
    nouns = {noun for topic in grammar.TOPICS.values() for noun in topic.nouns}
    said = re.findall(r"The (?:\w+ )?(\w+) of \w+ (is|are) \w+ [.]", text)
    kept = [(noun, verb) for noun, verb in said if noun in nouns or verb == "are"]
    assert len(kept) > 50
    assert all((noun in nouns) == (verb == "is") for noun, verb in kept)


def test_templates_name_only_what_there_is() -> None:
    """Every sentence of the grammar can be written; an unknown slot would raise."""
    for seed in range(40):
        article = Article(Random(seed))
        article.kind = grammar.KINDS[seed % len(grammar.KINDS)]
        for templates in (article.kind.lead, *article.kind.sections.values()):
            for template in templates:
                assert not set("{}<>[]|") & set(article._sentence(template))


def test_text_is_far_from_independent_words(tokenizer: Any) -> None:
    """The shipped model's perplexity must lie far below this."""
    ids = tokenizer(load_corpus("test").text, verbose=False)["input_ids"]
    counts = Counter(ids)
    entropy = -sum(count / len(ids) * math.log(count / len(ids)) for count in counts.values())
    assert math.exp(entropy) > 100


# --- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " In 1812 , 4 @,@ 310 men", "naïve 東京 \t\r\n\n\n x", raw_text("lossless", 5)])
def test_tokenizer_is_lossless(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_is_the_shipped_one(tokenizer: Any) -> None:
    shipped = json.loads((SHIPPED / "tokenizer.json").read_text())
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"] == shipped["model"]
    assert len(tokenizer) == VOCABULARY_SIZE


def test_digits_are_single_pieces(tokenizer: Any) -> None:
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(" 1812")["input_ids"])
    assert pieces[-4:] == list("1812")


# --- training --------------------------------------------------------------------------------------------------------


def test_rows_are_windows_of_fresh_text(tokenizer: Any) -> None:
    rows = make_rows(tokenizer, "a", 3)
    assert rows.shape == (3, CONTEXT_LENGTH)
    assert torch.equal(rows, make_rows(tokenizer, "a", 3))
    assert not torch.equal(rows, make_rows(tokenizer, "b", 3))
    forms = {"\n\n\n" in tokenizer.decode(make_rows(tokenizer, str(seed), 1)[0]) for seed in range(12)}
    assert forms == {False, True}


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = Trainer(TINY, tmp_path / "whole")
    list(whole.run(validate_every=2, log_every=1, num_held_out=2))
    part = Trainer(TINY, tmp_path / "part")
    steps = part.run(validate_every=2, log_every=1, num_held_out=2)
    for _ in range(3):
        next(steps)
    again = Trainer(TINY, tmp_path / "part")
    assert again.resume() and again.step == 2
    list(again.run(validate_every=2, log_every=1, num_held_out=2))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert (tmp_path / "part" / "loss.csv").read_text() == (tmp_path / "whole" / "loss.csv").read_text()
    with pytest.raises(ValueError, match="other settings"):
        Trainer(replace(TINY, steps=5), tmp_path / "part").resume()


def test_learning_rate_rises_and_falls() -> None:
    settings = TrainSettings()
    rates = [settings.learning_rate_at(step) for step in range(settings.steps + 1)]
    peak = rates.index(max(rates))
    assert settings.warmup_steps // 2 < peak <= settings.warmup_steps
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and rates[-1] == pytest.approx(0)


def test_initial_means_stand_out_where_they_are_asked_for(tokenizer: Any) -> None:
    model = build_model(build_config(tokenizer, Size(depth=3, width=32, mlp=64, heads=2)), 0, 0.5, (1,))
    means = [
        layer.mlp.down_proj.weight.mean(1).abs().mean() / layer.mlp.down_proj.weight.std()
        for layer in model.model.layers
    ]
    assert means[1] > 3 * means[0] and means[1] > 3 * means[2]


# --- hardening -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    """Two query heads read each key/value head, so that gains of value heads must be undone twice."""
    built = build_model(build_config(tokenizer, Size(depth=3, width=64, mlp=96, heads=4, kv_heads=2)), seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in built.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return built.double().eval().requires_grad_(False)


def hardened(model: LlamaForCausalLM, hardness: Hardness, rows: Tensor) -> LlamaForCausalLM:
    copied = LlamaForCausalLM(model.config).double().eval().requires_grad_(False)
    copied.load_state_dict(model.state_dict())
    harden(copied, hardness, rows)
    return copied


INGREDIENTS: dict[str, dict[str, Any]] = {
    "outliers": {"outlier_gain": (20.0, 80.0)},
    "heads": {"head_gain": 5.0},
    "down": {"down_gain": 20.0},
    "signs": {"align_signs": True},
}


@pytest.mark.parametrize("name", [*INGREDIENTS, "all"])
def test_hardening_changes_no_output(model: LlamaForCausalLM, tokenizer: Any, name: str) -> None:
    rows = make_rows(tokenizer, "hardness", 2)
    changed = hardened(model, Hardness() if name == "all" else replace(EASY, **INGREDIENTS[name]), rows)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters(), strict=True))
    before, after = model(input_ids=rows).logits, changed(input_ids=rows).logits
    # Transformers' norms cast to float32 inside.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_easy_is_the_trained_model(model: LlamaForCausalLM, tokenizer: Any) -> None:
    changed = hardened(model, EASY, make_rows(tokenizer, "hardness", 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters(), strict=True))


def test_large_channels_are_the_active_ones(model: LlamaForCausalLM, tokenizer: Any) -> None:
    rows = make_rows(tokenizer, "hardness", 1)
    before = down_activity(model, rows)
    after = down_activity(hardened(model, replace(EASY, down_gain=20.0, num_down=3), rows), rows)
    for old, new in zip(before, after, strict=True):
        raised = set((new / old > 10).nonzero().flatten().tolist())
        assert raised == set(old.topk(3).indices.tolist())


def test_aligned_signs_find_a_hidden_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.where(torch.rand(96, generator=generator) < 0.5, -1.0, 1.0)
    weight = torch.randn(32, 1, generator=generator) * hidden + 0.3 * torch.randn(32, 96, generator=generator)
    found = aligned_signs(weight)
    assert torch.equal(found * found[0], hidden * hidden[0])


# --- the shipped folder ----------------------------------------------------------------------------------------------


def test_model_card_says_first_that_it_is_synthetic() -> None:
    assert "synthetic stand-in" in (SHIPPED / "README.md").read_text().splitlines()[0]
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 8 * 2**20
    assert json.loads((SHIPPED / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@torch.no_grad()
def test_shipped_model_reads_held_out_text() -> None:
    """Its perplexity is that of the training curve's end (3.8)."""
    adapter = next(adapter for adapter in ADAPTERS if adapter.name == "standin-llama")
    path = adapter.find_weights(None)
    assert path == SHIPPED
    loaded = adapter.load(path, "cpu", torch.float32)
    rows = make_rows(loaded.processor, "shipped", 8)
    assert math.exp(float(loaded.model(input_ids=rows, labels=rows).loss)) < 4.1


def test_commands_make_corpus_and_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["standin-text", "build", "--run", str(tmp_path)]) == 2
    assert "standin-text train" in capsys.readouterr().err
    assert main(["standin-text", "train", "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert main(["standin-text", "train", "--steps", "2", "--out", str(tmp_path / "run")]) == 2
    assert main(["standin-text", "build", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    assert main(["standin-text", "data", "--out", str(tmp_path / "data")]) == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {
        "README.md",
        "model.safetensors",
        "loss.csv",
        "loss.png",
    }
    assert len(list((tmp_path / "data").iterdir())) == len(SPLIT_ARTICLES)
