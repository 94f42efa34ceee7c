"""WikiText-2's files in all their forms give one text; its windows and calibration draws are those of GPTQ."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fakes import tiny_llama
from fakes.wikitext import BOS_ID, byte_tokenizer, raw_rows, write_parquet, write_raw
from mqbench.harness.datasets import text_files
from mqbench.harness.datasets.text import (
    PARAGRAPH_WORDS,
    Corpus,
    load_corpus,
    load_text_calibration,
    load_windows,
    refuse_overlap,
    text_calibration_info,
)
from mqbench.harness.errors import CalibrationError, DatasetError

ROWS = raw_rows()
Write = Callable[[Path], object]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A user's data folder with raw files of all splits."""
    for start, split in enumerate(("train", "valid", "test")):
        write_raw(tmp_path / "WikiText-2", split, raw_rows(10_000 * start, paragraphs=30))
    return tmp_path


# --- files ----------------------------------------------------------------------------------------------------------


def test_raw_and_parquet_give_one_text(tmp_path: Path) -> None:
    write_raw(tmp_path / "a" / "WikiText-2", "test", ROWS)
    write_parquet(tmp_path / "b" / "wikitext-2-raw-v1", "test", ROWS)
    write_parquet(tmp_path / "c" / "wikitext" / "wikitext-2-raw-v1", "test", ROWS, parts=3)
    raw, *parquet = [load_corpus("test", tmp_path / name) for name in "abc"]
    for corpus in parquet:
        assert corpus.rows == raw.rows
        assert corpus.content_hash == raw.content_hash
    assert raw.text.startswith("\n\n = Article 0 = \n\n\n\n\n w0 w1 ")
    assert raw.text == "\n\n".join("" if row == " \n" else row for row in ROWS)


@pytest.mark.parametrize("folder", text_files.FOLDERS)
@pytest.mark.parametrize("name", text_files.TEXT_NAMES)
def test_folders_and_names_of_text_files(tmp_path: Path, folder: str, name: str) -> None:
    path = write_raw(tmp_path / folder, "valid", ROWS, name)
    corpus = load_corpus("valid", tmp_path)
    assert corpus.source == path
    assert corpus.dataset == "data-dir"


@pytest.mark.parametrize("folder", [*text_files.FOLDERS, "data", "WikiText-2/data"])
def test_folders_of_parquet_files(tmp_path: Path, folder: str) -> None:
    write_parquet(tmp_path / folder, "validation", ROWS)
    assert load_corpus("valid", tmp_path).rows == tuple("" if row == " \n" else row for row in ROWS)


def test_older_parquet_names_end_in_a_hash(tmp_path: Path) -> None:
    (path,) = write_parquet(tmp_path / "data", "test", ROWS)
    path.rename(path.with_name("test-00000-of-00001-7231805191546d57.parquet"))
    assert len(load_corpus("test", tmp_path).rows) == len(ROWS)


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    rows = [" \n", " one\u2028line\x85with\x0codd\x1cseparators \n", " two\r\n"]
    write_raw(tmp_path, "test", rows)
    assert load_corpus("test", tmp_path).rows == ("", rows[1], " two\n")


def test_the_shipped_corpus_is_there_and_has_no_overlap() -> None:
    train, test = load_corpus("train"), load_corpus("test")
    assert train.dataset == test.dataset == "shipped"
    assert len(load_corpus("valid").rows) > 100
    refuse_overlap(train, test)


def test_the_hash_is_of_split_text_and_window_length(data_dir: Path) -> None:
    test, valid = load_corpus("test", data_dir), load_corpus("valid", data_dir)
    changed = replace(test, rows=(*test.rows[:-1], "x"))
    renamed = replace(test, split="valid")
    assert len({corpus.content_hash for corpus in (test, valid, changed, renamed)}) == 4
    assert test.windows_hash(8) == load_corpus("test", data_dir).windows_hash(8) != test.windows_hash(9)


