"""The environment: useful, harmless, and never a reason to crash."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
from pathlib import Path

import pytest

from mqbench.harness import environment


def run_git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def make_checkout(folder: Path) -> Path:
    folder.mkdir()
    run_git(folder, "init")
    (folder / "a.txt").write_text("1")
    run_git(folder, "add", "a.txt")
    run_git(folder, "commit", "-m", "first")
    return folder


def test_description_is_json_and_names_what_decides_a_score() -> None:
    description = environment.describe(attention="sdpa")
    assert json.loads(json.dumps(description)) == description
    assert description["packages"]["mqbench"]
    assert description["attention"] == "sdpa"
    assert {"git", "python", "cpu", "gpu", "driver", "threads", "platform"} <= description.keys()


def test_no_host_user_or_path() -> None:
    text = json.dumps(environment.describe())
    assert socket.gethostname() not in text
    assert f"{Path.home()}/" not in text
    assert f"{getpass.getuser()}@" not in text
    assert str(environment.ROOT) not in text


def test_commit_and_changes(tmp_path: Path) -> None:
    root = make_checkout(tmp_path / "checkout")
    clean = environment.git_state.__wrapped__(root)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert not clean["dirty"]
    (root / "a.txt").write_text("2")
    assert environment.git_state.__wrapped__(root) == clean | {"dirty": True}


def test_no_commit_outside_a_checkout_or_inside_a_foreign_one(tmp_path: Path) -> None:
    assert environment.git_state.__wrapped__(tmp_path) is None
    inner = make_checkout(tmp_path / "foreign") / "site-packages"
    inner.mkdir()
    assert environment.git_state.__wrapped__(inner) is None


def test_no_crash_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_state.__wrapped__(environment.ROOT) is None


def test_hardware_is_read_without_a_gpu_or_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "absent")
    monkeypatch.setattr(environment, "DRIVER_INFO", tmp_path / "absent")
    assert environment.cpu_name.__wrapped__()
    assert environment.driver_version.__wrapped__() is None


def test_driver_version_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12.3.0\n")
    monkeypatch.setattr(environment, "DRIVER_INFO", file)
    assert environment.driver_version.__wrapped__() == "550.54.15"


def test_device_kind_of_the_cpu() -> None:
    assert environment.device_kind("cpu") == "cpu"
