"""Tokenizers read from tiktoken files, against byte-pair encoding as it is defined."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.tiktoken_ranks import TEXT, encode_text, learn_ranks, write_ranks
from mqbench.harness.errors import MissingWeightsError
from mqbench.harness.models.glm_4v import TOKEN_PATTERN
from mqbench.harness.models.tiktoken_file import read_tokenizer

RANKS = learn_ranks(TOKEN_PATTERN)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    write_ranks(file, RANKS)
    return read_tokenizer(file, TOKEN_PATTERN, ["<|end|>", "<|user|>"], "get it", eos_token="<|end|>")


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from(TEXT.split()), max_size=8).map(" ".join))
def test_splits_as_defined(tokenizer, text):
    ids = ids_of(tokenizer, text)
    assert ids == encode_text(text, TOKEN_PATTERN, RANKS)
    assert tokenizer.decode(ids) == text


def test_merged_tokens_are_used(tokenizer):
    assert len(ids_of(tokenizer, TEXT)) < len(TEXT) / 2


def test_special_tokens_follow_the_ranks_and_are_text_in_a_prompt(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"]) == [len(RANKS), len(RANKS) + 1]
    assert max(ids_of(tokenizer, "a <|user|> b")) < len(RANKS)
    assert tokenizer.decode([len(RANKS), ord("a")], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("content", [None, b"no base64 at all\n", b"YQ==\n", b"YQ== one\n"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None):
    file = tmp_path / "tokenizer.model"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MissingWeightsError, match=r"tokenizer\.model' cannot be read .*; get it") as caught:
        read_tokenizer(file, TOKEN_PATTERN, [], "get it")
    assert "\n" not in str(caught.value)
