"""Trains a stand-in, from nothing or from another one: seeded, resumable, on a CPU core or a GPU.

Every step's examples come from a generator seeded with (seed, step), so a resumed run sees what an uninterrupted one
sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mqbench.harness.models.standin import tasks
from mqbench.harness.models.standin.align import Alignment
from mqbench.harness.models.standin.architecture import DEFAULT_SIZE, Size
from mqbench.harness.models.standin.curve import CurvePoint, write_curve
from mqbench.harness.models.standin.family import DEFAULT_FAMILY, Feed, StandIn, find_standin, text_channels_of
from mqbench.harness.models.standin.inherit import inherit, load_donor
from mqbench.harness.models.standin.objective import answered_exactly, training_loss
from mqbench.harness.models.standin.tasks import Example

MAX_DIFFICULTY = 0.4
JOINT_STEPS = 1100
"""On the tasks, of a stand-in that starts from another."""
MIXTURE: tuple[tuple[Callable[[Random, float], Example], float], ...] = (
    (tasks.textvqa, 0.24),
    (tasks.docvqa, 0.16),
    (tasks.ocrbench, 0.12),
    (tasks.mme, 0.26),
    (tasks.open_question, 0.08),
    (lambda rng, difficulty: tasks.scienceqa(rng, difficulty, context="IMG"), 0.14),
)


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the trained weights; the ingredients of hardness are switches.

    Attributes:
        family: Which stand-in.
        donor: The shipped stand-in to start from (``inherit``); None for initial weights.
        align_steps: How many of the steps teach the vision tower the donor's features (``align``); without a donor 0.
        align_rate: Peak learning rate of these.
        steps: Optimizer steps.
        batch_size: Image examples per step; a text-only step takes twice as many.
        text_only_every: Each n-th step holds text-only questions.
        learning_rate: Peak, behind a linear warm-up.
        hold: Share of the steps (of each of the two lessons) before the cosine decay begins: yes/no and letter answers
            leave their plateau late.
        curriculum: (first, last) step of the widening from one font in fixed cells to full variety.
        blend: (first, last) step of the change from the first reading lesson to the full mixture of tasks.
        fc2_mean: Ingredient "large fc2 mean", in standard deviations; 0 leaves it out.
        prompt_weight: Share of the question's own tokens in the loss.
        penalty_weight: Ingredient "modality-specialised MLP channels"; 0 leaves it out.
        bfloat16: Autocast matrix products to bfloat16 (weights and optimizer stay in float32).
    """

    family: str = DEFAULT_FAMILY
    donor: str | None = None
    align_steps: int = 0
    align_rate: float = 2e-3
    seed: int = 0
    steps: int = 10600
    batch_size: int = 48
    text_only_every: int = 4
    learning_rate: float = 1.2e-3
    hold: float = 0.75
    warmup_steps: int = 200
    curriculum: tuple[int, int] = (400, 1867)
    blend: tuple[int, int] = (300, 1300)
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    prompt_weight: float = 0.5
    fc2_mean: float = 0.3
    penalty_weight: float = 0.3
    bfloat16: bool = True

    def learning_rate_at(self, step: int) -> float:
        peak, done, steps = self.learning_rate, step - self.align_steps, self.steps - self.align_steps
        if step < self.align_steps:
            peak, done, steps = self.align_rate, step, self.align_steps
        rise = _ramp(done + 1, (0, self.warmup_steps))
        fall = _ramp(done, (round(self.hold * steps), steps))
        return peak * rise * 0.5 * (1 + math.cos(math.pi * fall))

    def difficulty_at(self, step: int) -> float:
        return MAX_DIFFICULTY * _ramp(step, self.curriculum)


def recipe(family: str, from_nothing: bool = False) -> TrainSettings:
    """How a family's stand-in is trained: the first one from nothing, the others from it."""
    if from_nothing or family == DEFAULT_FAMILY:
        return TrainSettings(family)
    align_steps = find_standin(family).align_steps
    return TrainSettings(
        family,
        donor=f"standin-{DEFAULT_FAMILY}",
        align_steps=align_steps,
        steps=align_steps + JOINT_STEPS,
        learning_rate=8e-4,
        hold=0.5,
        warmup_steps=100,
        curriculum=(0, 1),
        blend=(0, 1),
    )


