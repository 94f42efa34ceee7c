"""What timings depend on besides the code: the GPU, its clocks and power limit, and the packages at work."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any

PACKAGES = ("triton", "fast-hadamard-transform", "torchao", "gemlite")
QUERY: Mapping[str, str] = MappingProxyType(
    {
        "power_limit_w": "power.limit",
        "power_draw_w": "power.draw",
        "sm_clock_mhz": "clocks.sm",
        "max_sm_clock_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.mem",
        "max_memory_clock_mhz": "clocks.max.mem",
        "temperature_c": "temperature.gpu",
    }
)
"""What nvidia-smi is asked for, by our name."""

QUERY_TIMEOUT_S = 10.0


def describe_device(device: str) -> dict[str, Any]:
    """Hardware and software, and the GPU's state at this moment, as plain JSON data."""
    packages = {name: found for name in PACKAGES if (found := package_version(name))}
    if not device.startswith("cuda"):
        return {"packages": packages}
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "packages": packages,
        "capability": [properties.major, properties.minor],
        "num_sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "state": query_state(f"GPU-{str(properties.uuid).removeprefix('GPU-')}"),
    }


def query_state(uuid: str) -> dict[str, float]:
    """Clocks, power and temperature; empty where nvidia-smi is missing or refuses, less what it does not know."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--id={uuid}", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_state(done.stdout)


def parse_state(line: str) -> dict[str, float]:
    """``QUERY`` from a line of nvidia-smi; what it has no number for is left out."""
    found = {}
    for name, text in zip(QUERY, line.split(","), strict=False):
        try:
            found[name] = float(text)
        except ValueError:  # "[N/A]"
            continue
    return found


def package_version(name: str) -> str:
    """Empty where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
