"""What every causal model does alike: left-padded rows in, greedy text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mqbench.harness.quant.session import Batch


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, (rows, longest)."""
    longest = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(longest) >= longest - lengths[:, None]).long()}


def greedy_answers(model: Any, tokenizer: Any, batch: Batch, max_new_tokens: int, pad_id: int) -> list[str]:
    """Greedy continuations of a left-padded batch, without special tokens."""
    # Released checkpoints' generation configs sample and penalize repetition; VLMEvalKit turns that off.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    unused = {"temperature": None, "top_p": None, "top_k": None}
    sequences = model.generate(**batch, max_new_tokens=max_new_tokens, **greedy, **unused, pad_token_id=pad_id)
    new_tokens = sequences[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
