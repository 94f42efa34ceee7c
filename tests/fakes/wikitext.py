"""A tiny tokenizer with a BOS, and tiny files in WikiText-2's forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS_ID = 0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless tokenizer, one token per byte, that puts one BOS in front of a text, as LLaMA's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS_ID} | {piece: number for number, piece in enumerate(alphabet, start=1)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", model_max_length=16)


def raw_rows(start: int = 0, paragraphs: int = 4, words: int = 40) -> list[str]:
    """Lines of a raw file: blank lines hold a space, headings stand between equals signs; numbers differ by start."""
    rows = [" \n", f" = Article {start} = \n", " \n"]
    for number in range(paragraphs):
        rows += [" " + " ".join(f"w{start + number * words + word}" for word in range(words)) + " . \n", " \n"]
    return rows


def write_raw(folder: Path, split: str, rows: Sequence[str], name: str = "wiki.{}.raw") -> Path:
    """A raw file; makes its folder."""
    path = folder / name.format(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(rows).encode())
    return path


def write_parquet(folder: Path, split: str, rows: Sequence[str], parts: int = 1) -> list[Path]:
    """Hugging Face's files of the same lines: blank ones are empty, all others keep their newline."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = ["" if row == " \n" else row for row in rows]
    size = -(-len(texts) // parts)
    paths = []
    for part in range(parts):
        paths.append(folder / f"{split}-{part:05d}-of-{parts:05d}.parquet")
        pq.write_table(pa.table({"text": texts[part * size : (part + 1) * size]}), paths[-1])
    return paths
