"""Losses per window: equal to transformers' own and to a naive loop, for any batch size, and resumable to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fakes.tiny_llama import VOCABULARY, tiny_layout, tiny_model
from mqbench.harness.errors import NonFiniteError
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.perplexity import perplexity, window_losses
from mqbench.harness.store import PartialAnswers


class Bigram(nn.Module):
    """Logits of the next token are a row of a table; remembers what it was called with."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, input_ids: Tensor, **kwargs: Tensor) -> SimpleNamespace:
        self.calls.append({"input_ids": input_ids, **kwargs})
        return SimpleNamespace(logits=self.table[input_ids])


def loaded(model: nn.Module) -> LoadedModel:
    return LoadedModel("tiny", model, None, tiny_layout(tiny_model()))


def bigram(dtype: torch.dtype = torch.float64, seed: int = 0, vocabulary: int = 11) -> Bigram:
    generator = torch.Generator().manual_seed(seed)
    return Bigram(3 * torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64).to(dtype))


def random_windows(count: int, length: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def naive_losses(table: Tensor, windows: Tensor) -> list[float]:
    """Mean over a window of log(sum of exp of the logits) minus the right logit, in Python's own floats."""
    losses = []
    for window in windows.tolist():
        terms = []
        for token, target in pairwise(window):
            row = table[token].tolist()
            terms.append(math.log(math.fsum(map(math.exp, row))) - row[target])
        losses.append(math.fsum(terms) / len(terms))
    return losses


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_loss_of_transformers(dtype: torch.dtype) -> None:
    model, windows = tiny_model(dtype), random_windows(7, 24)
    expected = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    losses = window_losses(loaded(model), windows, batch_size=3)
    assert list(losses) == [str(index) for index in range(7)]
    assert list(losses.values()) == pytest.approx(expected, rel=0, abs=1e-6)
    assert max(expected) - min(expected) > 0.1


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 9), length=st.integers(2, 40), batch_size=st.integers(1, 10), seed=st.integers(0, 99))
def test_equals_a_naive_loop(count: int, length: int, batch_size: int, seed: int) -> None:
    model = bigram(seed=seed)
    windows = random_windows(count, length, 11, seed)
    losses = window_losses(loaded(model), windows, batch_size)
    assert list(losses.values()) == pytest.approx(naive_losses(model.table, windows), rel=0, abs=1e-12)


def test_long_windows_go_in_chunks() -> None:
    model, windows = bigram(), random_windows(2, 1500, 11)
    losses = window_losses(loaded(model), windows, 2)
    assert list(losses.values()) == pytest.approx(naive_losses(model.table, windows), rel=0, abs=1e-12)


def test_half_precision_logits_are_widened() -> None:
    model, windows = bigram(torch.bfloat16), random_windows(3, 200, 11)
    losses = window_losses(loaded(model), windows, 2)
    assert list(losses.values()) == pytest.approx(naive_losses(model.table.double(), windows), rel=0, abs=1e-6)


def test_the_batch_size_does_not_matter() -> None:
    lm, windows = loaded(tiny_model(torch.float64)), random_windows(7, 24)
    alone = window_losses(lm, windows, 1)
    for batch_size in (2, 5, 7, 100):
        assert window_losses(lm, windows, batch_size) == pytest.approx(alone, rel=0, abs=1e-12)


def test_batches_hold_whole_windows_and_no_padding() -> None:
    model, windows = bigram(), random_windows(5, 8, 11)
    window_losses(loaded(model), windows, 2)
    assert torch.equal(torch.cat([call["input_ids"] for call in model.calls]), windows)
    assert all(call["attention_mask"].bool().all() for call in model.calls)
    assert all(call["use_cache"] is False for call in model.calls)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    lm, windows = loaded(tiny_model()), random_windows(7, 24)
    whole = window_losses(lm, windows, 3)
    partial = PartialAnswers(tmp_path / "cell.jsonl")

    class Killed(Exception):
        pass

    def keep_one_batch(new: Mapping[str, str]) -> None:
        partial.append(dict(list(new.items())[:-1]))  # the batch's last line did not reach the disk
        raise Killed

    with pytest.raises(Killed):
        window_losses(lm, windows, 3, keep_one_batch)
    assert list(partial.load()) == ["0", "1"]
    rest: list[str] = []
    assert window_losses(lm, windows, 3, rest.extend, partial.load()) == whole
    assert rest == [str(index) for index in range(7)]  # its batch ran again as a whole


def test_finished_batches_do_not_run_again() -> None:
    model, windows = bigram(), random_windows(7, 8, 11)
    told: dict[str, str] = {}
    whole = window_losses(loaded(model), windows, 3, told.update)
    assert {index: float(text) for index, text in told.items()} == whole
    model.calls.clear()
    done = {index: told[index] for index in ("0", "1", "2", "6")}
    assert window_losses(loaded(model), windows, 3, done=done) == whole
    assert [len(call["input_ids"]) for call in model.calls] == [3]


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary() -> None:
    losses = window_losses(loaded(Bigram(torch.zeros(11, 11, dtype=torch.float64))), random_windows(4, 9, 11), 2)
    assert perplexity(losses) == pytest.approx(11, rel=1e-12)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    assert perplexity({"0": math.log(2), "1": math.log(8)}) == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_window(value: float) -> None:
    model, windows = bigram(), random_windows(3, 8, 10)
    windows[1, 3] = 10
    model.table[10] = value
    with pytest.raises(NonFiniteError, match="window 1 is nan"):
        window_losses(loaded(model), windows, 2)


def test_a_perplexity_beyond_floats_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="too large"):
        perplexity({"0": 800.0})


def test_batch_size_below_one() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        window_losses(loaded(bigram()), random_windows(3, 8, 11), 0)
