"""A tokenizer from a tiktoken file, which holds the bytes and the rank of every token: no code of the model's runs."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mqbench.harness.errors import MissingWeightsError


def read_tokenizer(file: Path, pattern: str, special: Sequence[str], how_to_get: str, **roles: Any) -> Any:
    """A ``PreTrainedTokenizerFast`` that splits as tiktoken does.

    Args:
        file: Lines of base64 bytes and rank.
        pattern: The regular expression that splits text before bytes are merged.
        special: Special tokens, whose ids follow the ranks in this order.
        how_to_get: For the error.
        roles: ``eos_token`` and the like.

    Raises:
        MissingWeightsError: the file cannot be read.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = read_ranks(file, how_to_get)
    letters = _letters()
    vocabulary = {_spelled(token, letters): rank for token, rank in ranks.items()}
    merges = [(_spelled(left, letters), _spelled(right, letters)) for left, right in _merges(ranks)]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, to_letters])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **roles)


def read_ranks(file: Path, how_to_get: str) -> dict[bytes, int]:
    """Token bytes to rank, which is also the token's id."""
    try:
        lines = (line.split() for line in file.read_text(encoding="ascii").splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in lines}
    except (OSError, ValueError, binascii.Error) as error:
        raise MissingWeightsError(f"'{file}' cannot be read as a tiktoken file ({error}); {how_to_get}") from None


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to make a token of two others, by rank of the result: tiktoken merges the lowest result first."""
    pairs = [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=lambda token: ranks[token])
        for cut in range(1, len(token))
    ]
    return [(left, right) for left, right in pairs if left in ranks and right in ranks]


def _letters() -> dict[int, str]:
    """The printable letter that stands for each byte in a ``ByteLevel`` vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _spelled(token: bytes, letters: Mapping[int, str]) -> str:
    return "".join(letters[byte] for byte in token)
