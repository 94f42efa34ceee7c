"""The stand-ins' training loss: cross entropy of answers and questions, and the modality penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class TrainBatch:
    """Right-padded rows that all have a picture, or all have none.

    Attributes:
        pictures: What the family makes of the pictures; empty without any.
        input_ids: (B, T).
        labels: (B, T), -100 outside answers.
        visual: (B, T) bool, where visual tokens stand.
        question_start: Index of a question's first token, the same in every row.
    """

    pictures: Mapping[str, Tensor]
    input_ids: Tensor
    labels: Tensor
    visual: Tensor
    question_start: int


def right_padded(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    pad_id: int,
    image_id: int,
    pictures: Mapping[str, Tensor],
    question_start: int,
    device: str,
) -> TrainBatch:
    """Token ids of prompts with answers, and their labels, as one batch."""
    length = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])
    targets = torch.tensor([[*row, *[-100] * (length - len(row))] for row in labels])
    visual = input_ids == image_id
    return TrainBatch(pictures, input_ids.to(device), targets.to(device), visual.to(device), question_start)


def specialisation_penalty(activations: list[Tensor], visual: Tensor, text_channels: int) -> Tensor:
    """How loud each modality is, at its loudest, on the other's channels of down_proj's input, relative to the other.

    The first ``text_channels`` channels are text's, the rest visual. Maxima over tokens and not means: a static scale
    follows the maximum, and the few massive text tokens would hide all others in a mean. The last layer is left out:
    nobody reads its visual outputs.

    Shapes: activations (B, T, C) per layer, visual (B, T) bool.
    """
    total = activations[0].new_zeros((), dtype=torch.float32)
    for inner in activations[:-1]:
        energy = inner.float().square()
        seen = energy.masked_fill(~visual[..., None], 0).amax((0, 1))
        written = energy.masked_fill(visual[..., None], 0).amax((0, 1))
        total = total + _share(seen[:text_channels], written[:text_channels])
        total = total + _share(written[text_channels:], seen[text_channels:])
    return total / (2 * (len(activations) - 1))


def _share(intruder: Tensor, owner: Tensor) -> Tensor:
    return intruder.mean() / (owner.mean().detach() + 1e-6)


def real_tokens(batch: TrainBatch) -> Tensor:
    """(B, T) bool: up to an answer's last token; padding stands behind it."""
    last = (batch.labels != -100).long().cumsum(1).argmax(1)
    return torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device) <= last[:, None]


def answered_exactly(logits: Tensor, labels: Tensor) -> list[bool]:
    """Per row, whether every answer token is the greedy one behind the right ones before it.

    Shapes: logits (B, T, vocabulary), labels (B, T) with -100 outside answers.
    """
    wanted = labels[:, 1:]
    return ((logits[:, :-1].argmax(-1) == wanted) | (wanted == -100)).all(1).tolist()


def answer_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of the mean cross entropy of an answer's tokens: short answers weigh as much as long ones.

    Shapes: logits (B, T, vocabulary), labels (B, T) with -100 outside answers.
    """
    return _masked_entropy(logits, labels, labels != -100)


def prompt_entropy(logits: Tensor, batch: TrainBatch) -> Tensor:
    """The same over the question's tokens: what a question names is mostly in the picture or in the text before it.

    Guessing the name of the shape in "Is there a ..." from the picture teaches the match that a yes or no needs.
    """
    positions = torch.arange(batch.input_ids.shape[1], device=logits.device)
    answer_start = (batch.labels != -100).long().argmax(1)
    return _masked_entropy(
        logits, batch.input_ids, (positions >= batch.question_start) & (positions < answer_start[:, None])
    )


def _masked_entropy(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:].clamp_min(0), reduction="none")
    counted = mask[:, 1:]
    return ((each * counted).sum(1) / counted.sum(1).clamp_min(1)).mean()


def training_loss(
    feed: Any, model: Any, batch: TrainBatch, prompt_weight: float, penalty_weight: float, text_channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, answer cross entropy, penalty); the penalty counts only where visual and text tokens meet.

    Args:
        feed: The family's (``family.Feed``).
        model: The family's.
        batch: Rows with or without pictures.
        prompt_weight: Of the question's tokens.
        penalty_weight: Of the penalty.
        text_channels: Channels that belong to text.
    """
    logits, activations = feed.logits_and_activations(model, batch)
    entropy = answer_entropy(logits, batch.labels)
    loss = entropy + prompt_weight * prompt_entropy(logits, batch)
    if not batch.pictures:
        return loss, entropy.detach(), entropy.new_zeros(())
    penalty = specialisation_penalty(activations, batch.visual, text_channels)
    return loss + penalty_weight * penalty, entropy.detach(), penalty.detach()
