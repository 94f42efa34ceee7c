"""What makes the stand-in hard: activation ranges by modality, Eq. 9 margins, and scores with each ingredient left out.

Scores here are greedy exact match on the shipped benchmark items, found by one forward pass over the right answer
(every answer token is the argmax behind the right ones before it). They differ from VLMEvalKit's metrics, which
``mqbench eval`` uses, where those give points for partly right answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mqbench.harness import discover
from mqbench.harness.models.standin.benchmarks import BENCHMARKS, split_examples
from mqbench.harness.models.standin.build import load_run, measured_batches
from mqbench.harness.models.standin.family import Feed
from mqbench.harness.models.standin.harden import Hardness
from mqbench.harness.models.standin.objective import answered_exactly
from mqbench.harness.models.standin.qwen2_vl import Qwen2VLFeed
from mqbench.harness.models.standin.tasks import Example
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Batch, QuantReport

BATCH_SIZE = 32
CALIBRATION_PER_BENCHMARK = 52


@dataclass(frozen=True)
class Setting:
    """One quantization to score."""

    label: str
    method: str
    vision: str
    text: str
    options: Mapping[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("RTN", "rtn", "w4a8", "w4a8"),
    Setting("SmoothQuant", "smoothquant", "w4a8", "w4a8"),
    Setting("QuaRot", "quarot", "w4a8", "w4a8"),
    Setting("QuaRot + MSQ", "mquant", "w4a8", "w4a8", {"rms": False}),
    Setting("QuaRot + RMS", "mquant", "w4a8", "w4a8", {"msq": False}),
    Setting("MQuant", "mquant", "w4a8", "w4a8"),
    Setting("MQuant, per-token dynamic", "mquant", "w4a8", "w4a8", {"activations": "token"}),
    Setting("W4 GPTQ, float activations", "mquant", "w4a16", "w4a16"),
)
VARIANTS: Mapping[str, dict[str, Any]] = {
    "as shipped": {},
    "no outlier channels": {"outlier_gain": (1.0, 1.0)},
    "no modality gap": {"modality_gap": 0.0},
    "neither": {"outlier_gain": (1.0, 1.0), "modality_gap": 0.0},
}


@dataclass(frozen=True)
class Scored:
    """Model inputs with the answers' labels (B, T), -100 outside them."""

    batch: Batch
    labels: Tensor


def scored_batches(examples: Iterable[Example], feed: Feed) -> list[Scored]:
    """Batches of examples with and of examples without an image, right-padded."""
    listed = list(examples)
    kinds = ([e for e in listed if e.image is not None], [e for e in listed if e.image is None])
    groups = [kind[start : start + BATCH_SIZE] for kind in kinds for start in range(0, len(kind), BATCH_SIZE)]
    made = [feed.collate(group) for group in groups]
    return [Scored(feed.model_inputs(batch), batch.labels) for batch in made]


def batches_of(examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast, model: Any = None) -> list[Scored]:
    """``scored_batches`` of ``standin-qwen2-vl``; ``model`` is not looked at."""
    return scored_batches(examples, Qwen2VLFeed(tokenizer))


@torch.no_grad()
def exact_match_percent(model: Any, scored: Sequence[Scored]) -> float:
    """Percent of rows whose whole answer is the greedy one."""
    hits = [hit for item in scored for hit in answered_exactly(model(**item.batch).logits, item.labels)]
    return 100 * sum(hits) / len(hits)


class Study:
    """A finished training run, ready to be hardened and quantized again and again."""

    def __init__(self, run: Path, hardness: Hardness | None = None) -> None:
        trained = load_run(run)
        self.run = run
        self.hardness = hardness or Hardness()
        self.plain, self.tokenizer = trained.model.eval().requires_grad_(False), trained.tokenizer
        self.training, self.curve = trained.settings, trained.curve
        self.layout, self.feed, self.name = trained.layout, trained.feed(), trained.standin.model_name
        self.measured = measured_batches(self.feed)
        splits = {entry.name: split_examples(entry) for entry in BENCHMARKS}
        self.benchmarks = {name: self._batches(made[""]) for name, made in splits.items()}
        drawn = [row for made in splits.values() for row in made["calibration"][:CALIBRATION_PER_BENCHMARK]]
        self.calibration = [item.batch for item in self._batches(drawn)]

    def _batches(self, examples: Iterable[Example]) -> list[Scored]:
        return scored_batches(examples, self.feed)

    def hardened(self, **changes: Any) -> Any:
        """A fresh model with the study's hardness, some ingredients changed."""
        trained = load_run(self.run)
        trained.harden(replace(self.hardness, **changes), self.measured)
        return trained.model.eval().requires_grad_(False)

    def quantized(self, model: Any, setting: Setting) -> tuple[Any, QuantReport]:
        """``model``, quantized in place."""
        recipe = Recipe(setting.method, setting.vision, setting.text, 0, setting.options)
        return model, discover.find_method(setting.method).quantize(model, self.layout, recipe, self.calibration)

    def score(self, model: Any) -> float:
        """Exact match in percent, averaged over the benchmarks."""
        scores = [exact_match_percent(model, items) for items in self.benchmarks.values()]
        return sum(scores) / len(scores)
