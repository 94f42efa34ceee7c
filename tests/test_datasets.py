"""Benchmark files: what is accepted, what is refused and how, limits, hashes, calibration sets."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fakes.benchmarks import LOSSY, Row, make_rows, save_image, with_base64, write_all, write_benchmark, write_tsv
from mqbench.harness.datasets import calibration as calibration_module
from mqbench.harness.datasets import files
from mqbench.harness.datasets.calibration import Calibration, load_calibration
from mqbench.harness.datasets.catalog import TASKS, find_task, find_tasks
from mqbench.harness.datasets.files import TaskData, limited_positions, load_task, reference_answer
from mqbench.harness.datasets.images import cache_dir, image_sha256
from mqbench.harness.errors import CalibrationError, DatasetError, OutputError, UnknownNameError

TEXTVQA, DOCVQA, MME, SCIENCEQA, OCRBENCH = (
    TASKS[name] for name in ("textvqa", "docvqa", "mme", "scienceqa", "ocrbench")
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MQBENCH_CACHE", str(folder))
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_all(tmp_path / "data")


# --- catalog


def test_tasks_are_found_by_either_name_in_any_case() -> None:
    assert find_task("TextVQA") is find_task("textvqa_val") is TEXTVQA
    assert find_tasks(["scienceqa", "MME", "mme"]) == (MME, SCIENCEQA)
    assert find_tasks(["all"]) == tuple(TASKS.values())


def test_unknown_task_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="unknown task 'docvqua'; did you mean 'docvqa'"):
        find_task("docvqua")


# --- reading


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_rows_come_as_written(data_dir: Path, task: files.Task) -> None:
    data = load_task(task, data_dir)
    rows = make_rows(task, 1000 * list(TASKS).index(task.name))
    assert data.indices == tuple(row["index"] for row in rows)
    for row, written in zip(data.rows(), rows, strict=True):
        assert {name: row[name] for name in written} == written
        expected = () if written["image_path"] == "[]" else (str(data.source.parent / written["image_path"]),)
        assert row["images"] == expected


def test_answers_that_look_like_something_else_stay_strings(data_dir: Path) -> None:
    data = load_task(TEXTVQA, data_dir)
    answers = [reference_answer(TEXTVQA, row) for row in data.rows()]
    assert answers == ["stop", *LOSSY]
    assert list(load_task(SCIENCEQA, data_dir).frame["A"]) == ["None"] * 9


def test_reference_answer_is_the_most_frequent_one() -> None:
    assert reference_answer(TEXTVQA, {"answer": "['b', 'a', 'c', 'a', 'b']"}) == "b"
    assert reference_answer(MME, {"answer": "Yes"}) == "Yes"


def test_official_layout_without_a_folder_is_found(tmp_path: Path, data_dir: Path) -> None:
    rows = with_base64(make_rows(MME, 3000), data_dir / "MME")
    flat = tmp_path / "official"
    write_tsv(flat / "MME.tsv", rows)
    assert load_task(MME, flat).source == flat / "MME.tsv"


def test_missing_file_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no file for task 'mme': put VLMEvalKit's MME\.tsv into '.*'"):
        load_task(MME, tmp_path)


# --- base64 images


def test_base64_images_are_unpacked_into_the_cache_once(tmp_path: Path, data_dir: Path, cache: Path) -> None:
    plain = load_task(MME, data_dir)
    packed_dir = tmp_path / "packed"
    write_tsv(packed_dir / "MME.tsv", with_base64(make_rows(MME, 3000), data_dir / "MME"))
    packed = load_task(MME, packed_dir)
    assert packed.content_hash == plain.content_hash
    unpacked = [Path(path) for images in packed.frame["images"] for path in images]
    assert all(path.is_relative_to(cache) for path in unpacked)
    times = {path: path.stat().st_mtime_ns for path in unpacked}
    again = load_task(MME, packed_dir)
    assert [Path(path) for images in again.frame["images"] for path in images] == unpacked
    assert {path: path.stat().st_mtime_ns for path in unpacked} == times


def test_changed_file_is_unpacked_anew(tmp_path: Path, data_dir: Path) -> None:
    rows = with_base64(make_rows(TEXTVQA), data_dir / "TextVQA_VAL")
    path = write_tsv(tmp_path / "packed" / "TextVQA_VAL.tsv", rows)
    before = load_task(TEXTVQA, path.parent)
    rows[0]["image"], rows[1]["image"] = rows[1]["image"], rows[0]["image"]
    write_tsv(path, [*rows, rows[0] | {"index": "new"}])
    after = load_task(TEXTVQA, path.parent)
    hashes = [[image_sha256(Path(images[0])) for images in data.frame["images"]] for data in (before, after)]
    assert hashes[0][:2] == hashes[1][1::-1]


def test_palette_image_is_unpacked_as_vlmevalkit_does(tmp_path: Path) -> None:
    image = Image.new("RGBA", (28, 28), (200, 10, 10, 0))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    row = {"index": "1", "image": text, "question": "what?", "answer": repr(["x"] * 10)}
    write_tsv(tmp_path / "TextVQA_VAL.tsv", [row])
    (images,) = load_task(TEXTVQA, tmp_path).frame["images"]
    with Image.open(images[0]) as unpacked:
        assert unpacked.mode == "RGB"
        assert unpacked.getpixel((0, 0)) == (200, 10, 10)


def test_broken_base64_is_refused(tmp_path: Path) -> None:
    row = {"index": "a7", "image": "QUJD" * 40, "question": "what?", "answer": repr(["x"] * 10)}
    write_tsv(tmp_path / "TextVQA_VAL.tsv", [row])
    with pytest.raises(DatasetError, match=r"TextVQA_VAL\.tsv, row 2 \(index a7\): the 'image' field is no readable"):
        load_task(TEXTVQA, tmp_path)


@pytest.mark.parametrize("image", ["", "99"])
def test_image_that_is_neither_base64_nor_a_row_is_refused(tmp_path: Path, image: str) -> None:
    row = {"index": "1", "image": image, "question": "what?", "answer": repr(["x"] * 10)}
    write_tsv(tmp_path / "TextVQA_VAL.tsv", [row])
    with pytest.raises(DatasetError, match=r"row 2 \(index 1\): 'image' is neither base64 nor the index of a row"):
        load_task(TEXTVQA, tmp_path)


def test_cache_that_cannot_be_written_is_an_output_error(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MQBENCH_CACHE", str(tmp_path / "file"))
    rows = with_base64(make_rows(TEXTVQA), data_dir / "TextVQA_VAL")
    write_tsv(tmp_path / "packed" / "TextVQA_VAL.tsv", rows)
    with pytest.raises(OutputError, match="set MQBENCH_CACHE"):
        load_task(TEXTVQA, tmp_path / "packed")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MQBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "mqbench"


# --- refusals


def edited(position: int, **changes: str) -> Callable[[list[Row]], list[Row]]:
    def edit(rows: list[Row]) -> list[Row]:
        rows[position] |= changes
        return rows

    return edit


def without(column: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [{name: value for name, value in row.items() if name != column} for row in rows]


REFUSALS = {
    "no question column": ("textvqa", without("question"), r"lacks column question; TextVQA needs"),
    "no image column": ("docvqa", without("image_path"), r"lacks column image \(base64\) or image_path"),
    "no category column": ("ocrbench", without("category"), r"lacks column category"),
    "no options": ("scienceqa", without("B"), r"lacks column B"),
    "repeated index": ("textvqa", edited(2, index="0"), r"index '0' stands in rows 2, 4; give every row its own"),
    "empty question": ("docvqa", edited(1, question=" "), r"row 3 \(index 1\): 'question' is empty"),
    "answer no list": ("docvqa", edited(1, answer="4711"), r"row 3 \(index 1\): 'answer' is not a list"),
    "answer is code": ("ocrbench", edited(0, answer="[print('x')]"), r"row 2 \(index 0\): 'answer' is not a list"),
    "answers of numbers": ("docvqa", edited(1, answer="[4711]"), r"'answer' is not a list of strings"),
    "too few answers": ("textvqa", edited(3, answer="['a', 'a']"), r"'answer' lists 2, TextVQA needs at least 4"),
    "no answer": ("docvqa", edited(0, answer="[]"), r"'answer' lists 0, DocVQA needs at least 1"),
    "foreign category": ("ocrbench", edited(0, category="OCR"), r"category 'OCR' is none of OCRBench's"),
    "yes in lower case": ("mme", edited(0, answer="yes"), r"answer 'yes' is neither 'Yes' nor 'No'"),
    "letter without option": ("scienceqa", edited(0, answer="C"), r"answer 'C' is not the letter of an option"),
    "no letter": ("scienceqa", edited(0, answer="north"), r"answer 'north' is not the letter of an option"),
    "half a pair": ("mme", lambda rows: rows[1:], r"image 'OCR/3000.png' of category 'OCR' has 1 question"),
    "missing image": (
        "docvqa",
        edited(2, image_path="images/none.png"),
        r"row 4 \(index 2\): image '.*none\.png'",
    ),
    "image list is code": ("docvqa", edited(2, image_path="[open('x')]"), r"'image_path' is no path and no list"),
    "no rows": ("docvqa", lambda rows: [], r"has no rows|is empty"),
}


@pytest.mark.parametrize(("name", "edit", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_unusable_file_is_refused_with_file_row_and_advice(
    data_dir: Path, name: str, edit: Callable[[list[Row]], list[Row]], message: str
) -> None:
    task = TASKS[name]
    path = data_dir / task.dataset / f"{task.dataset}.tsv"
    write_tsv(path, edit(make_rows(task, 1000 * list(TASKS).index(name))))
    with pytest.raises(DatasetError, match=message) as caught:
        load_task(task, data_dir)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_header_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "DocVQA_VAL.tsv").write_text("index\tquestion\tanswer\timage_path\n")
    with pytest.raises(DatasetError, match="has no rows"):
        load_task(DOCVQA, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00index", b'index\tquestion\n1\t"open\n'])
def test_file_that_is_no_tsv_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "DocVQA_VAL.tsv").write_bytes(content)
    with pytest.raises(DatasetError, match=r"DocVQA_VAL\.tsv"):
        load_task(DOCVQA, tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_image_is_refused(data_dir: Path, suffix: str) -> None:
    image = data_dir / "DocVQA_VAL" / f"broken{suffix}"
    Image.effect_noise((300, 300), 80).save(image)
    image.write_bytes(image.read_bytes()[:-2000])
    rows = edited(1, image_path=image.name)(make_rows(DOCVQA, 1000))
    write_tsv(data_dir / "DocVQA_VAL" / "DocVQA_VAL.tsv", rows)
    with pytest.raises(DatasetError, match=rf"row 3 \(index 1\): image '.*broken\{suffix}' is broken"):
        load_task(DOCVQA, data_dir)


# --- limits


@pytest.mark.parametrize("limit", [2, 3, 14, 28, 29, 55, 56, 100])
def test_mme_limit_keeps_whole_pairs(data_dir: Path, limit: int) -> None:
    data = load_task(MME, data_dir, limit)
    assert len(data) == min(56, limit - limit % 2)
    assert set(Counter(data.frame["image_path"]).values()) == {2}
    assert data.frame["category"].nunique() == min(14, len(data) // 2)


def test_mme_limit_of_one_still_gives_a_pair(data_dir: Path) -> None:
    assert len(load_task(MME, data_dir, 1)) == 2


@given(limit=st.integers(1, 40), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_limit_spreads_over_categories(limit: int, sizes: list[int]) -> None:
    categories = [f"c{number}" for number, size in enumerate(sizes) for _ in range(size)]
    frame = pd.DataFrame({"category": categories, "index": [str(row) for row in range(len(categories))]})
    chosen = limited_positions(OCRBENCH, frame, limit)
    assert chosen == sorted(set(chosen)) == limited_positions(OCRBENCH, frame, limit)
    assert len(chosen) == min(limit, len(frame))
    counts = [Counter(categories[row] for row in chosen)[f"c{number}"] for number in range(len(sizes))]
    full = min((count for count, size in zip(counts, sizes, strict=True) if count < size), default=max(counts))
    assert all(count in (full, full + 1) or count == size for count, size in zip(counts, sizes, strict=True))


def test_limit_without_categories_takes_the_first_rows(data_dir: Path) -> None:
    assert load_task(TEXTVQA, data_dir, 3).indices == ("0", "1", "2")


def test_limit_below_one_is_refused(data_dir: Path) -> None:
    with pytest.raises(DatasetError, match="--limit must be at least 1, got 0"):
        load_task(TEXTVQA, data_dir, 0)


def test_images_beyond_the_limit_are_not_needed(data_dir: Path) -> None:
    (data_dir / "TextVQA_VAL" / "images" / "4.png").unlink()
    assert len(load_task(TEXTVQA, data_dir, 4)) == 4


# --- hashes


def test_content_hash_ignores_names_and_places(tmp_path: Path, data_dir: Path) -> None:
    rows = make_rows(TEXTVQA)
    for row in rows:
        save_image(tmp_path / "other" / "TextVQA_VAL" / f"x{row['index']}.png", int(row["index"]))
    renamed = [row | {"index": f"r{row['index']}", "image_path": f"x{row['index']}.png"} for row in rows]
    write_tsv(tmp_path / "other" / "TextVQA_VAL" / "TextVQA_VAL.tsv", renamed)
    assert load_task(TEXTVQA, tmp_path / "other").content_hash == load_task(TEXTVQA, data_dir).content_hash


@pytest.mark.parametrize("change", ["question", "answer", "image", "order", "limit"])
def test_content_hash_sees_every_change(data_dir: Path, change: str) -> None:
    before = load_task(DOCVQA, data_dir).content_hash
    rows = make_rows(DOCVQA, 1000)
    if change == "image":
        save_image(data_dir / "DocVQA_VAL" / rows[0]["image_path"], 77)
    elif change == "order":
        rows = rows[::-1]
    elif change != "limit":
        rows[0][change] = "['else']"
    write_tsv(data_dir / "DocVQA_VAL" / "DocVQA_VAL.tsv", rows)
    assert load_task(DOCVQA, data_dir, 4 if change == "limit" else None).content_hash != before


# --- calibration


def sample_ids(calibration: Calibration) -> set[tuple[str, str]]:
    return {(part.task.name, index) for part in calibration.parts for index in part.indices}


def test_mixed_split_draws_evenly(data_dir: Path) -> None:
    calibration = load_calibration(num_samples=17, seed=3, data_dir=data_dir)
    assert {part.task.name: len(part) for part in calibration.parts} == {
        "textvqa": 4, "docvqa": 4, "ocrbench": 3, "mme": 3, "scienceqa": 3,
    }  # fmt: skip
    assert (calibration.split, calibration.num_samples, calibration.seed) == ("mixed", 17, 3)


def test_draw_depends_on_the_seed_alone_and_grows_by_adding(data_dir: Path) -> None:
    first = load_calibration(num_samples=20, seed=1, data_dir=data_dir)
    assert load_calibration(num_samples=20, seed=1, data_dir=data_dir).hash == first.hash
    other = load_calibration(num_samples=20, seed=2, data_dir=data_dir)
    assert sample_ids(other) != sample_ids(first)
    assert other.hash != first.hash
    assert sample_ids(load_calibration(num_samples=9, seed=1, data_dir=data_dir)) < sample_ids(first)


def test_small_pools_are_used_up_before_the_draw_fails(data_dir: Path) -> None:
    calibration = load_calibration(num_samples=89, data_dir=data_dir)
    assert sum(map(len, calibration.parts)) == 89
    with pytest.raises(CalibrationError, match="has 89 rows, 90 are asked for; use --calib-samples 89 or less"):
        load_calibration(num_samples=90, data_dir=data_dir)


def test_one_benchmark_as_split(data_dir: Path) -> None:
    calibration = load_calibration("mme", num_samples=5, data_dir=data_dir)
    assert [part.task for part in calibration.parts] == [MME]
    assert len(calibration.parts[0]) == 5


def test_unknown_split_is_refused(data_dir: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown calibration split 'mmee'; did you mean 'mme'"):
        load_calibration("mmee", data_dir=data_dir)


def test_no_samples_and_empty_file_are_refused(data_dir: Path) -> None:
    with pytest.raises(CalibrationError, match="--calib-samples must be at least 1, got 0"):
        load_calibration(num_samples=0, data_dir=data_dir)
    path = data_dir / "calibration" / "MME" / "MME.tsv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(CalibrationError, match=r"MME\.tsv: the calibration file has no rows"):
        load_calibration("mme", num_samples=4, data_dir=data_dir)


def test_missing_calibration_file_says_where_to_put_it(data_dir: Path) -> None:
    (data_dir / "calibration" / "MME" / "MME.tsv").unlink()
    with pytest.raises(CalibrationError, match=r"no calibration file for split 'mme': put MME\.tsv into"):
        load_calibration("mme", num_samples=4, data_dir=data_dir)


def test_user_data_without_calibration_folder_uses_the_shipped_one(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_module, "SHIPPED_DATA", data_dir)
    assert load_calibration(num_samples=5, data_dir=tmp_path).dataset == "shipped"
    assert load_calibration(num_samples=5).dataset == "shipped"
    write_benchmark(tmp_path / "calibration", MME)
    assert load_calibration(num_samples=5, data_dir=tmp_path).dataset == str(tmp_path / "calibration")


def test_disjoint_sets_pass(data_dir: Path) -> None:
    calibration = load_calibration(num_samples=40, data_dir=data_dir)
    for task in TASKS.values():
        calibration.refuse_overlap(load_task(task, data_dir))


@pytest.mark.parametrize("task", [TEXTVQA, SCIENCEQA], ids=["with image", "text only too"])
def test_overlap_is_refused_by_content_even_under_other_names(data_dir: Path, task: files.Task) -> None:
    folder = data_dir / "calibration" / task.dataset
    rows = make_rows(task, 1000 * list(TASKS).index(task.name) + 500)
    stolen = make_rows(task, 1000 * list(TASKS).index(task.name))[0]
    if stolen["image_path"] != "[]":
        save_image(folder / "innocent.png", int(Path(stolen["image_path"]).stem))
        stolen["image_path"] = "innocent.png"
    write_tsv(folder / f"{task.dataset}.tsv", [*rows, stolen | {"index": "zz"}])
    calibration = load_calibration(task.name, num_samples=len(rows) + 1, data_dir=data_dir)
    with pytest.raises(CalibrationError, match=r"1 evaluated row\(s\) of .* \(index 0 = .*, index zz\)"):
        calibration.refuse_overlap(load_task(task, data_dir))


def test_same_image_with_another_question_is_no_overlap(data_dir: Path) -> None:
    rows = [row | {"question": f"{row['question']} Be brief."} for row in make_rows(TEXTVQA)]
    write_benchmark(data_dir / "calibration", TEXTVQA, rows=rows)
    calibration = load_calibration("textvqa", num_samples=len(rows), data_dir=data_dir)
    calibration.refuse_overlap(load_task(TEXTVQA, data_dir))


# --- shipped data


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_shipped_rows_are_usable_and_apart_from_their_calibration_rows(task: files.Task) -> None:
    data = load_task(task)
    assert 100 <= len(data) <= 200
    pool = load_calibration(task.name, num_samples=256)
    assert len(pool.parts[0]) == 256
    pool.refuse_overlap(data)
    if task.categories:
        assert set(data.frame["category"]) == set(task.categories)


def test_shipped_default_calibration_overlaps_with_nothing() -> None:
    calibration = load_calibration()
    assert [len(part) for part in calibration.parts] == [52, 51, 51, 51, 51]
    for task in TASKS.values():
        calibration.refuse_overlap(load_task(task))


def test_shipped_scienceqa_has_every_subject_in_every_context() -> None:
    data = load_task(SCIENCEQA)
    contexts = {(row["category"], bool(row["hint"]), bool(row["images"])) for row in data.rows()}
    assert {category for category, *_ in contexts} == {"NAT", "SOC", "LAN"}
    for category in ("NAT", "SOC", "LAN"):
        assert {(category, True, False), (category, False, True), (category, False, False)} <= contexts


def test_shipped_data_is_small() -> None:
    assert sum(path.stat().st_size for path in files.SHIPPED_DATA.rglob("*") if path.is_file()) <= 15 * 2**20


def test_take_keeps_order_and_task(data_dir: Path) -> None:
    data = load_task(TEXTVQA, data_dir)
    assert isinstance(data.take([2, 0]), TaskData)
    assert data.take([2, 0]).indices == ("2", "0")
