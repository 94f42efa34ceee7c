"""Calibration sets: rows disjoint from what is evaluated, drawn by seed, known by their content.

One set serves a whole run, so that every benchmark sees the same quantized model. Split ``mixed`` (the default) draws
evenly from the calibration files of all benchmarks; a benchmark's name as split draws from its file alone. Files stand
in ``calibration/DATASET/DATASET.tsv`` or ``calibration/DATASET.tsv``, in the schema of the benchmark files: in the
user's ``--data-dir`` when that holds a folder ``calibration``, else among the shipped data.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path

import pandas as pd

from mqbench.harness.datasets.catalog import TASKS, Task
from mqbench.harness.datasets.files import SHIPPED_DATA, TaskData, read_rows, tsv_candidates, with_images
from mqbench.harness.errors import CalibrationError, UnknownNameError

FOLDER = "calibration"
MIXED = "mixed"
DEFAULT_NUM_SAMPLES = 256


@dataclass(frozen=True)
class Calibration:
    """The samples that static scales and GPTQ see.

    Attributes:
        dataset: ``shipped``, or the user's calibration folder.
        split: ``mixed`` or the name of the one benchmark drawn from.
        num_samples: How many samples.
        seed: Seed of the draw; a smaller ``num_samples`` of the same seed gives a subset.
        parts: The samples, grouped by benchmark.
    """

    dataset: str
    split: str
    num_samples: int
    seed: int
    parts: tuple[TaskData, ...] = field(repr=False, compare=False)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the samples' content: images, prompts, answers."""
        return hashlib.sha256("\n".join(part.content_hash for part in self.parts).encode()).hexdigest()

    def refuse_overlap(self, data: TaskData) -> None:
        """Makes sure that nothing evaluated was calibrated on.

        Compared by what a model sees (image bytes, question, hint, options), across all benchmarks, whatever files or
        rows are called.

        Raises:
            CalibrationError: a sample is among the evaluated rows.
        """
        seen = {
            sample: f"{part.source}, index {index}"
            for part in self.parts
            for sample, index in zip(part.prompt_hashes, part.indices, strict=True)
        }
        shared = [(name, seen[row]) for name, row in zip(data.indices, data.prompt_hashes, strict=True) if row in seen]
        if shared:
            evaluated, calibrated = shared[0]
            raise CalibrationError(
                f"{len(shared)} evaluated row(s) of {data.source} are calibration samples too (index {evaluated} = "
                f"{calibrated}); calibrate on other data: --calib-split, or another {FOLDER} folder in --data-dir"
            )


def load_calibration(
    split: str = MIXED,
    num_samples: int = DEFAULT_NUM_SAMPLES,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Calibration:
    """Draws a calibration set.

    Args:
        split: ``mixed`` or a benchmark's name.
        num_samples: Samples in all.
        seed: Decides which rows are drawn.
        data_dir: The user's data folder; None for the shipped data.

    Raises:
        UnknownNameError: no such split.
        CalibrationError: there is no file, or fewer rows than samples asked for.
        DatasetError: a file or image is unusable.
    """
    tasks = _split_tasks(split)
    if num_samples < 1:
        raise CalibrationError(f"--calib-samples must be at least 1, got {num_samples}")
    folder = calibration_folder(data_dir)
    pools = {task: _read_pool(task, folder) for task in tasks}
    found = {task: pool for task, pool in pools.items() if pool is not None}
    if not found:
        raise CalibrationError(f"no calibration file for split '{split}': put {tasks[0].dataset}.tsv into '{folder}'")
    drawn = _draw({task: len(frame) for task, (_, frame) in found.items()}, num_samples, seed, split)
    parts = tuple(with_images(task, *found[task], sorted(rows)) for task, rows in drawn.items() if rows)
    dataset = "shipped" if folder.parent == SHIPPED_DATA else str(folder)
    return Calibration(dataset, split, num_samples, seed, parts)


def calibration_folder(data_dir: Path | None) -> Path:
    """The user's calibration folder when there is one, else the shipped one."""
    if data_dir is not None and (data_dir / FOLDER).is_dir():
        return data_dir / FOLDER
    return SHIPPED_DATA / FOLDER


def _split_tasks(split: str) -> tuple[Task, ...]:
    if split == MIXED:
        return tuple(TASKS.values())
    if split not in TASKS:
        raise UnknownNameError("calibration split", split, (MIXED, *TASKS))
    return (TASKS[split],)


def _read_pool(task: Task, folder: Path) -> tuple[Path, pd.DataFrame] | None:
    for path in tsv_candidates(task, folder):
        if path.is_file():
            frame = read_rows(task, path)
            if frame.empty:
                raise CalibrationError(f"{path}: the calibration file has no rows; get it again or use --calib-split")
            return path, frame
    return None


def _draw(sizes: Mapping[Task, int], num_samples: int, seed: int, split: str) -> dict[Task, list[int]]:
    """Row positions per benchmark: each pool is shuffled by the seed, then the pools take turns."""
    if sum(sizes.values()) < num_samples:
        raise CalibrationError(
            f"calibration split '{split}' has {sum(sizes.values())} rows, {num_samples} are asked for; "
            f"use --calib-samples {sum(sizes.values())} or less"
        )
    queues = []
    for task, size in sizes.items():
        order = list(range(size))
        random.Random(f"{seed}/{task.dataset}").shuffle(order)
        queues.append([(task, row) for row in order])
    turns = (pair for turn in zip_longest(*queues) for pair in turn if pair is not None)
    drawn: dict[Task, list[int]] = {task: [] for task in sizes}
    for task, row in islice(turns, num_samples):
        drawn[task].append(row)
    return drawn
