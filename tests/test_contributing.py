"""The worked examples of CONTRIBUTING.md and the commands of README.md are real."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fakes.repository import ROOT
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.datasets import catalog
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.table import load_spec

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def added_lines(path: str) -> str:
    """What the worked diff of one file adds."""
    _, found, rest = TEXT.partition(f"+++ b/{path}\n")
    assert found, f"CONTRIBUTING.md has no diff of {path}"
    diff = re.split(r"^(?:--- |```)", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+")) + "\n"


def load_example(path: str, folder: Path) -> ModuleType:
    file = folder / Path(path).name
    file.write_text(added_lines(path), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"example_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_method_example_is_exact_and_quantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("baselines/equalize.py", tmp_path)
    monkeypatch.setitem(sys.modules, "mqbench.baselines.equalize", example)
    load_example("tests/test_equalize.py", tmp_path).test_outputs_do_not_change()

    model = tiny_model()
    recipe = Recipe("equalize", "w8a8", "w4a8")
    report = example.METHOD.quantize(model, tiny_layout(model), recipe, [tiny_batch(model)])
    assert {layer.weight_num_bits for layer in report.layers.values()} == {4, 8}


def tiny_qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    text = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        rope_parameters=rope,
    )
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=90)
    return Qwen2_5_VLForConditionalGeneration(config)


def test_model_example_names_every_linear(tmp_path: Path) -> None:
    example = load_example("harness/models/qwen2_5_vl.py", tmp_path)
    model = tiny_qwen2_5_vl()
    layout = example.qwen2_5_vl_layout(model.config)
    layout.check(model)
    assert len(layout.vision.blocks) == 2
    (adapter,) = example.ADAPTERS
    assert adapter.name == "qwen2.5-vl-7b"
    assert adapter.find_weights(tmp_path) is None


def test_table_example_is_a_specification(tmp_path: Path) -> None:
    (tmp_path / "table21.toml").write_text(added_lines("results/specs/table21.toml"), encoding="utf-8")
    spec = load_spec(21, tmp_path)
    assert spec.rows == ("model", "bits", "method", "seed")
    assert {column.task for column in spec.columns if column.task} <= set(catalog.TASKS)


def test_benchmark_example_is_a_task() -> None:
    code = added_lines("harness/datasets/catalog.py").strip().rstrip(",")
    task = eval(code, {"Task": catalog.Task, "Kind": catalog.Kind})
    assert task.name not in catalog.TASKS
    assert task.has_answer_list


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_and_paths_exist(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_ci_runs_the_readme_test_command() -> None:
    """README's second command and CI are the same run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install uv && uv run --group dev pytest" in readme
    assert "run --quiet --group dev pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
