"""A SentencePiece tokenizer like InternLM2's, trained on a few sentences."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceTrainer

SENTENCES = (
    "What is written on the sign in this picture?",
    "Answer the question using a single word or phrase.",
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
)
CONTROLS = ("<unk>", "<s>", "</s>")


def write_tokenizer(folder: Path, added: Sequence[str]) -> int:
    """Writes ``tokenizer.model`` (bytes for what it has not seen, spaces as they are) and ``tokenizer_config.json``.

    Returns the number of ids.
    """
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    ids = dict(enumerate(CONTROLS)) | dict(enumerate(added, start=400))
    tokens = {str(index): {"content": token, "special": True} for index, token in ids.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    return 400 + len(added)
