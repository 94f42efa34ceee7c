"""The worked examples of CONTRIBUTING.md and the commands of README.md are real."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fakes.native_checks import check_answers, check_batch, check_greedy, message
from fakes.native_folders import byte_tokenizer, write_folder
from fakes.qwen2_vl_folder import write_image
from fakes.repository import ROOT
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness import discover
from mqbench.harness.datasets import catalog
from mqbench.harness.models.check import outcome_of, proofs
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
    sys.modules[spec.name] = module  # dataclasses look their module up
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


def test_family_example_holds_its_proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {name: discover.find_method(name) for name in ("rtn", "mquant")}
    monkeypatch.setattr(discover, "all_methods", lambda: discover.Registry(methods))
    family = load_example("harness/models/smolvlm.py", tmp_path).FAMILY
    outcomes = [outcome_of(proof) for proof in proofs(family)]
    assert [outcome.detail for outcome in outcomes if not outcome.ok] == []
    assert {"names", "shapes smolvlm2-256m", "exact mquant"} <= {outcome.name for outcome in outcomes}
    with torch.device("meta"):
        model = family.build(family.configs["smolvlm2-256m"]())
    assert sum(parameter.numel() for parameter in model.parameters()) == 256_484_928  # SmolVLM-256M, too


def test_family_example_loads_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("harness/models/smolvlm.py", tmp_path)
    processor = tiny_smolvlm_processor()

    def change(config: Any) -> None:
        config.image_token_id = processor.image_token_id

    folder = write_folder(tmp_path / "smolvlm2-256m", example.FAMILY, change, processor)
    (adapter,) = example.ADAPTERS
    assert adapter.find_weights(tmp_path) == folder
    loaded = adapter.load(folder, "cpu", torch.float32)
    images = [write_image(tmp_path / f"{side}.png", side, 16, seed=side) for side in (16, 32, 40)]
    messages = [message(images[0], "one", images[1], "two?"), message("none"), message(images[2], "what?")]
    check_batch(adapter, loaded, messages)
    check_answers(adapter, loaded, messages)
    check_greedy(adapter, loaded, messages, monkeypatch)


def tiny_smolvlm_processor() -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    places = tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))
    marks = ("<fake_token_around_image>", "<image>", "<global-img>", "<video>")
    special = ("<pad>", "<|im_start|>", "<end_of_utterance>", *marks, *places)
    pixels = SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    tokenizer = byte_tokenizer(special, pad_token="<pad>", eos_token="<end_of_utterance>")
    options = {"image_seq_len": 4, "chat_template": DEFAULT_CHAT_TEMPLATE}
    return SmolVLMProcessor(pixels, tokenizer, SmolVLMVideoProcessor(), **options)


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


def test_readme_lists_every_model() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    released = [name for name in discover.all_models().found if not name.startswith("standin")]
    assert [name for name in released if f"`{name}`" not in readme] == []


def test_ci_runs_the_readme_test_command() -> None:
    """README's second command and CI are the same run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install uv && uv run --group dev pytest" in readme
    assert "run --quiet --group dev pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
