"""Benchmark files in VLMEvalKit's TSV schema: find, read, check, thin out and hash them. No vlmeval here.

Shipped files stand in ``data/DATASET/DATASET.tsv`` beside this module, their images in the same folder. A user's own
files are ``DIR/DATASET.tsv`` or ``DIR/DATASET/DATASET.tsv`` with ``--data-dir DIR``; VLMEvalKit's official files, with
base64 images inside, work as they are.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from mqbench.harness.datasets.catalog import OPTION_COLUMNS, Kind, Task
from mqbench.harness.datasets.images import MAX_REFERENCE_LENGTH, image_error, image_sha256, unpack_images
from mqbench.harness.errors import DatasetError

SHIPPED_DATA = Path(__file__).parent / "data"

_PROMPT_COLUMNS = ("question", "hint", *OPTION_COLUMNS)
"""Besides the images, all that a model sees of a row."""

_HAS_BASE64 = "<base64>"
"""Stands for a long ``image`` field while rows are chosen: the field itself is read when its image is wanted."""

_LABEL_COLUMNS = ("answer", "category", "l2-category", "split")
_ALWAYS_REQUIRED = ("index", "question", "answer")


@dataclass(frozen=True, eq=False)
class TaskData:
    """Checked rows of one benchmark.

    Attributes:
        task: The benchmark.
        source: File that the rows come from.
        frame: The rows in file order, every value a string exactly as in the file ('007' stays, 'None' stays, an
            empty field is ''); column ``images`` holds a tuple of absolute image paths, empty for text-only rows.
    """

    task: Task
    source: Path
    frame: pd.DataFrame

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def indices(self) -> tuple[str, ...]:
        """The file's own row names, unique."""
        return tuple(self.frame["index"])

    @cached_property
    def prompt_hashes(self) -> tuple[str, ...]:
        """Per row, SHA-256 of what a model sees: image bytes, question, hint, options."""
        return tuple(_row_hash(row, _PROMPT_COLUMNS) for row in self.rows())

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over all rows in order: image bytes, prompt columns, answers and categories."""
        digest = hashlib.sha256(self.task.dataset.encode())
        for row in self.rows():
            digest.update(_row_hash(row, _PROMPT_COLUMNS + _LABEL_COLUMNS).encode())
        return digest.hexdigest()

    def rows(self) -> Iterator[dict[str, object]]:
        """Every row as a mapping of column to value."""
        return iter(self.frame.to_dict("records"))

    def take(self, positions: Sequence[int]) -> TaskData:
        """The rows at ``positions``, in that order."""
        return TaskData(self.task, self.source, self.frame.iloc[list(positions)].reset_index(drop=True))


def find_tsv(task: Task, data_dir: Path | None = None) -> Path:
    """The file of a benchmark: the user's when ``data_dir`` is given, else the shipped one.

    Raises:
        DatasetError: it is not there.
    """
    folder = SHIPPED_DATA if data_dir is None else data_dir
    candidates = tsv_candidates(task, folder)
    for path in candidates:
        if path.is_file():
            return path
    if data_dir is None:
        raise DatasetError(f"shipped file '{candidates[0]}' is missing; reinstall mqbench or give --data-dir")
    raise DatasetError(f"no file for task '{task.name}': put VLMEvalKit's {task.dataset}.tsv into '{data_dir}'")


def tsv_candidates(task: Task, folder: Path) -> tuple[Path, ...]:
    """Where a benchmark's file may stand in a folder."""
    name = f"{task.dataset}.tsv"
    return folder / task.dataset / name, folder / name


def load_task(task: Task, data_dir: Path | None = None, limit: int | None = None) -> TaskData:
    """Reads and checks the rows to evaluate.

    Args:
        task: Which benchmark.
        data_dir: Folder of the user's files; None for the shipped ones.
        limit: Rows at most, chosen as ``limited_positions`` says; None for all.

    Raises:
        DatasetError: the file is missing, unreadable or empty, lacks columns, repeats an index, or holds a row or an
            image that cannot be used; the message names file and row.
        OutputError: unpacked images cannot be written to the cache.
    """
    path = find_tsv(task, data_dir)
    frame = read_rows(task, path)
    if frame.empty:
        raise DatasetError(f"{path}: the file has no rows; get it again or leave '{task.name}' out of --tasks")
    if task.kind is Kind.YES_NO_PAIRS:
        _check_pairs(path, frame)
    return with_images(task, path, frame, limited_positions(task, frame, limit))


