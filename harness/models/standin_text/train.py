"""Trains the text stand-in from nothing: seeded, resumable, on one CPU core.

Every step's text comes from a random stream of its own, so a resumed run sees what an uninterrupted one sees, and no
text is seen twice.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mqbench.harness.models.standin_text.architecture import CONTEXT_LENGTH, build_config, build_model
from mqbench.harness.models.standin_text.corpus import joined_text, raw_text
from mqbench.harness.models.standin_text.tokenizer import build_tokenizer

ARTICLES_PER_ROW = 1.1
"""Generated per row of tokens; an article has about 370, and a window may start in the middle of one."""
VALIDATION_ROWS = 64


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the trained weights.

    Attributes:
        steps: Optimizer steps.
        batch_size: Windows of ``CONTEXT_LENGTH`` tokens per step.
        learning_rate: Peak, behind a linear warm-up and before a cosine decay to nothing.
        down_mean: Ingredient "large down_proj means" (Eq. 9), in standard deviations; 0 leaves it out.
        mean_layers: The layers that start with them.
    """

    seed: int = 0
    steps: int = 2400
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    down_mean: float = 0.3
    mean_layers: tuple[int, ...] = (1, 3)

    def learning_rate_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


@dataclass
class CurvePoint:
    """One row of the loss curve, in nats per token."""

    step: int
    cross_entropy: float
    held_out: float | None = None


def make_rows(tokenizer: PreTrainedTokenizerFast, split: str, count: int) -> Tensor:
    """Windows of running text, half of the time in the raw files' form and half joined.

    Returns:
        (count, CONTEXT_LENGTH) token ids.
    """
    rng = Random(split)
    text = raw_text(split, math.ceil(ARTICLES_PER_ROW * count) + 3)
    ids = tokenizer(joined_text(text) if rng.random() < 0.5 else text)["input_ids"]
    start, length = rng.randrange(CONTEXT_LENGTH), count * CONTEXT_LENGTH
    return torch.tensor(ids[start : start + length]).view(count, CONTEXT_LENGTH)


class Trainer:
    """A training run in a folder: ``checkpoint.pt`` and ``loss.csv``."""

    def __init__(self, settings: TrainSettings, directory: Path) -> None:
        self.settings, self.directory = settings, directory
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer()
        config = build_config(self.tokenizer)
        self.model = build_model(config, settings.seed, settings.down_mean, settings.mean_layers)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
        self.step = 0
        self.curve: list[CurvePoint] = []

    @property
    def checkpoint_path(self) -> Path:
        return self.directory / "checkpoint.pt"

    def resume(self) -> bool:
        """Loads the last checkpoint of the same settings; False when there is none.

        Raises:
            ValueError: it was made with other settings.
        """
        if not self.checkpoint_path.exists():
            return False
        saved = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        if saved["settings"] != _plain(self.settings):
            raise ValueError(f"{self.checkpoint_path} was trained with other settings; choose another --out")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.curve = [CurvePoint(**row) for row in saved["curve"]]
        return True

    def save(self) -> None:
        """Writes the checkpoint by an atomic rename, and the loss curve."""
        state = {
            "settings": _plain(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "curve": [asdict(row) for row in self.curve],
        }
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint_path)
        with (self.directory / "loss.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "cross_entropy", "held_out"])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.curve)

    def train_step(self) -> float:
        """One optimizer step; returns the mean cross entropy in nats per token."""
        settings = self.settings
        rows = make_rows(self.tokenizer, f"train-{settings.seed}-{self.step}", settings.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(self.step)
        loss = self.model(input_ids=rows, labels=rows).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def run(
        self, validate_every: int = 250, log_every: int = 25, num_held_out: int = VALIDATION_ROWS
    ) -> Iterator[CurvePoint | None]:
        """Trains to the end; yields after each step, the newest row of the curve whenever there is one."""
        losses: list[float] = []
        while self.step < self.settings.steps:
            losses.append(self.train_step())
            last = self.step == self.settings.steps
            if self.step % log_every and not last:
                yield None
                continue
            self.curve.append(CurvePoint(self.step, sum(losses) / len(losses)))
            losses = []
            if self.step % validate_every == 0 or last:
                held_out = held_out_loss(self.model, self.tokenizer, num_held_out)
                self.curve[-1] = replace(self.curve[-1], held_out=held_out)
                self.save()
            yield self.curve[-1]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = VALIDATION_ROWS) -> float:
    """Mean negative log likelihood in nats per token over fresh windows."""
    batches = make_rows(tokenizer, "validation", count).split(16)
    return sum(float(model(input_ids=rows, labels=rows).loss) * len(rows) for rows in batches) / count


def train(settings: TrainSettings, directory: Path) -> Trainer:
    """Trains or resumes with a progress bar.

    Raises:
        ValueError: ``directory`` holds a run with other settings.
    """
    trainer = Trainer(settings, directory)
    trainer.resume()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=settings.steps, completed=trainer.step)
        for point in trainer.run():
            progress.update(bar, completed=trainer.step)
            if point is not None and point.held_out is not None:
                line = f"step {point.step}: cross entropy {point.cross_entropy:.3f}, held out {point.held_out:.3f}"
                progress.console.print(line)
    return trainer


def _plain(settings: TrainSettings) -> dict[str, object]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
