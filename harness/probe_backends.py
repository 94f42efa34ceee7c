"""Probe ``backend_agreement``: does a model predict the same tokens in integers as under the simulated backend?

Both backends round every activation at the same places; what they differ by are the last bits of floating-point sums. A
value that comes to lie on the other side of a rounding boundary becomes another level, and a deep model carries that
on. How much of a difference that explains is measured beside it: the simulated backend against itself, its products
summed in float64. In a float64 model hardly a value is that close to a boundary, and the backends must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mqbench.harness.errors import RequestError
from mqbench.harness.evaluated import EvaluatedBatch
from mqbench.harness.finite import finite_outputs
from mqbench.harness.quant.integer import quant_linears, simulated_weights
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.tasks import TaskResult

if TYPE_CHECKING:
    from mqbench.harness.probes import ProbeContext


@dataclass
class _Agreement:
    """Counts of one comparison, over batches."""

    tokens: int = 0
    same_tokens: int = 0
    answer_tokens: int = 0
    same_answer_tokens: int = 0
    max_logit_difference: float = 0.0
    answers: int = 0
    same_answers: int = 0

    def add_logits(self, one: Tensor, other: Tensor, predicts_answer: Tensor) -> None:
        """Logits (tokens, vocabulary) of both sides, and which of the tokens predict one of an answer, (tokens,)."""
        same = one.argmax(-1) == other.argmax(-1)
        self.tokens += len(same)
        self.same_tokens += int(same.sum())
        self.answer_tokens += int(predicts_answer.sum())
        self.same_answer_tokens += int(same[predicts_answer].sum())
        self.max_logit_difference = max(self.max_logit_difference, float((one - other).abs().max()))

    def add_answers(self, one: list[str], other: list[str]) -> None:
        self.answers += len(one)
        self.same_answers += sum(mine == theirs for mine, theirs in zip(one, other, strict=True))

    def metrics(self, prefix: str = "") -> dict[str, float]:
        return {
            f"{prefix}agreement_percent": 100 * self.same_tokens / self.tokens,
            f"{prefix}answer_tokens_percent": 100 * self.same_answer_tokens / self.answer_tokens,
            f"{prefix}max_logit_difference": self.max_logit_difference,
            f"{prefix}same_answers_percent": 100 * self.same_answers / self.answers,
        }


@dataclass
class _Comparison:
    """The integer backend, and the simulated one with other sums, each against the simulated one."""

    model: nn.Module
    integer: _Agreement = field(default_factory=_Agreement)
    other_sums: _Agreement = field(default_factory=_Agreement)

    def add(self, batch: EvaluatedBatch) -> None:
        logits, answers = self._predict(batch)
        with simulated_weights(self.model):
            expected_logits, expected_answers = self._predict(batch)
            with float64_sums(self.model):
                other_logits, other_answers = self._predict(batch)
        predicts_answer = batch.predicts_answer[batch.forced["attention_mask"].bool()]
        self.integer.add_logits(logits, expected_logits, predicts_answer)
        self.integer.add_answers(answers, expected_answers)
        self.other_sums.add_logits(other_logits, expected_logits, predicts_answer)
        self.other_sums.add_answers(other_answers, expected_answers)

    @torch.no_grad()
    def _predict(self, batch: EvaluatedBatch) -> tuple[Tensor, list[str]]:
        """Logits at every token that is no padding, (tokens, vocabulary), and the greedy answers."""
        logits = self.model(**batch.forced, use_cache=False).logits
        return logits[batch.forced["attention_mask"].bool()], batch.answers()


def backend_agreement(context: ProbeContext) -> TaskResult:
    """Compares the backends on evaluated prompts with their right answers, and on greedy answers.

    Returns:
        score: share of tokens (all but padding, prompts included) at which both backends predict the same next token,
        in percent. Metrics: ``agreement_percent`` (the score), ``answer_tokens_percent`` (of those tokens that predict
        one of the right answer or its end), ``max_logit_difference``, ``same_answers_percent`` (greedy answers equal to
        the last character), the same four with the prefix ``float64_sums_`` for the simulated backend against itself
        with its products summed in float64, and the numbers of ``tokens``, ``answer_tokens`` and ``answers``.

    Raises:
        RequestError: the model runs nothing in integers.
        NonFiniteError: NaN or Inf in a backend's logits.
    """
    model = context.loaded.model
    if not any(linear.integer is not None for linear in quant_linears(model).values()):
        raise RequestError("task 'backend_agreement' needs a model that runs in integers; add --backend integer")
    comparison = _Comparison(model)
    with finite_outputs(model, context.loaded.layout):
        for batch in context.evaluated():
            comparison.add(batch)
    integer, other_sums = comparison.integer, comparison.other_sums
    metrics = integer.metrics() | other_sums.metrics("float64_sums_")
    counts = {"tokens": integer.tokens, "answer_tokens": integer.answer_tokens, "answers": integer.answers}
    return TaskResult(metrics["agreement_percent"], metrics | {name: float(count) for name, count in counts.items()})


@contextmanager
def float64_sums(model: nn.Module) -> Iterator[None]:
    """While this is open, simulated linears sum their products in float64: the same function, other last bits."""
    handles = [linear.register_forward_hook(_corrected) for linear in quant_linears(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _corrected(linear: QuantLinear, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output without the error of its matrix product."""
    x, _ = linear.prepare_input(args[0])
    x = x if linear.input_quantizer is None else linear.input_quantizer(x)
    bias = None if linear.bias is None else linear.bias.double()
    exact = F.linear(x.double(), linear.weight.double(), bias)
    return (output.double() + (exact - F.linear(x, linear.weight, linear.bias))).to(output.dtype)
