"""A small tiktoken file, learned from a text, and byte-pair encoding as its definition says."""

from __future__ import annotations

import base64
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

TEXT = "the theme of these thermal tests: what is written, is written there; 1234 12345 in the thesis of the tester. "


def words_of(text: str, pattern: str) -> list[bytes]:
    pieces = Split(Regex(pattern), behavior="isolated").pre_tokenize_str(text)
    return [piece.encode() for piece, _ in pieces]


def learn_ranks(pattern: str, num_merges: int = 30) -> dict[bytes, int]:
    """All bytes, then the most frequent pairs of ``TEXT``."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(num_merges):
        words = [split_bytes(word, ranks) for word in words_of(TEXT, pattern)]
        pairs = Counter(left + right for word in words for left, right in pairwise(word))
        ranks[max(pairs, key=lambda pair: (pairs[pair], pair))] = len(ranks)
    return ranks


def split_bytes(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Merges the adjacent pair whose result has the lowest rank, until none is a token."""
    parts = [bytes([byte]) for byte in word]
    while True:
        merged = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        if not merged or min(merged) == len(ranks):
            return parts
        at = merged.index(min(merged))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def encode_text(text: str, pattern: str, ranks: dict[bytes, int]) -> list[int]:
    return [ranks[part] for word in words_of(text, pattern) for part in split_bytes(word, ranks)]


def write_ranks(file: Path, ranks: dict[bytes, int]) -> None:
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