def make_examples(settings: TrainSettings, step: int) -> list[Example]:
    """The examples of one training step."""
    rng = Random(f"train-{settings.seed}-{step}")
    difficulty = settings.difficulty_at(step)
    if step % settings.text_only_every == settings.text_only_every - 1:
        return [
            tasks.scienceqa(rng, difficulty, context=rng.choice(("TXT", "NO"))) for _ in range(2 * settings.batch_size)
        ]
    makers, weights = zip(*MIXTURE, strict=True)
    share = _ramp(step, settings.blend)
    chosen = [
        tasks.first_reading if rng.random() >= share else rng.choices(makers, weights)[0]
        for _ in range(settings.batch_size)
    ]
    return [maker(rng, difficulty) for maker in chosen]


def mixed_examples(rng: Random, count: int) -> list[Example]:
    """Examples with pictures, of every kind, at full difficulty."""
    makers, weights = zip(*MIXTURE, strict=True)
    return [maker(rng, MAX_DIFFICULTY) for maker in rng.choices(makers, weights, k=count)]


def make_pictured(settings: TrainSettings, step: int) -> list[Example]:
    """The examples of one step that teaches the vision tower."""
    return mixed_examples(Random(f"align-{settings.seed}-{step}"), settings.batch_size)


@torch.no_grad()
def exact_match(model: Any, feed: Feed, examples: Sequence[Example], device: str) -> list[bool]:
    """Greedy exact match per example: every answer token is the argmax behind the right ones before it."""
    batch = feed.collate(examples, device)
    return answered_exactly(feed.logits_and_activations(model, batch)[0], batch.labels)


def validation_examples(count: int) -> dict[str, list[Example]]:
    """Held-out examples by kind, at full difficulty."""
    rng = Random("validation")
    made = {
        "textvqa": [tasks.textvqa(rng, MAX_DIFFICULTY) for _ in range(count)],
        "docvqa": [tasks.docvqa(rng, MAX_DIFFICULTY) for _ in range(count)],
        "ocrbench": [tasks.ocrbench(rng, MAX_DIFFICULTY) for _ in range(count)],
        "mme": [tasks.mme(rng, MAX_DIFFICULTY) for _ in range(count)],
    }
    for context in tasks.CONTEXTS:
        made[f"scienceqa-{context}"] = [tasks.scienceqa(rng, MAX_DIFFICULTY, context=context) for _ in range(count)]
    return made


