"""What is installed is what stands in the repository, under names that disturb nobody else's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.repository import ROOT, code_files, mapped_folders, pyproject

BUILD = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"


def run_python(code: str, *, cwd: Path, path: list[Path], flags: tuple[str, ...] = ()) -> str:
    """The standard output of ``python -c code`` with exactly these folders on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hugging_face_kernels(tmp_path: Path) -> Path:
    """A folder that holds a regular package ``kernels``, as an installation of Hugging Face's does."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('OWNER = "hugging face"\n')
    return package.parent


def test_root_folder_does_not_shadow_hugging_face_kernels(hugging_face_kernels: Path) -> None:
    """Started in the repository, where ``kernels/`` comes first on the path, ``import kernels`` finds theirs."""
    code = (
        "import sys, kernels; assert sys.path[0] == ''; "
        "import mqbench.kernels.hadamard as ours; print(kernels.OWNER, '|', ours.__file__)"
    )
    owner, _, ours = run_python(code, cwd=ROOT, path=[hugging_face_kernels]).partition(" | ")
    assert owner == "hugging face"
    assert Path(ours) == ROOT / "kernels" / "hadamard.py"


def test_works_in_the_repository_without_hugging_face_kernels() -> None:
    """transformers asks for ``kernels`` when a model is imported; our folder must not count as an installation."""
    code = (
        "from transformers.utils.import_utils import is_kernels_available as available; "
        "from importlib.util import find_spec; "
        "assert not available() or find_spec('kernels').origin; "
        "from transformers import Qwen2VLForConditionalGeneration as model; import mqbench.kernels.hadamard; "
        "print(model.__name__)"
    )
    assert run_python(code, cwd=ROOT, path=[]) == "Qwen2VLForConditionalGeneration"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of the working tree, built in a copy and without the network (no build isolation)."""
    source = tmp_path_factory.mktemp("source") / "mqbench"
    ignore = shutil.ignore_patterns("__pycache__", "records", "rendered")
    for folder in mapped_folders().values():
        shutil.copytree(folder, source / folder.name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    dist = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", BUILD, str(dist)], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        yield archive


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    wheel.extractall(folder)
    return folder


# What a user of the wheel alone can do, in one process because importing torch takes seconds.
USE_WHEEL = """
import json, sys
from importlib.metadata import distribution
import mqbench.harness.table as table
import mqbench.kernels.hadamard

points = {f"{point.group}:{point.name}": point.load() for point in distribution("mqbench").entry_points}
modules = {name: module.__file__ for name, module in sys.modules.items() if name.startswith("mqbench.")}
spec = table.load_spec(3)
paper = sorted(line["model"] for line in table.paper_lines(spec.paper))
files = {name: path for name, path in modules.items() if path}
print(json.dumps({"points": sorted(points), "files": files, "title": spec.title, "paper": paper}))
points["console_scripts:mqbench"](["methods"])
"""


@pytest.fixture(scope="module")
def use(unpacked: Path) -> tuple[dict[str, Any], str]:
    """What ``USE_WHEEL`` found and what ``mqbench methods`` printed, without the editable installation's finder.

    ``-S`` keeps the finder from being set up; the dependencies' folder is then named by hand.
    """
    dependencies = {Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}
    printed = run_python(USE_WHEEL, cwd=unpacked, path=[unpacked, *sorted(dependencies)], flags=("-S",))
    found, _, listed = printed.partition("\n")
    return json.loads(found), listed


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    built = {name for name in wheel.namelist() if name.endswith(".py")}
    assert built == {f"mqbench/{name}" for name in _below_mqbench(".py")}


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".jinja", ".md", ".tsv", ".png", ".toml"])
def test_wheel_holds_shipped_data(wheel: zipfile.ZipFile, suffix: str) -> None:
    """Weights, tokenizers, benchmarks and table specs are there, byte for byte as many as in the repository."""
    shipped = {name for name in _below_mqbench(suffix) if not name.startswith(("results/standin", "results/re"))}
    assert shipped
    assert {name for name in wheel.namelist() if name.endswith(suffix)} == {f"mqbench/{name}" for name in shipped}


def _below_mqbench(suffix: str) -> set[str]:
    """Paths of files as they must lie below ``mqbench/`` in the wheel."""
    return {
        f"{package.removeprefix('mqbench.')}/{path.relative_to(folder).as_posix()}"
        for package, folder in mapped_folders().items()
        for path in folder.rglob(f"*{suffix}")
    }


def test_wheel_holds_paper_figures(wheel: zipfile.ZipFile) -> None:
    papers = {path.name for path in (ROOT / "results" / "paper").iterdir()}
    assert {"table03.csv", "rules.toml"} <= papers
    assert papers == {Path(n).name for n in wheel.namelist() if n.startswith("mqbench/results/paper/")}


def test_wheel_puts_nothing_beside_mqbench(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"mqbench"}


def test_wheel_imports_from_itself(use: tuple[dict[str, Any], str], unpacked: Path) -> None:
    files, used = use[0]["files"], ("kernels.hadamard", "harness.cli", "baselines.rtn", "mquant.mquant")
    assert {f"mqbench.{name}" for name in used} <= set(files)
    assert not [file for file in files.values() if not Path(file).is_relative_to(unpacked)]


def test_wheel_entry_points_resolve(use: tuple[dict[str, Any], str]) -> None:
    project = pyproject()["project"]
    declared = {f"console_scripts:{name}" for name in project["scripts"]}
    declared |= {f"{group}:{name}" for group, points in project["entry-points"].items() for name in points}
    assert set(use[0]["points"]) == declared


def test_wheel_finds_specs_and_paper_figures(use: tuple[dict[str, Any], str]) -> None:
    assert use[0]["title"]
    assert "qwen2-vl-7b" in use[0]["paper"]


def test_wheel_command_lists_methods(use: tuple[dict[str, Any], str]) -> None:
    for method in pyproject()["project"]["entry-points"]["mqbench.methods"]:
        assert method in use[1]


def test_editable_installation_reads_the_working_tree() -> None:
    """The other tests run against the repository's files, not against a forgotten installation."""
    code = "from importlib.util import find_spec; print(find_spec('mqbench.harness.errors').origin)"
    assert Path(run_python(code, cwd=ROOT.parent, path=[])) == code_files()["mqbench.harness.errors"]


def test_version_is_in_the_changelog() -> None:
    assert f"## {pyproject()['project']['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_pin_is_exact_and_every_dependency_is_pinned() -> None:
    settings = pyproject()
    pins = dict(pin.split("==") for pin in settings["tool"]["uv"]["constraint-dependencies"])
    wanted = [*settings["project"]["dependencies"], *settings["dependency-groups"]["test"]]
    names = {entry.partition("=")[0].partition(">")[0].strip().lower() for entry in wanted}
    assert names <= set(pins)
    assert pins["transformers"] == "5.17.0"
