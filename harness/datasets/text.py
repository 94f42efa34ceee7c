"""WikiText-2 as a perplexity task and as calibration text, by the convention of GPTQ and QuaRot.

**Text.** The rows of a split (see ``text_files``), joined as ``"\\n\\n".join(rows)``, as GPTQ and QuaRot do. That is
not the raw file's own text: it has more newlines, and its perplexity is another.

**Windows.** The whole text is tokenized once, with the tokenizer's own special tokens, so a BOS stands in front of the
text and thus in the first window alone. Windows of ``context_length`` tokens follow one another without overlap; what
is left at the end is dropped.

Files come from ``--data-dir`` when it is given, else from the shipped corpus.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.datasets.text_files import SHIPPED_FOLDER, find_files, read_rows
from mqbench.harness.errors import CalibrationError, DatasetError
from mqbench.harness.quant.session import Batch
from mqbench.harness.record import CalibrationInfo

NAME = "wikitext2"

PARAGRAPH_WORDS = 30
"""Fewest words of a line that counts as a paragraph; shorter ones (headings, captions) repeat across articles."""

Tokenizer = Callable[..., Any]
"""A Hugging Face tokenizer."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split.

    Attributes:
        split: ``train``, ``valid`` or ``test``.
        source: Its first file.
        rows: Lines with their newline; blank lines are empty.
    """

    split: str
    source: Path
    rows: tuple[str, ...] = field(repr=False)

    @property
    def text(self) -> str:
        """What is tokenized."""
        return "\n\n".join(self.rows)

    @property
    def dataset(self) -> str:
        """``shipped`` or ``data-dir``: what records say in place of a path."""
        return "shipped" if self.source.parent == SHIPPED_FOLDER else "data-dir"

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the split's name and text; the same for every form of the file."""
        return hashlib.sha256(f"{NAME}/{self.split}\n{self.text}".encode()).hexdigest()

    def windows_hash(self, context_length: int) -> str:
        """SHA-256 of all that decides the windows but the tokenizer, which belongs to the weights."""
        return hashlib.sha256(f"{self.content_hash}/{context_length}".encode()).hexdigest()


def load_corpus(split: str = "test", data_dir: Path | None = None) -> Corpus:
    """Reads one split of the user's WikiText-2, or of the shipped corpus when ``data_dir`` is None.

    Raises:
        DatasetError: no file is there, or it is empty or damaged.
    """
    paths = find_files(split, data_dir)
    return Corpus(split, paths[0], tuple(row for path in paths for row in read_rows(path)))


def load_windows(
    tokenizer: Tokenizer, context_length: int, limit: int | None = None, data_dir: Path | None = None
) -> Tensor:
    """The windows of the test split whose perplexity is measured.

    Args:
        tokenizer: Of the model.
        context_length: Tokens per window (2048 for LLaMA-2 in the literature).
        limit: Windows at most, the first ones; None for all.
        data_dir: The user's data folder; None for the shipped corpus.

    Returns:
        (windows, context_length) token ids.

    Raises:
        DatasetError: no usable file, a text shorter than one window, or a ``limit`` below 1.
    """
    if limit is not None and limit < 1:
        raise DatasetError(f"--limit must be at least 1, got {limit}")
    tokens = tokenize(load_corpus("test", data_dir), tokenizer, context_length)
    count = len(tokens) // context_length
    return tokens[: count * context_length].view(count, context_length)[:limit].clone()


def tokenize(corpus: Corpus, tokenizer: Tokenizer, context_length: int) -> Tensor:
    """(tokens,) ids of the whole text with the special tokens that the tokenizer adds.

    Raises:
        DatasetError: they do not fill one window.
        ValueError: a window of fewer than two tokens predicts nothing.
    """
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2, got {context_length}")
    # verbose=False: no warning that the text is longer than the model's context
    tokens = torch.tensor(tokenizer(corpus.text, verbose=False)["input_ids"], dtype=torch.long)
    if len(tokens) < context_length:
        raise DatasetError(
            f"{corpus.source}: {len(tokens)} tokens do not fill one window of {context_length}; get the whole file"
        )
    return tokens


@dataclass(frozen=True, eq=False)
class TextCalibration:
    """Windows of the training split.

    Attributes:
        info: What records say of them.
        windows: (num_samples, context_length) token ids.
    """

    info: CalibrationInfo
    windows: Tensor = field(repr=False)

    def batches(self, model: nn.Module, batch_size: int) -> list[Batch]:
        """Inputs for ``model(**batch)``, on the model's device.

        No key/value cache is kept, and only the last position's logits are computed where the model can do that:
        nobody reads either.
        """
        device = next(model.parameters()).device
        return [_batch(model, chunk.to(device)) for chunk in self.windows.split(batch_size)]


def load_text_calibration(
    num_samples: int, seed: int, context_length: int, tokenizer: Tokenizer, data_dir: Path | None = None
) -> TextCalibration:
    """Windows at random offsets of the training text; a seed gives the very offsets that GPTQ and QuaRot draw.

    Windows may overlap one another. A smaller ``num_samples`` of the same seed gives the first ones.

    Raises:
        CalibrationError: fewer than one sample, too short a text, or a paragraph that the test split has too.
        DatasetError: a file is unusable.
    """
    info = text_calibration_info(num_samples, seed, context_length, data_dir)
    corpus = load_corpus("train", data_dir)
    tokens = tokenize(corpus, tokenizer, context_length)
    last_start = len(tokens) - context_length - 1
    if last_start < 0:
        raise CalibrationError(f"{corpus.source}: {len(tokens)} tokens are too few to draw from; get the whole file")
    draw = random.Random(seed)
    starts = torch.tensor([draw.randint(0, last_start) for _ in range(num_samples)])
    return TextCalibration(info, tokens[starts[:, None] + torch.arange(context_length)])


def text_calibration_info(
    num_samples: int, seed: int, context_length: int, data_dir: Path | None = None
) -> CalibrationInfo:
    """What records say of ``load_text_calibration`` with the same arguments; found without a tokenizer.

    Raises:
        CalibrationError: fewer than one sample, or a paragraph that the test split has too.
        DatasetError: a file is unusable.
    """
    if num_samples < 1:
        raise CalibrationError(f"--calib-samples must be at least 1, got {num_samples}")
    train = load_corpus("train", data_dir)
    refuse_overlap(train, load_corpus("test", data_dir))
    return CalibrationInfo(train.dataset, NAME, num_samples, seed, train.windows_hash(context_length))


def refuse_overlap(train: Corpus, test: Corpus) -> None:
    """Makes sure that no evaluated paragraph can be calibrated on; case and spacing make no difference.

    Raises:
        CalibrationError: a paragraph stands in both.
    """
    known = paragraph_hashes(train)
    shared = [row for digest, row in paragraph_hashes(test).items() if digest in known]
    if shared:
        raise CalibrationError(
            f"{len(shared)} evaluated paragraph(s) of {test.source} stand in {train.source} too (first: "
            f"'{' '.join(shared[0].split()[:8])} ...'); remove them from the training file"
        )


def paragraph_hashes(corpus: Corpus) -> dict[bytes, str]:
    """SHA-256 -> line, for every line of at least ``PARAGRAPH_WORDS`` words."""
    split = ((row.split(), row) for row in corpus.rows)
    return {
        hashlib.sha256(" ".join(words).casefold().encode()).digest(): row
        for words, row in split
        if len(words) >= PARAGRAPH_WORDS
    }


def _batch(model: nn.Module, input_ids: Tensor) -> dict[str, Any]:
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = 1
    return batch
