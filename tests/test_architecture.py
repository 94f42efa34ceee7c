"""What may import what, and what may never be committed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.repository import ROOT, code_files, mapped_folders, pyproject, tracked_files

MODULES = code_files()

# Who may import whom, by import prefix; harness.quant is a layer of its own inside harness and knows of models no more
# than the types of their protocol.
ALLOWED = {
    "mqbench.kernels": {"mqbench.kernels"},
    "mqbench.harness.quant": {
        "mqbench.kernels",
        "mqbench.harness.quant",
        "mqbench.harness.errors",
        "mqbench.harness.models.adapter",
    },
    "mqbench.harness": {"mqbench.kernels", "mqbench.harness", "mqbench.results"},
    "mqbench.baselines": {"mqbench.kernels", "mqbench.harness.quant", "mqbench.harness.errors", "mqbench.baselines"},
    "mqbench.mquant": {
        "mqbench.kernels",
        "mqbench.harness.quant",
        "mqbench.harness.errors",
        "mqbench.baselines",
        "mqbench.mquant",
    },
}

# Import name -> name in pyproject.toml, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "vlmeval": "ms-vlmeval", "huggingface_hub": "huggingface-hub"}
# Used when they can be imported, never required.
OPTIONAL = {"fast_hadamard_transform", "gemlite", "ray", "torchao", "triton"}

MODULE_NAME = re.compile(r"[a-z_]\w*(\.\w+)*")


def imports_of(path: Path) -> Iterator[str]:
    """Every absolute module name that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; use mqbench.* names"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_named_in(path: Path) -> Iterator[str]:
    """What a file imports, and every string in it that reads like a module name (for ``import_module``)."""
    yield from imports_of(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.value


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module: str) -> str:
    return max((prefix for prefix in ALLOWED if starts_with(module, prefix)), key=len)


@pytest.mark.parametrize("module", [name for name in MODULES if not starts_with(name, "mqbench.results")])
def test_imports_go_one_way(module: str) -> None:
    ours = [name for name in imports_of(MODULES[module]) if starts_with(name, "mqbench")]
    allowed = ALLOWED[layer_of(module)]
    wrong = [name for name in ours if not any(starts_with(name, prefix) for prefix in allowed)]
    assert not wrong, f"{module} may import {sorted(allowed)} only"


def test_layers_are_not_empty() -> None:
    layers = {layer_of(module) for module in MODULES if not starts_with(module, "mqbench.results")}
    assert layers == set(ALLOWED)


def test_scanners_see_nested_and_dynamic_imports(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text("def f():\n    import vlmeval.dataset\n    importlib.import_module('mqbench.mquant')\n")
    assert list(imports_of(source)) == ["vlmeval.dataset"]
    assert "mqbench.mquant" in set(modules_named_in(source))


def test_only_one_package_imports_vlmeval() -> None:
    users = {m for m, path in MODULES.items() if any(starts_with(name, "vlmeval") for name in modules_named_in(path))}
    assert {module.rpartition(".")[0] for module in users} == {"mqbench.harness.vlmeval_kit"}


def test_evaluate_imports_vlmeval_lazily() -> None:
    """Its import takes up to a minute: only when a prompt or a score is asked for."""
    code = "import sys, mqbench.harness.evaluate; print('vlmeval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_methods_are_found_by_name_only() -> None:
    """harness does not even name a module of baselines or mquant."""
    methods = ("mqbench.baselines", "mqbench.mquant")
    for module in (name for name in MODULES if starts_with(name, "mqbench.harness")):
        named = [name for name in modules_named_in(MODULES[module]) if any(starts_with(name, m) for m in methods)]
        assert not named, module


def test_third_party_imports_are_declared() -> None:
    declared = {re.split(r"[<>=!~ \[;]", entry)[0].lower() for entry in pyproject()["project"]["dependencies"]}
    used = {name.split(".")[0] for path in MODULES.values() for name in imports_of(path)}
    foreign = used - set(sys.stdlib_module_names) - {"mqbench"} - OPTIONAL
    missing = {name for name in foreign if DISTRIBUTIONS.get(name, name).lower() not in declared}
    assert not missing, "add them to [project] dependencies"


def test_declared_dependencies_are_used() -> None:
    """A declared distribution provides a module that we import, or one that an import of ours needs at run time."""
    needed_by_others = {"accelerate", "torchvision"}  # vlmeval and transformers' image processors load them by name
    declared = {re.split(r"[<>=!~ \[;]", entry)[0].lower() for entry in pyproject()["project"]["dependencies"]}
    used = {name.split(".")[0] for path in MODULES.values() for name in modules_named_in(path)}
    assert declared - {DISTRIBUTIONS.get(name, name) for name in used} <= needed_by_others


@pytest.mark.parametrize("folder", mapped_folders().values(), ids=lambda path: path.name)
def test_mapped_folder_has_no_init(folder: Path) -> None:
    assert folder.is_dir()
    assert not (folder / "__init__.py").exists()


def test_every_folder_with_code_is_packaged() -> None:
    packages = set(pyproject()["tool"]["setuptools"]["packages"])
    assert {name.rpartition(".")[0] for name in MODULES} <= packages


def test_tests_hold_no_init() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def _needles() -> dict[str, re.Pattern[bytes]]:
    """What no committed text may hold; built from parts so that this file is clean itself."""
    hosts = ["py" + r"pi\.", "python" + r"hosted\.", r"download\.py" + r"torch\.", "npm" + r"js\.", "deb" + r"\.debian"]
    places = ["home", "work", "root", "Users"]
    return {
        "the host name of a package registry": re.compile("|".join(hosts).encode(), re.IGNORECASE),
        "a path of one machine": re.compile(rf"(?<![\w.\-/*}}])/({'|'.join(places)})/[a-z]".encode()),
    }


@pytest.mark.parametrize("kind", _needles())
def test_committed_text_holds_no(kind: str) -> None:
    pattern = _needles()[kind]
    hits = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data[:1024]:
            continue
        hits += [f"{path.relative_to(ROOT)}: {match.group().decode()}" for match in pattern.finditer(data)]
    assert not hits, f"found {kind}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("get it from https://" + "py" + "pi.org/simple", "the host name of a package registry"),
        ('"/' + 'home/ann/models"', "a path of one machine"),
        ("cd /" + "work/main", "a path of one machine"),
    ],
)
def test_needles_find_what_they_should(text: str, kind: str) -> None:
    assert _needles()[kind].search(text.encode())


def test_no_lock_file_is_tracked() -> None:
    locks = {"uv.lock", "poetry.lock", "Pipfile.lock", "pylock.toml"}
    assert not locks & {path.name for path in tracked_files()}
