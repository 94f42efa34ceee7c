"""Prompts, answers and scores against VLMEvalKit itself. One import of vlmeval serves all tests of this file."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from fakes.benchmarks import (
    LOSSY,
    FakeAdapter,
    fake_loaded,
    make_rows,
    prompt_key,
    with_base64,
    write_all,
    write_benchmark,
    write_tsv,
)
from mqbench.harness.datasets.calibration import load_calibration
from mqbench.harness.datasets.catalog import MME_PERCEPTION, MME_REASONING, OCRBENCH_CATEGORIES, TASKS, Kind, Task
from mqbench.harness.datasets.files import TaskData, load_task, reference_answer
from mqbench.harness.errors import OutputError, ScoringError
from mqbench.harness.evaluate import build_messages, calibration_prompts, evaluate_task, make_batches, score
from mqbench.harness.models.adapter import Message
from mqbench.harness.models.one_image import SHORT_ANSWER_BENCHMARKS
from mqbench.harness.vlmeval_kit import scores
from mqbench.harness.vlmeval_kit.library import build_dataset, vlmeval_module

ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
WRONG = "zzz"


def process_state() -> dict[str, Any]:
    """Everything that importing vlmeval is known to change."""
    return {
        "environment": dict(os.environ),
        "search path": list(sys.path),
        "tls": ssl._create_default_https_context,
        "root logger": (list(logging.root.handlers), logging.root.level, logging.root.manager.disable),
        "autograd": torch.is_grad_enabled(),
        "torch random": torch.get_rng_state().tolist(),
        "python random": random.getstate(),
        "numpy random": np.random.get_state()[1].tolist(),
        "pixel limit": Image.MAX_IMAGE_PIXELS,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", autouse=True)
def isolated(home: Path) -> Iterator[list[str]]:
    """No network, an empty home and working directory, unusual settings of VLMEvalKit. Yields attempts to connect."""
    attempts: list[str] = []

    def refuse(self: socket.socket, address: object) -> NoReturn:
        attempts.append(str(address))
        raise OSError(f"network use in a test: {address}")

    settings = {"HOME": home, "MQBENCH_CACHE": home / "cache", "PRED_FORMAT": "json", "VERBOSE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        for name, value in settings.items():
            patch.setenv(name, str(value))
        patch.delenv("LMUData", raising=False)
        (home / "work").mkdir()
        patch.chdir(home / "work")
        yield attempts


@pytest.fixture(scope="module")
def import_effects(isolated: list[str]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Process state before and after the import of vlmeval, also when another file has imported it; what it printed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
        del sys.modules[name]
    vlmeval_module.cache_clear()
    before, printed = process_state(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        vlmeval_module("vlmeval.dataset")
    return before, process_state(), printed.getvalue()


@pytest.fixture(scope="module")
def data_dir(home: Path, import_effects: object) -> Path:
    return write_all(home / "data")


def load(data_dir: Path, task: Task) -> TaskData:
    return load_task(task, data_dir)


def perfect(data: TaskData) -> dict[str, str]:
    return {str(row["index"]): reference_answer(data.task, row) for row in data.rows()}


def wrong(data: TaskData) -> dict[str, str]:
    return dict.fromkeys(data.indices, WRONG)


# --- import


def test_import_leaves_the_process_as_it_was(
    import_effects: tuple[dict[str, Any], dict[str, Any], str], home: Path, isolated: list[str]
) -> None:
    before, after, printed = import_effects
    assert "vlmeval.config" in sys.modules
    assert after == before
    assert printed == ""
    assert isolated == []
    assert not (home / "LMUData").exists()
    assert ssl._create_default_https_context is not ssl._create_unverified_context


# --- prompts


def official_messages(task: Task, data: TaskData) -> list[list[dict[str, str]]]:
    """What VLMEvalKit's own wrapper receives in ``generate_inner``, along the path of its runner."""
    wrapper_class = vlmeval_module("vlmeval.vlm.qwen2_vl.model").Qwen2VLChat
    received: list[list[dict[str, str]]] = []

    class Recorder(wrapper_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super(wrapper_class, self).__init__(use_custom_prompt=True)

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            received.append(message)
            return ""

    dataset = build_dataset(task, data)
    wrapper = Recorder()
    wrapper.set_dump_image(dataset.dump_image)
    for position in range(len(dataset.data)):
        line = dataset.data.iloc[position]
        custom = wrapper.use_custom_prompt(dataset.dataset_name)
        prompt = wrapper.build_prompt(line, dataset=dataset.dataset_name) if custom else dataset.build_prompt(line)
        wrapper.generate(message=prompt, dataset=dataset.dataset_name)
    return received


@ALL_TASKS
def test_prompts_are_those_of_vlmevalkits_wrapper(data_dir: Path, task: Task) -> None:
    data = load(data_dir, task)
    tagged = [[{**item, "dataset": task.dataset} for item in message] for message in official_messages(task, data)]
    assert build_messages(task, data, "qwen2_vl") == tagged


def test_prompt_texts_of_llava_and_internvl(data_dir: Path) -> None:
    """LLaVA has a prompt of its own for multiple choice only; InternVL puts the images behind the text."""
    docvqa, scienceqa = (load(data_dir, TASKS[name]) for name in ("docvqa", "scienceqa"))
    short = "\nAnswer the question using a single word or phrase."
    question = docvqa.frame["question"][0]
    (image, text), (first, second) = (
        build_messages(docvqa.task, docvqa, family)[0] for family in ("llava", "internvl")
    )
    assert (text["value"], first["value"]) == (question + short, question + short)
    assert (image["type"], second["type"]) == ("image", "image")

    ask = "Answer with the option's letter from the given choices directly."
    for family in ("llava", "internvl"):
        (item, *_) = (item for item in build_messages(scienceqa.task, scienceqa, family)[0] if item["type"] == "text")
        assert item["value"] == f"Which of these is number 4000?\nA. None\nB. north0\n{ask}"


def test_prompt_texts_of_minicpm_v(data_dir: Path) -> None:
    """It asks for reasoning on OCRBench, and puts its instruction in front of the image elsewhere."""

    def first(name: str) -> list[str]:
        data = load(data_dir, TASKS[name])
        return [
            item["value"] if item["type"] == "text" else "(image)"
            for item in build_messages(data.task, data, "minicpm_v")[0]
        ]

    docvqa, ocrbench = (load(data_dir, TASKS[name]).frame["question"][0] for name in ("docvqa", "ocrbench"))
    assert first("docvqa") == ["Answer the question using a single word or phrase.", "(image)", docvqa]
    image, question = first("ocrbench")
    assert image == "(image)"
    assert question.endswith(f'"Answer: single number or single word or phrase".\n\n{ocrbench}')
    choice = first("scienceqa")[-1]
    assert choice.startswith("Question: Which of these is number 4000?\nOptions:\nA. None\nB. north0\n")
    assert choice.endswith("\nAnswer with the option's letter from the given choices directly.")


def test_prompt_texts_of_cogvlm2(data_dir: Path) -> None:
    """Its own words around choices, in front of the image; the datasets' own prompts elsewhere."""
    data = load(data_dir, TASKS["scienceqa"])
    text = build_messages(data.task, data, "cogvlm2")[0][0]
    ask = "Answer with the option's letter from the given choices directly."
    assert text["value"] == f"Which of these is number 4000?\nA. None\nB. north0\n{ask}"
    data = load(data_dir, TASKS["ocrbench"])
    assert build_messages(data.task, data, "cogvlm2") == build_messages(data.task, data, "glm_4v")


def test_short_answers_are_asked_for_where_vlmevalkit_does() -> None:
    """Its wrappers of GLM-4V and CogVLM2 look at the type of the dataset."""
    type_of = vlmeval_module("vlmeval.dataset").DATASET_TYPE
    short = {task.dataset for task in TASKS.values() if type_of(task.dataset) in ("MCQ", "Y/N")}
    assert short == set(SHORT_ANSWER_BENCHMARKS)


def texts(messages: list[Message]) -> list[str]:
    return [message[-1]["value"] for message in messages]


def test_prompt_texts(data_dir: Path) -> None:
    short = "\nPlease try to answer the question with short words or phrases if possible."
    for name in ("textvqa", "docvqa", "ocrbench"):
        data = load(data_dir, TASKS[name])
        assert texts(build_messages(data.task, data, "qwen2_vl")) == [q + short for q in data.frame["question"]]
    mme = load(data_dir, TASKS["mme"])
    assert texts(build_messages(mme.task, mme, "qwen2_vl")) == list(mme.frame["question"])


def test_multiple_choice_prompt_lists_existing_options_only(data_dir: Path) -> None:
    task = TASKS["scienceqa"]
    without_c, with_c = texts(build_messages(task, load(data_dir, task), "qwen2_vl"))[:2]
    ask = "Please select the correct answer from the options above."
    assert without_c == f"Question: Which of these is number 4000?\nOptions:\nA. None\nB. north0\n{ask}"
    assert with_c == (
        "Hint: Numbers are words here.\nQuestion: Which of these is number 4001?\n"
        f"Options:\nA. None\nB. north1\nC. 007\n{ask}"
    )


def test_text_only_rows_have_no_image(data_dir: Path) -> None:
    task = TASKS["scienceqa"]
    data = load(data_dir, task)
    for message, images in zip(build_messages(task, data, "qwen2_vl"), data.frame["images"], strict=True):
        assert [item["value"] for item in message if item["type"] == "image"] == list(images)
    assert sum(not images for images in data.frame["images"]) == 3


def test_unlisted_family_gets_the_datasets_own_prompts(data_dir: Path) -> None:
    data = load(data_dir, TASKS["docvqa"])
    first = build_messages(data.task, data, "another_family")[0]
    assert first[-1]["value"].endswith("\nAnswer the question using a single word or phrase.")


def test_calibration_prompts_carry_reference_answers(data_dir: Path) -> None:
    calibration = load_calibration(num_samples=10, data_dir=data_dir)
    samples = calibration_prompts(calibration, "qwen2_vl")
    expected = [reference_answer(part.task, row) for part in calibration.parts for row in part.rows()]
    assert [answer for _, answer in samples] == expected
    assert len(samples) == 10


# --- scores


@ALL_TASKS
def test_perfect_answers_give_the_full_score(data_dir: Path, tmp_path: Path, task: Task) -> None:
    data = load(data_dir, task)
    result = score(task, data, perfect(data), tmp_path)
    assert result.score == pytest.approx(task.max_score, abs=1e-9)
    assert result.hits == dict.fromkeys(data.indices, 1.0)
    assert result.metrics["num_items"] == len(data)


@ALL_TASKS
def test_wrong_answers_give_nothing(data_dir: Path, tmp_path: Path, task: Task) -> None:
    data = load(data_dir, task)
    result = score(task, data, wrong(data), tmp_path)
    assert result.score == 0.0
    assert result.hits == dict.fromkeys(data.indices, 0.0)


@ALL_TASKS
def test_scoring_leaves_no_trace(
    data_dir: Path, tmp_path: Path, home: Path, isolated: list[str], capfd: pytest.CaptureFixture[str], task: Task
) -> None:
    data = load(data_dir, task)
    before, files = process_state(), sorted(home.rglob("*"))
    score(task, data, perfect(data), tmp_path)
    assert process_state() == before
    assert sorted(home.rglob("*")) == files
    assert list(tmp_path.iterdir()) == []
    assert list((home / "work").iterdir()) == []
    assert not (home / "LMUData").exists()
    assert isolated == []
    assert capfd.readouterr() == ("", "")


@ALL_TASKS
def test_one_right_answer_counts_once(data_dir: Path, tmp_path: Path, task: Task) -> None:
    data = load(data_dir, task)
    index = data.indices[1]
    result = score(task, data, wrong(data) | {index: perfect(data)[index]}, tmp_path)
    assert [name for name, hit in result.hits.items() if hit] == [index]
    # MME: one of a category's four questions, no whole pair
    expected = 25.0 if task.kind is Kind.YES_NO_PAIRS else task.max_score / len(data)
    assert result.score == pytest.approx(expected)


@pytest.mark.parametrize("answer", [*LOSSY, "a\r\nb", "x\x00y", "\tz", "ü→", ""])
@ALL_TASKS
def test_any_prediction_survives_scoring(data_dir: Path, tmp_path: Path, task: Task, answer: str) -> None:
    data = load(data_dir, task)
    result = score(task, data, perfect(data) | {data.indices[0]: answer}, tmp_path)
    assert all(result.hits[index] == 1.0 for index in data.indices[1:])


def test_vqa_score_of_partly_agreeing_answers(home: Path, tmp_path: Path) -> None:
    task = TASKS["textvqa"]
    rows = make_rows(task, 60)[:1]
    rows[0]["answer"] = repr(["stop"] * 2 + ["halt"] * 8)
    write_benchmark(home / "partly", task, rows=rows)
    result = score(task, load(home / "partly", task), {"0": "Stop."}, tmp_path)
    # leaving each answer out in turn: 2 times 1 other match, 8 times 2 others, a third of a point each
    assert result.score == pytest.approx(100 * (2 * 1 / 3 + 8 * 2 / 3) / 10)


def test_anls_of_a_near_miss(home: Path, tmp_path: Path) -> None:
    task = TASKS["docvqa"]
    rows = make_rows(task, 70)[:2]
    rows[0]["answer"], rows[1]["answer"] = "['abcdefgh']", "['abcdefgh']"
    write_benchmark(home / "near", task, rows=rows)
    result = score(task, load(home / "near", task), {"0": "abcdefgX", "1": "abcXXXXX"}, tmp_path)
    assert result.hits == {"0": pytest.approx(7 / 8), "1": 0.0}
    assert result.score == pytest.approx(100 * 7 / 16)


def test_ocrbench_is_points_per_thousand_by_category(data_dir: Path, tmp_path: Path) -> None:
    data = load(data_dir, TASKS["ocrbench"])
    predictions = perfect(data) | {data.indices[9]: WRONG, data.indices[6]: WRONG}
    result = score(data.task, data, predictions, tmp_path)
    assert result.score == pytest.approx(800)
    assert result.metrics["Final Score"] == 8
    assert result.metrics["Text Recognition"] == 6
    assert result.metrics[OCRBENCH_CATEGORIES[9]] == result.metrics[OCRBENCH_CATEGORIES[6]] == 0


def test_mme_counts_questions_and_pairs(data_dir: Path, tmp_path: Path) -> None:
    data = load(data_dir, TASKS["mme"])
    wrong_rows = {index: "Yes" for index, row in zip(data.indices, data.rows(), strict=True)
                  if row["category"] == "OCR" and row["answer"] == "No"}  # fmt: skip
    wrong_rows.popitem()
    result = score(data.task, data, perfect(data) | wrong_rows, tmp_path)
    assert result.metrics["OCR"] == pytest.approx(75 + 50)
    assert result.metrics["perception"] == pytest.approx(200 * len(MME_PERCEPTION) - 75)
    assert result.metrics["reasoning"] == pytest.approx(200 * len(MME_REASONING))
    assert result.score == pytest.approx(2725)


@pytest.mark.parametrize("limit", [2, 10, 28])
def test_limited_mme_is_scaled_to_its_categories(data_dir: Path, tmp_path: Path, limit: int) -> None:
    data = load_task(TASKS["mme"], data_dir, limit)
    assert score(data.task, data, perfect(data), tmp_path).score == pytest.approx(2800)


def test_mme_pairs_by_the_files_own_names_when_images_are_inside(data_dir: Path, home: Path, tmp_path: Path) -> None:
    task = TASKS["mme"]
    rows = make_rows(task, 3000)
    packed = [
        row | {"image": packed["image"]} for row, packed in zip(rows, with_base64(rows, data_dir / "MME"), strict=True)
    ]
    write_tsv(home / "packed" / "MME.tsv", packed)
    data = load(home / "packed", task)
    assert score(task, data, perfect(data), tmp_path).score == pytest.approx(2800)


def test_scienceqa_reports_subjects_and_contexts(data_dir: Path, tmp_path: Path) -> None:
    data = load(data_dir, TASKS["scienceqa"])
    text_only = {index: WRONG for index, images in zip(data.indices, data.frame["images"], strict=True) if not images}
    result = score(data.task, data, perfect(data) | text_only, tmp_path)
    assert result.score == pytest.approx(100 * 6 / 9)
    assert result.metrics["Overall"] == pytest.approx(6 / 9)
    assert (result.metrics["NAT"], result.metrics["SOC"], result.metrics["LAN"]) == (0, 1, 1)
    assert result.metrics["IMG"] == 1
    assert result.metrics["TXT"] == pytest.approx(3 / 4)
    assert result.metrics["NO"] == 0


def test_several_splits_are_weighted_by_their_rows(home: Path, tmp_path: Path) -> None:
    task = TASKS["scienceqa"]
    rows = make_rows(task, 80)
    for row in rows[:2]:
        row["split"] = ""
    write_benchmark(home / "splits", task, rows=rows)
    data = load(home / "splits", task)
    result = score(task, data, perfect(data) | {"0": WRONG}, tmp_path)
    assert result.score == pytest.approx(100 * 8 / 9)
    assert (result.metrics["none|Overall"], result.metrics["test|Overall"]) == (0.5, 1.0)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_predictions_must_fit_the_rows(data_dir: Path, tmp_path: Path, change: str) -> None:
    data = load(data_dir, TASKS["textvqa"])
    predictions = perfect(data)
    if change == "missing":
        del predictions["3"]
    else:
        predictions["stale"] = "x"
    with pytest.raises(ScoringError, match=r"textvqa: .*index (3|stale)"):
        score(data.task, data, predictions, tmp_path)


def test_scores_that_do_not_add_up_are_refused(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(data_dir, TASKS["docvqa"])
    monkeypatch.setattr(scores, "_ITEM_SCORES", {Kind.VQA: lambda run: [0.5] * len(data)})
    with pytest.raises(ScoringError, match=r"docvqa: VLMEvalKit's score is 100\.0, its rows' scores give 50\.0"):
        score(data.task, data, perfect(data), tmp_path)


def test_folder_that_cannot_be_written_is_an_output_error(data_dir: Path, tmp_path: Path) -> None:
    data = load(data_dir, TASKS["docvqa"])
    with pytest.raises(OutputError, match="choose another --out"):
        score(data.task, data, perfect(data), tmp_path / "none")


# --- answers


def fake_adapter(data: TaskData, stop_after: int | None = None) -> FakeAdapter:
    keys = [prompt_key(message) for message in build_messages(data.task, data, "qwen2_vl")]
    return FakeAdapter(dict(zip(keys, perfect(data).values(), strict=True)), stop_after)


@ALL_TASKS
def test_answers_are_keyed_by_row_whatever_the_batches(data_dir: Path, task: Task) -> None:
    data = load(data_dir, task)
    for batch_size in (1, 3, 1000):
        adapter = fake_adapter(data)
        predictions = evaluate_task(fake_loaded(), adapter, task, data, batch_size)
        assert predictions == perfect(data)
        assert list(predictions) == list(data.indices)
        assert max(adapter.batches) == min(batch_size, len(data))


def test_interrupted_run_goes_on_with_the_same_batches(data_dir: Path) -> None:
    data = load(data_dir, TASKS["mme"])
    saved: dict[str, str] = {}
    with pytest.raises(KeyboardInterrupt):
        evaluate_task(fake_loaded(), fake_adapter(data, stop_after=3), data.task, data, 8, saved.update)
    assert len(saved) == 24
    lost = next(iter(saved))
    del saved[lost]
    adapter, renewed = fake_adapter(data), dict[str, str]()
    predictions = evaluate_task(fake_loaded(), adapter, data.task, data, 8, renewed.update, {**saved, "stale": "x"})
    assert predictions == perfect(data)
    assert adapter.batches == [8] * 5  # 4 new batches and the one that had lost a row
    assert lost in renewed


def test_finished_run_generates_nothing(data_dir: Path) -> None:
    data = load(data_dir, TASKS["docvqa"])
    adapter = fake_adapter(data)
    assert evaluate_task(fake_loaded(), adapter, data.task, data, 4, done=perfect(data)) == perfect(data)
    assert adapter.batches == []


def test_models_own_limit_of_new_tokens_is_kept(data_dir: Path) -> None:
    data = load(data_dir, TASKS["docvqa"])
    adapter = fake_adapter(data)
    evaluate_task(fake_loaded(), adapter, data.task, data, 100)
    adapter.max_new_tokens = 24
    evaluate_task(fake_loaded(), adapter, data.task, data, 100)
    assert adapter.limits == [2048, 24]


def test_batches_are_sorted_longest_first_and_cover_every_prompt() -> None:
    lengths = (5, 400, 80, 400, 12, 2000)
    messages: list[Message] = [[{"type": "text", "value": "x" * length}] for length in lengths]
    assert make_batches(messages, 4) == [[5, 1, 3, 2], [4, 0]]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make_batches(messages, 0)


def test_images_count_towards_the_length(tmp_path: Path) -> None:
    Image.new("L", (280, 280)).save(tmp_path / "big.png")
    Image.new("L", (28, 28)).save(tmp_path / "small.png")
    messages: list[Message] = [
        [{"type": "image", "value": str(tmp_path / name)}, {"type": "text", "value": text}]
        for name, text in (("small.png", "x" * 40), ("big.png", "x"))
    ]
    assert make_batches(messages, 1) == [[1], [0]]
