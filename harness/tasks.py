"""Everything a cell may measure: benchmarks, perplexity, probes of a model in memory, and figures of a blueprint.

Only names and facts stand here; what computes them is imported when a cell of that kind runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from mqbench.harness.datasets.catalog import TASKS, find_task
from mqbench.harness.errors import UnknownNameError
from mqbench.harness.record import Sample

ALL = "all"
PERPLEXITY = "wikitext2"


class TaskKind(StrEnum):
    """What runs a cell: VLMEvalKit, a loop over text windows, a look into the model, or no weights at all."""

    BENCHMARK = "benchmark"
    PERPLEXITY = "perplexity"
    PROBE = "probe"
    BLUEPRINT = "blueprint"


class Needs(StrEnum):
    """The models that a task fits."""

    MULTIMODAL = "multimodal"
    TEXT = "text"
    ANY = "any"


@dataclass(frozen=True)
class TaskInfo:
    """Facts of one task.

    Attributes:
        name: As users type it.
        title: Head of its column in tables.
        unit: What its score counts.
        kind: What runs it.
        needs: The models that it fits.
        higher_is_better: Direction of the score.
        uses_calibration: A probe that reads the calibration samples whatever the recipe.
        runs_on_float: Not only on quantized models.
        runs_on_quantized: Not only on the float model.
        uses_rows: A probe that reads what is evaluated: the rows of every benchmark, or the windows of text.
        compares_backends: A probe of the integer backend; all others look at float weights.
    """

    name: str
    title: str
    unit: str
    kind: TaskKind
    needs: Needs
    higher_is_better: bool = True
    uses_calibration: bool = False
    runs_on_float: bool = True
    runs_on_quantized: bool = True
    uses_rows: bool = False
    compares_backends: bool = False

    def fits(self, is_float: bool) -> bool:
        """Whether it runs on the float model, or on a quantized one."""
        return self.runs_on_float if is_float else self.runs_on_quantized


@dataclass(frozen=True)
class TaskResult:
    """What a cell measured.

    Attributes:
        score: The headline.
        metrics: Every figure by name.
        samples: One entry per evaluated row.
        arrays: Series for figures, by name.
    """

    score: float
    metrics: Mapping[str, float]
    samples: tuple[Sample, ...] = ()
    arrays: Mapping[str, Sequence[float]] = field(default_factory=dict)


def _benchmarks() -> Iterable[TaskInfo]:
    for task in TASKS.values():
        yield TaskInfo(task.name, task.title, task.unit, TaskKind.BENCHMARK, Needs.MULTIMODAL)


OTHERS = (
    TaskInfo(PERPLEXITY, "WikiText-2", "perplexity", TaskKind.PERPLEXITY, Needs.TEXT, higher_is_better=False),
    TaskInfo(
        "activation_ranges",
        "activation ranges",
        "visual over text peak, median over LLM blocks",
        TaskKind.PROBE,
        Needs.MULTIMODAL,
        uses_calibration=True,
    ),
    TaskInfo("eq9", "Eq. 9", "% of blocks that satisfy Eq. 9", TaskKind.PROBE, Needs.ANY, runs_on_float=False),
    TaskInfo(
        "weight_distribution",
        "weights",
        "median peak ratio without and with RMS",
        TaskKind.PROBE,
        Needs.ANY,
        runs_on_quantized=False,
    ),
    TaskInfo(
        "backend_agreement",
        "same tokens",
        "% of tokens predicted alike by both backends",
        TaskKind.PROBE,
        Needs.ANY,
        runs_on_float=False,
        uses_rows=True,
        compares_backends=True,
    ),
    TaskInfo("model_size", "model size", "parameters, 10^9", TaskKind.BLUEPRINT, Needs.ANY),
    TaskInfo("visual_tokens", "visual tokens", "tokens", TaskKind.BLUEPRINT, Needs.ANY),
)

TASK_INFOS: Mapping[str, TaskInfo] = MappingProxyType({info.name: info for info in (*_benchmarks(), *OTHERS)})
"""Every task by name; benchmarks first, in the order of the paper's columns."""


def task_info(name: str) -> TaskInfo:
    """Looks a task up by our name or by VLMEvalKit's, in any case.

    Raises:
        UnknownNameError: there is none.
    """
    wanted = name.strip().lower()
    if wanted in TASK_INFOS:
        return TASK_INFOS[wanted]
    try:
        return TASK_INFOS[find_task(name).name]
    except UnknownNameError:
        raise UnknownNameError("task", name, TASK_INFOS) from None


def find_infos(names: Iterable[str]) -> tuple[TaskInfo, ...]:
    """Looks several up, each once, in the catalog's order; ``all`` stands for every benchmark.

    Raises:
        UnknownNameError: a name is not in the catalog.
    """
    wanted: set[str] = set()
    for name in names:
        wanted |= set(TASKS) if name.strip().lower() == ALL else {task_info(name).name}
    return tuple(info for info in TASK_INFOS.values() if info.name in wanted)
