"""Where a record was made: versions and hardware, but no host names, user names or paths."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
"""The checkout's root, or the folder of the installed package."""

PACKAGES = ("mqbench", "torch", "torchvision", "transformers", "ms-vlmeval", "accelerate", "numpy", "pandas")
CPU_INFO = Path("/proc/cpuinfo")
DRIVER_INFO = Path("/proc/driver/nvidia/version")
UNKNOWN = "unknown"


def describe(attention: str | None = None) -> dict[str, Any]:
    """The environment of this process as plain JSON data.

    Args:
        attention: Attention backend of the model that ran (it changes scores), when one ran.
    """
    return {
        "git": git_state(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "gpu": gpu_names(),
        "driver": driver_version(),
        "threads": thread_count(),
        "attention": attention,
    }


@cache
def git_state(root: Path = ROOT) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None when ``root`` is not the top of a checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on; those not installed are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def cpu_name() -> str:
    if CPU_INFO.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or UNKNOWN


def gpu_names() -> list[str]:
    """Names of the visible GPUs; empty when torch was not imported, since asking would take seconds."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


@cache
def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None without one."""
    if not DRIVER_INFO.is_file():
        return None
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", DRIVER_INFO.read_text(errors="replace"))
    return found.group(0) if found else UNKNOWN


def thread_count() -> int | None:
    """Threads that torch computes with, or None when torch was not imported."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def device_kind(device: str) -> str:
    """What a result depends on: ``cpu``, or the GPU's name. ``cuda`` and ``cuda:1`` of one machine are the same kind.

    Raises:
        RuntimeError: torch cannot use the device.
    """
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(torch.device(device))


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, or None when git is missing or refuses."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
