"""The checkout that the tests run in: where it is, what git tracks in it, and its settings."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def mapped_folders() -> dict[str, Path]:
    """Import name -> folder of every package that setuptools maps (``mqbench.kernels`` -> ``kernels``)."""
    return {name: ROOT / folder for name, folder in pyproject()["tool"]["setuptools"]["package-dir"].items()}


def code_files() -> dict[str, Path]:
    """Module name -> file of every module of ours, as it is on disk (committed or not)."""
    found = {}
    for package, folder in mapped_folders().items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def tracked_files() -> list[Path]:
    """Every file that git tracks, symbolic links left out."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = (ROOT / name for name in listed.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]
