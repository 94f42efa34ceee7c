"""What measuring a point comes to, and how errors become notes that a record keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

OK, OUT_OF_MEMORY, UNAVAILABLE, FAILED = "ok", "out of memory", "unavailable", "failed"
"""How a system's note begins."""

MEMORY_SIGNS = ("out of memory", "alloc_failed", "can't allocate memory", "cannot allocate memory")
"""In messages of torch, cuBLAS, CUDA and the CPU's allocator; lower case."""

MAX_NOTE_CHARACTERS = 300
TIMES = "_ms"


@dataclass(frozen=True)
class Outcome:
    """One point.

    Attributes:
        metrics: Figures of the point, and of systems as ``<system>.<figure>``.
        arrays: Raw samples in the order taken, as ``<system>.<figure>``.
        notes: ``ok`` or why not, for every system.
        scores: The headline figure of each system that ran, in the order of the point.
        environment: What the record says of the device besides.
    """

    metrics: Mapping[str, float]
    arrays: Mapping[str, tuple[float, ...]]
    notes: Mapping[str, str]
    scores: Mapping[str, float]
    environment: Mapping[str, object] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why nothing ran; empty when something did. Running out of memory comes first when nothing went wrong."""
        if self.scores:
            return ""
        failed, memory, unavailable = (self._systems(kind) for kind in (FAILED, OUT_OF_MEMORY, UNAVAILABLE))
        if failed:
            return "; ".join(f"{', '.join(names)} {note}" for note, names in failed.items())
        if memory:
            return f"{OUT_OF_MEMORY}: {', '.join(name for names in memory.values() for name in names)}"
        return "no system can run here; " + "; ".join(f"{', '.join(n)} {note}" for note, n in unavailable.items())

    def _systems(self, kind: str) -> dict[str, list[str]]:
        """Systems by note, of the notes of one kind."""
        found: dict[str, list[str]] = {}
        for name, note in self.notes.items():
            if note.startswith(kind):
                found.setdefault(note, []).append(name)
        return found


def is_out_of_memory(error: BaseException | None) -> bool:
    """Memory of the device or of the host; also when another error came of it, as from a CUDA graph cut short."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in MEMORY_SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def note_of(error: BaseException) -> str:
    """One line for a record."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"{OUT_OF_MEMORY}: {text}"[:MAX_NOTE_CHARACTERS]
    return f"{FAILED}: {type(error).__name__}: {text}"[:MAX_NOTE_CHARACTERS]


def summary(system: str, samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median and, from two samples on, interquartile range of every figure: ``x_ms`` has ``x_iqr_ms``."""
    found = {}
    for name, values in samples.items():
        if not values:
            continue
        found[f"{system}.{name}"] = median(values)
        if name.endswith(TIMES) and len(values) > 1:
            low, _, high = quantiles(values, n=4, method="inclusive")
            found[f"{system}.{name.removesuffix(TIMES)}_iqr_ms"] = high - low
    return found


def ratio(baseline: Sequence[float], own: Sequence[float]) -> float | None:
    """Median over rounds of the baseline's time over the own one of the same round; None without rounds."""
    found = [base / time for base, time in zip(baseline, own, strict=False) if time > 0]
    return median(found) if found else None


def split_group(group: Sequence[str]) -> list[tuple[str, ...]]:
    """Smaller groups of systems when one does not fit in memory: halves, each with the baseline, at last single ones.

    Raises:
        ValueError: a single system cannot be split.
    """
    if len(group) < 2:
        raise ValueError(f"a group of {len(group)} cannot be split")
    first, *others = group
    if len(others) == 1:
        return [(first,), (others[0],)]
    middle = (len(others) + 1) // 2
    return [(first, *others[:middle]), (first, *others[middle:])]


def merged(parts: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, tuple[float, ...]]:
    """Samples of one system from several groups, one behind the other."""
    found: dict[str, tuple[float, ...]] = {}
    for part in parts:
        for name, values in part.items():
            found[name] = (*found.get(name, ()), *values)
    return found
