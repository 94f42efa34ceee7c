"""A tokenizer from a SentencePiece file and the list of tokens added to it: no code of the model's runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mqbench.harness.errors import MissingWeightsError

MODEL_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer_config.json"


class SentencePieceTokenizer:
    """Splits a text at added tokens and encodes what stands between them, as transformers' tokenizers in Python do.

    Args:
        folder: Holds ``tokenizer.model`` and ``tokenizer_config.json``, whose ``added_tokens_decoder`` names the added
            tokens, the control tokens of the file itself included.
        how_to_get: For the error.

    Attributes:
        added: Id of each added token.
        bos_token_id: Stands in front of a text.
        eos_token_id: Ends one.
        pad_token_id: The same.

    Raises:
        MissingWeightsError: a file cannot be read.
    """

    def __init__(self, folder: Path, how_to_get: str) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.pieces = SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
            tokens = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["added_tokens_decoder"]
            self.added = {token["content"]: int(key) for key, token in tokens.items()}
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(repr(error).split())
            raise MissingWeightsError(f"the tokenizer in '{folder}' cannot be read ({reason}); {how_to_get}") from None
        self.bos_token_id: int = self.pieces.bos_id()
        self.eos_token_id: int = self.pieces.eos_id()
        self.pad_token_id = self.eos_token_id
        self._names = {index: name for name, index in self.added.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) + ")")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """``input_ids`` of a text, behind the first token of all texts unless ``add_special_tokens`` is off."""
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self._split.split(text):
            ids += [self.added[part]] if part in self.added else self.pieces.encode(part)
        return {"input_ids": ids}

    def convert_tokens_to_ids(self, token: str) -> int:
        """Id of an added token.

        Raises:
            KeyError: it is none.
        """
        return self.added[token]

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of tokens; added ones are spelled, or left out."""
        return "".join(
            part if isinstance(part, str) else self.pieces.decode(part) for part in self._runs(ids, skip_special_tokens)
        )

    def batch_decode(
        self, rows: Sequence[Sequence[int]] | Tensor, skip_special_tokens: bool = False, **_: Any
    ) -> list[str]:
        """``decode`` of every row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def _runs(self, ids: Sequence[int] | Tensor, skip: bool) -> Iterator[list[int] | str]:
        """Added tokens' names, and runs of other ids between them."""
        run: list[int] = []
        for index in map(int, ids):
            if index not in self._names:
                run.append(index)
            elif not skip:
                yield run
                yield self._names[index]
                run = []
        yield run