def read_rows(task: Task, path: Path) -> pd.DataFrame:
    """Reads every row of a file but for its images, and checks all that can be checked without them.

    Returns:
        All columns as strings. Column ``image``, if there is one, keeps only references to other rows (at most 64
        characters); longer fields become a marker.

    Raises:
        DatasetError: see ``load_task``.
    """
    frame = _read_strings(path)
    _check_columns(task, path, frame)
    _check_index(path, frame)
    for row in frame.to_dict("records"):
        if problem := _row_problem(task, row):
            raise DatasetError(f"{path}, {_row_name(frame, row['index'])}: {problem}")
    return frame


def with_images(task: Task, path: Path, frame: pd.DataFrame, positions: Sequence[int]) -> TaskData:
    """The rows at ``positions`` with their images found, unpacked where needed, and checked.

    Raises:
        DatasetError: an image is missing or broken.
        OutputError: unpacked images cannot be written to the cache.
    """
    chosen = frame.iloc[list(positions)]
    images = _inline_images(path, frame, chosen) if "image" in frame else _image_files(path, frame, chosen)
    columns = [name for name in frame.columns if name != "image"]
    return TaskData(task, path, chosen[columns].assign(images=images).reset_index(drop=True))


def limited_positions(task: Task, frame: pd.DataFrame, limit: int | None) -> list[int]:
    """Row positions to evaluate, ascending: the same for the same file and limit.

    Categories take turns, each in file order, so that a small limit still spans them; benchmarks without categories
    give their first rows. MME's rows come as whole image pairs: as many as fit into the limit, at least one.

    Raises:
        DatasetError: the limit is below 1.
    """
    if limit is None or limit >= len(frame):
        return list(range(len(frame)))
    if limit < 1:
        raise DatasetError(f"--limit must be at least 1, got {limit}")
    units: dict[object, list[int]] = {}
    categories = frame["category"] if "category" in frame else pd.Series([""] * len(frame))
    keys = _pair_keys(frame) if task.kind is Kind.YES_NO_PAIRS else list(range(len(frame)))
    for position, key in enumerate(keys):
        units.setdefault(key, []).append(position)
    by_category: dict[str, list[list[int]]] = {}
    for unit in units.values():
        by_category.setdefault(categories.iloc[unit[0]], []).append(unit)
    return _take_turns([by_category[name] for name in sorted(by_category)], limit)


def reference_answer(task: Task, row: dict[str, object]) -> str:
    """The answer that a model is meant to give to a row: the most frequent of several (the first of equals)."""
    answer = str(row["answer"])
    if not task.has_answer_list:
        return answer
    return Counter(str(item) for item in ast.literal_eval(answer)).most_common(1)[0][0]


def _take_turns(queues: Sequence[Sequence[list[int]]], limit: int) -> list[int]:
    chosen: list[int] = []
    for turn in range(max(len(queue) for queue in queues)):
        for queue in queues:
            if turn < len(queue) and (not chosen or len(chosen) + len(queue[turn]) <= limit):
                chosen.extend(queue[turn])
    return sorted(chosen)


def _read_strings(path: Path) -> pd.DataFrame:
    try:
        columns = list(pd.read_csv(path, sep="\t", nrows=0).columns)
        types = {name: str for name in columns if name != "image"}
        shorten: dict[str, Callable[[str], str]] = {
            "image": lambda text: text if len(text) <= MAX_REFERENCE_LENGTH else _HAS_BASE64
        }
        converters = shorten if "image" in columns else None
        return pd.read_csv(
            path, sep="\t", dtype=types, converters=converters, keep_default_na=False, na_filter=False
        ).astype(object)
    except pd.errors.EmptyDataError:
        raise DatasetError(f"{path}: the file is empty; get it again") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path}: not a readable TSV file ({reason}); get it again") from None


def _check_columns(task: Task, path: Path, frame: pd.DataFrame) -> None:
    missing = [name for name in (*_ALWAYS_REQUIRED, *task.columns) if name not in frame]
    if "image" not in frame and "image_path" not in frame:
        missing.append("image (base64) or image_path")
    if missing:
        named = ", ".join(missing)
        raise DatasetError(f"{path}: lacks column {named}; {task.title} needs VLMEvalKit's {task.dataset} schema")