class Trainer:
    """A training run in a folder: ``checkpoint.pt``, ``loss.csv``, and the model at the end."""

    def __init__(
        self, settings: TrainSettings, directory: Path, device: str = "cpu", size: Size = DEFAULT_SIZE
    ) -> None:
        self.settings, self.directory, self.device, self.size = settings, directory, device, size
        directory.mkdir(parents=True, exist_ok=True)
        standin = find_standin(settings.family)
        self.tokenizer = standin.build_tokenizer()
        config = standin.build_config(self.tokenizer, size)
        self.model = standin.build_model(config, settings.seed, settings.fc2_mean).to(device)
        self.feed = standin.feed(self.model, self.tokenizer)
        self.alignment = None if settings.donor is None else self._start_from(settings.donor, standin)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
        self.step = 0
        self.curve: list[CurvePoint] = []
        self.text_channels = text_channels_of(self.model, standin.layout(self.model))

    def _start_from(self, donor_name: str, standin: StandIn) -> Alignment:
        donor, layout = load_donor(donor_name), standin.layout(self.model)
        inherit(self.model, layout, self.tokenizer, donor)
        assert standin.grid is not None
        return Alignment(self.model, layout, self.feed, standin.grid, donor.model.to(self.device))

    @property
    def checkpoint_path(self) -> Path:
        return self.directory / "checkpoint.pt"

    def resume(self) -> bool:
        """Loads the last checkpoint of the same settings; False when there is none."""
        if not self.checkpoint_path.exists():
            return False
        saved = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        if saved_settings(saved) != _plain(self.settings):
            raise ValueError(f"{self.checkpoint_path} was trained with other settings; choose another --out")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.curve = [CurvePoint(**row) for row in saved["curve"]]
        return True

    def save(self) -> None:
        """Writes the checkpoint and the loss curve, each by an atomic rename."""
        state = {
            "settings": _plain(self.settings),
            "size": asdict(self.size),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "curve": [asdict(row) for row in self.curve],
        }
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint_path)
        write_curve(self.curve, self.directory / "loss.csv")

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns (cross entropy, penalty)."""
        settings = self.settings
        batch = self.feed.collate(make_examples(settings, self.step), self.device)
        with self._autocast():
            weights = (settings.prompt_weight, settings.penalty_weight)
            loss, entropy, penalty = training_loss(self.feed, self.model, batch, *weights, self.text_channels)
        self._update(loss)
        return float(entropy), float(penalty)

    def align_step(self) -> float:
        """One optimizer step of the vision tower alone; returns its loss."""
        assert self.alignment is not None
        with self._autocast():
            loss = self.alignment.loss(make_pictured(self.settings, self.step), self.device)
        self._update(loss)
        return float(loss.detach())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.settings.bfloat16)

    def _update(self, loss: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.step += 1

    def validate(self, count: int = 100) -> dict[str, float]:
        """Percent of held-out examples that are right, by kind."""
        scores = {}
        for kind, examples in validation_examples(count).items():
            hits = exact_match(self.model, self.feed, examples, self.device)
            scores[kind] = 100 * sum(hits) / len(hits)
        return scores

    def run(
        self, validate_every: int = 500, save_every: int = 250, log_every: int = 50
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Trains to the end; yields (step, validation scores) after each step, the scores empty but now and then."""
        entropies: list[float] = []
        penalties: list[float] = []
        alignments: list[float] = []
        while self.step < self.settings.steps:
            text_only = self.step % self.settings.text_only_every == self.settings.text_only_every - 1
            if self.step < self.settings.align_steps:
                alignments.append(self.align_step())
            else:
                entropy, penalty = self.train_step()
                if not text_only:
                    entropies.append(entropy)
                    penalties.append(penalty)
            last = self.step == self.settings.steps
            scores: dict[str, float] = {}
            if self.step % log_every == 0 or last:
                aligned = _mean(alignments) if alignments else None
                self.curve.append(CurvePoint(self.step, _mean(entropies), _mean(penalties), alignment=aligned))
                entropies, penalties, alignments = [], [], []
            if self.step % validate_every == 0 or last:
                scores = self.validate()
                self.curve[-1] = replace(self.curve[-1], exact_match_percent=_mean(list(scores.values())))
            if self.step % save_every == 0 or last:
                self.save()
            yield self.step, scores


def train(settings: TrainSettings, directory: Path, device: str = "cpu") -> Trainer:
    """Trains or resumes with a progress bar.

    Raises:
        ValueError: ``directory`` holds a run with other settings.
    """
    trainer = Trainer(settings, directory, device)
    trainer.resume()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=settings.steps, completed=trainer.step)
        for step, scores in trainer.run():
            progress.update(bar, completed=step)
            if not scores:
                continue
            shown = "  ".join(f"{kind} {score:.1f}" for kind, score in scores.items())
            point = trainer.curve[-1]
            lesson = (
                ("cross entropy", point.cross_entropy) if point.alignment is None else ("alignment", point.alignment)
            )
            progress.console.print(f"step {step}: {lesson[0]} {lesson[1]:.3f}  {shown}")
    return trainer


def _ramp(step: int, span: tuple[int, int]) -> float:
    """0 before ``span``, 1 behind it, linear between."""
    first, last = span
    return min(1.0, max(0.0, (step - first) / (last - first)))


def saved_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's run; those from before there were families are Qwen2-VL's, from nothing."""
    before = TrainSettings()
    old = {"family": before.family, "donor": None, "align_steps": 0, "align_rate": before.align_rate}
    return old | checkpoint["settings"]


def _plain(settings: TrainSettings) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
