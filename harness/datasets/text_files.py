"""Files of WikiText-2: find them in a folder and read their rows, whatever form they have.

A row is a line of the raw file with its newline, and a blank line (a space and a newline in the raw file) is the empty
string. That is how Hugging Face made its parquet files, column ``text``, from the raw ones; read by the same rule, both
forms give the same rows, and so the same text, tokens and hash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mqbench.harness.datasets.files import SHIPPED_DATA
from mqbench.harness.errors import DatasetError

SHIPPED_FOLDER = SHIPPED_DATA / "WikiText-2"
FOLDERS = ("WikiText-2", "wikitext-2-raw-v1", "wikitext-2-raw", "wikitext", "wikitext/wikitext-2-raw-v1", ".")
"""Where a user's data folder may hold the files; each may have a folder ``data`` with parquet files."""

TEXT_NAMES = ("wiki.{}.raw", "wiki.{}.txt", "wiki.{}.raw.txt", "wiki.{}.tokens-raw", "{}.raw", "{}.txt")
PARQUET_SPLITS: Mapping[str, str] = MappingProxyType({"train": "train", "valid": "validation", "test": "test"})
"""Our name of a split -> Hugging Face's, which its files ``SPLIT-00000-of-00001.parquet`` carry."""

LFS_MARK = "version https://git-lfs"


def find_files(split: str, data_dir: Path | None = None) -> tuple[Path, ...]:
    """The files of a split: one text file, or all its parquet files in order. In a folder that has both, text wins.

    Args:
        split: ``train``, ``valid`` or ``test``.
        data_dir: The user's data folder; None for the shipped corpus.

    Raises:
        DatasetError: there is none, or one of several parquet files is missing.
    """
    folders = (SHIPPED_FOLDER,) if data_dir is None else tuple(data_dir / name for name in FOLDERS)
    for folder in folders:
        for name in TEXT_NAMES:
            if (path := folder / name.format(split)).is_file():
                return (path,)
        for place in (folder, folder / "data"):
            if paths := _parquet_files(place, split):
                return paths
    raise DatasetError(_how_to_get(split, data_dir, folders))


def read_rows(path: Path) -> list[str]:
    """Rows of a raw or a parquet file.

    Raises:
        DatasetError: it cannot be read, is damaged, or holds no text.
    """
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)
    if not any(rows):
        raise DatasetError(f"{path}: the file holds no text; get it again")
    if all(rows):
        raise DatasetError(
            f"{path}: no blank line, though WikiText-2 has thousands; its perplexity would be another: "
            "get the file again, as published"
        )
    return rows


def _read_lines(path: Path) -> list[str]:
    """Lines end at newlines alone; ``str.splitlines`` would also split at other characters."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = [row if row.strip() else "" for row in file]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text ({error}); get it again") from None
    if rows and rows[0].startswith(LFS_MARK):
        raise DatasetError(f"{path}: a Git LFS pointer, not the text; get the file itself")
    if any("\0" in row for row in rows):
        raise DatasetError(f"{path}: damaged, it holds NUL characters; get it again")
    return rows


def _read_parquet(path: Path) -> list[str]:
    import pyarrow
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path, columns=["text"])["text"].to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path}: no readable parquet file with a column 'text' ({reason}); get it again") from None
    if not all(isinstance(row, str) for row in rows):
        raise DatasetError(f"{path}: column 'text' holds values that are no text; get it again")
    return rows


def _parquet_files(folder: Path, split: str) -> tuple[Path, ...]:
    """All parts ``SPLIT-iiiii-of-nnnnn.parquet`` of a split (older ones end in a hash), in order."""
    if not folder.is_dir():
        return ()
    pattern = re.compile(rf"{PARQUET_SPLITS[split]}-(\d+)-of-(\d+)(-[0-9a-f]+)?\.parquet")
    matches = {path: match for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))}
    parts = [int(match[1]) for match in matches.values()]
    if any(parts != list(range(int(match[2]))) for match in matches.values()):
        raise DatasetError(f"{next(iter(matches))}: parts of this split are missing or double; get each of them once")
    return tuple(matches)


def _how_to_get(split: str, data_dir: Path | None, folders: tuple[Path, ...]) -> str:
    if data_dir is None:
        return f"the shipped '{SHIPPED_FOLDER}' lacks wiki.{split}.raw; reinstall mqbench or give --data-dir"
    advice = f"put wiki.{split}.raw, or Hugging Face's {PARQUET_SPLITS[split]}-*.parquet, into '{folders[0]}'"
    if any((folder / f"wiki.{split}.tokens").is_file() for folder in folders):
        return f"'{data_dir}' has only wiki.{split}.tokens, in which rare words are <unk>; {advice}"
    return f"no WikiText-2 ({split}) in '{data_dir}'; {advice}"