def _check_index(path: Path, frame: pd.DataFrame) -> None:
    repeated = frame["index"][frame["index"].duplicated()]
    if len(repeated):
        first = repeated.iloc[0]
        rows = [str(position + 2) for position in range(len(frame)) if frame["index"].iloc[position] == first]
        raise DatasetError(f"{path}: index '{first}' stands in rows {', '.join(rows)}; give every row its own index")


def _check_pairs(path: Path, frame: pd.DataFrame) -> None:
    for (category, image), count in Counter(_pair_keys(frame)).items():
        if count != 2:
            raise DatasetError(
                f"{path}: image '{image}' of category '{category}' has {count} question(s); "
                "MME needs exactly two for every image"
            )


def _pair_keys(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(frame["category"], frame["image_path"], strict=True))


def _row_problem(task: Task, row: dict[str, str]) -> str | None:
    """What makes a row useless, with what to do; None when nothing does."""
    if not row["question"].strip():
        return "'question' is empty; fill it in or remove the row"
    if task.categories and row["category"] not in task.categories:
        return f"category '{row['category']}' is none of {task.title}'s; use VLMEvalKit's names"
    if task.has_answer_list:
        return _answer_list_problem(task, row["answer"])
    if task.kind is Kind.YES_NO_PAIRS and row["answer"] not in ("Yes", "No"):
        return f"answer '{row['answer']}' is neither 'Yes' nor 'No'; correct it"
    if task.kind is Kind.MULTIPLE_CHOICE:
        letter = row["answer"]
        if letter not in OPTION_COLUMNS or not row.get(letter):
            return f"answer '{letter}' is not the letter of an option of this row; correct it"
    return None


def _answer_list_problem(task: Task, text: str) -> str | None:
    # VLMEvalKit passes this field to eval(): only a plain list of strings may get that far.
    try:
        answers = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        answers = None
    if not isinstance(answers, list) or not all(isinstance(item, str) for item in answers):
        return "'answer' is not a list of strings such as \"['a', 'b']\"; correct it"
    if len(answers) < task.min_answers:
        return f"'answer' lists {len(answers)}, {task.title} needs at least {task.min_answers}; correct it"
    return None


def _row_name(frame: pd.DataFrame, index: str) -> str:
    """Line number as an editor shows it when no field spans lines, and the row's own name."""
    position = list(frame["index"]).index(index)
    return f"row {position + 2} (index {index})"


def _image_files(path: Path, frame: pd.DataFrame, chosen: pd.DataFrame) -> list[tuple[str, ...]]:
    found = []
    for index, text in zip(chosen["index"], chosen["image_path"], strict=True):
        names = _path_list(text)
        if names is None:
            raise DatasetError(
                f"{path}, {_row_name(frame, index)}: 'image_path' is no path and no list of paths; correct it"
            )
        files = tuple((path.parent / name).absolute() for name in names)
        for file in files:
            if problem := image_error(file):
                raise DatasetError(f"{path}, {_row_name(frame, index)}: {problem}; restore it or remove the row")
        found.append(tuple(str(file) for file in files))
    return found


def _path_list(text: str) -> list[str] | None:
    """One path, or a list of paths in Python's spelling; ``[]`` is a text-only row. None when it is neither."""
    if not text.startswith("["):
        return [text] if text else None
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) and name for name in names) else None


def _inline_images(path: Path, frame: pd.DataFrame, chosen: pd.DataFrame) -> list[tuple[str, ...]]:
    row_of = {index: row for row, index in enumerate(frame["index"])}
    references = dict(zip(frame["index"], frame["image"], strict=True))
    owners = []
    for index in chosen["index"]:
        owner = index if references[index] == _HAS_BASE64 else references[index]
        if references.get(owner) != _HAS_BASE64:
            raise DatasetError(
                f"{path}, {_row_name(frame, index)}: 'image' is neither base64 nor the index of a row with base64; "
                "get the file again, or use column image_path ('[]' for text-only rows) in place of image"
            )
        owners.append(owner)
    files = unpack_images(path, {row_of[owner]: owner for owner in dict.fromkeys(owners)})
    return [(str(files[owner].absolute()),) for owner in owners]


def _row_hash(row: dict[str, object], columns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    images = row["images"]
    assert isinstance(images, tuple)
    for path in images:
        digest.update(f"image:{image_sha256(Path(path))}\n".encode())
    for name in columns:
        if text := str(row.get(name, "")):
            data = text.encode()
            digest.update(f"{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()