def parquet_table(columns: dict[str, list[Any]]) -> Write:
    return lambda folder: pq.write_table(pa.table(columns), folder / "test-00000-of-00001.parquet")


def text_file(content: bytes, name: str = "wiki.test.raw") -> Write:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda _: None,
            r"no WikiText-2 \(test\) in .*put wiki.test.raw, or Hugging Face's test-\*.parquet, into",
        ),
        (text_file(b" = A = \n", "wiki.test.tokens"), r"only wiki.test.tokens, in which rare words are <unk>; put"),
        (text_file(b""), r"wiki.test.raw: the file holds no text; get it again"),
        (text_file(b" \n \n\n"), r"the file holds no text; get it again"),
        (text_file(b" = A = \n one \n"), r"no blank line, .* get the file again"),
        (text_file(b" \n caf\xe9 \n"), r"cannot be read as UTF-8 .*; get it again"),
        (text_file(b" \n a\0\0b \n"), r"damaged, it holds NUL characters; get it again"),
        (text_file(b"version https://git-lfs.github.com/spec/v1\n\n"), r"a Git LFS pointer, .*; get the file itself"),
        (text_file(b"PAR1 cut", "test-00000-of-00001.parquet"), r"no readable parquet file .*; get it again"),
        (text_file(b"", "test-00000-of-00001.parquet"), r"no readable parquet file .*; get it again"),
        (parquet_table({"page": ["", "a"]}), r"no readable parquet file with a column 'text' .*; get it again"),
        (parquet_table({"text": ["", None]}), r"holds values that are no text; get it again"),
        (parquet_table({"text": [1, 2]}), r"holds values that are no text; get it again"),
        (parquet_table({"text": ["", ""]}), r"the file holds no text; get it again"),
        (lambda folder: write_parquet(folder, "test", ROWS, 3)[1].unlink(), r"missing or double; get each"),
        (lambda folder: write_parquet(folder, "test", ROWS, 3)[2].unlink(), r"missing or double; get each"),
    ],
)
def test_unusable_files(tmp_path: Path, write: Write, message: str) -> None:
    write(tmp_path)
    with pytest.raises(DatasetError, match=message) as raised:
        load_corpus("test", tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_damaged_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "SHIPPED_FOLDER", tmp_path)
    with pytest.raises(DatasetError, match=r"lacks wiki\.test\.raw; reinstall mqbench"):
        load_corpus("test")


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_follow_one_another_and_the_rest_is_dropped(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    with caplog.at_level(logging.WARNING):
        windows = load_windows(tokenizer, 17, data_dir=data_dir)
    assert not caplog.records  # not a word about the length of the text
    stream = [BOS_ID, *tokenizer(load_corpus("test", data_dir).text, add_special_tokens=False)["input_ids"]]
    assert len(stream) % 17
    assert windows.shape == (len(stream) // 17, 17)
    assert windows.flatten().tolist() == stream[: len(stream) // 17 * 17]


def test_only_the_first_window_begins_with_bos(data_dir: Path) -> None:
    windows = load_windows(byte_tokenizer(), 17, data_dir=data_dir)
    assert (windows == BOS_ID).nonzero().tolist() == [[0, 0]]


def test_limit_takes_the_first_windows(data_dir: Path) -> None:
    windows = load_windows(byte_tokenizer(), 17, data_dir=data_dir)
    assert torch.equal(load_windows(byte_tokenizer(), 17, 3, data_dir), windows[:3])
    assert torch.equal(load_windows(byte_tokenizer(), 17, 10**9, data_dir), windows)


def test_windows_that_cannot_be(data_dir: Path) -> None:
    with pytest.raises(DatasetError, match="--limit must be at least 1"):
        load_windows(byte_tokenizer(), 17, 0, data_dir)
    with pytest.raises(DatasetError, match="do not fill one window of 1000000; get the whole file"):
        load_windows(byte_tokenizer(), 1_000_000, None, data_dir)
    with pytest.raises(ValueError, match="context_length"):
        load_windows(byte_tokenizer(), 1, None, data_dir)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_offsets_are_those_of_gptq(data_dir: Path) -> None:
    tokenizer = byte_tokenizer()
    drawn = load_text_calibration(20, 7, 33, tokenizer, data_dir)
    tokens = tokenizer("\n\n".join(load_corpus("train", data_dir).rows))["input_ids"]
    random.seed(7)  # GPTQ's and QuaRot's loop: one randint of the global generator for each sample
    starts = [random.randint(0, len(tokens) - 33 - 1) for _ in range(20)]
    assert drawn.windows.tolist() == [tokens[start : start + 33] for start in starts]


def test_a_smaller_draw_is_a_part_of_a_larger(data_dir: Path) -> None:
    few, many, other = (
        load_text_calibration(count, seed, 33, byte_tokenizer(), data_dir).windows
        for count, seed in ((4, 0), (9, 0), (9, 1))
    )
    assert torch.equal(many[:4], few)
    assert not torch.equal(many, other)


def test_what_records_say_needs_no_tokenizer(data_dir: Path) -> None:
    info = text_calibration_info(5, 3, 33, data_dir)
    assert load_text_calibration(5, 3, 33, byte_tokenizer(), data_dir).info == info
    assert (info.dataset, info.split, info.num_samples, info.seed) == ("data-dir", "wikitext2", 5, 3)
    assert text_calibration_info(5, 3, 34, data_dir).sha256 != info.sha256
    write_raw(data_dir / "WikiText-2", "train", raw_rows(77_000, paragraphs=30))
    assert text_calibration_info(5, 3, 33, data_dir).sha256 != info.sha256


def test_a_paragraph_of_the_test_split_is_refused(data_dir: Path) -> None:
    copied = load_corpus("test", data_dir).rows[5].replace(" w", "  W")
    write_raw(data_dir / "WikiText-2", "train", [*raw_rows(paragraphs=9), copied])
    with pytest.raises(CalibrationError, match=r"1 evaluated paragraph\(s\) of .*'w20040 .*'\); remove them"):
        load_text_calibration(2, 0, 33, byte_tokenizer(), data_dir)


def test_headings_and_short_lines_may_repeat() -> None:
    short, long = " ".join(["word"] * (PARAGRAPH_WORDS - 1)), " ".join(["word"] * PARAGRAPH_WORDS)
    train, test = (Corpus(split, Path(split), ("", " = = History = = \n", short)) for split in ("train", "test"))
    refuse_overlap(train, test)
    with pytest.raises(CalibrationError):
        refuse_overlap(replace(train, rows=(long,)), replace(test, rows=(long,)))


def test_draws_that_cannot_be(data_dir: Path) -> None:
    with pytest.raises(CalibrationError, match="--calib-samples must be at least 1"):
        load_text_calibration(0, 0, 33, byte_tokenizer(), data_dir)
    length = len(byte_tokenizer()(load_corpus("train", data_dir).text)["input_ids"])
    with pytest.raises(CalibrationError, match="too few to draw from; get the whole file"):
        load_text_calibration(1, 0, length, byte_tokenizer(), data_dir)


def test_batches_are_inputs_without_cache_and_logits(data_dir: Path) -> None:
    model = tiny_llama.tiny_model(vocab_size=300)
    drawn = load_text_calibration(5, 0, 33, byte_tokenizer(), data_dir)
    batches = drawn.batches(model, 2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), drawn.windows)
    for batch in batches:
        output = model(**batch)
        assert batch["attention_mask"].all()
        assert output.past_key_values is None
        assert output.logits.shape == (len(batch["input_ids"]), 1, 300)


def test_a_model_without_logits_to_keep(data_dir: Path) -> None:
    class Plain(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:  # type: ignore[override]
            return input_ids

    (batch,) = load_text_calibration(2, 0, 33, byte_tokenizer(), data_dir).batches(Plain(1, 1), 2)
    assert set(batch) == {"input_ids", "attention_mask", "use_cache"}
