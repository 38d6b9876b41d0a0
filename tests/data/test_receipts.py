"""Receipts: the same from the same seed, independent values, CORD-v2's schema, safe to write at once."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest
from PIL import Image, ImageDraw

from data.cord_v2 import CordV2
from data.images import open_image
from data.receipts import dataset as receipts
from data.receipts.dataset import Receipts, ensure_receipts, make_row
from data.receipts.drawing import draw, turn
from data.receipts.values import (
    CURRENCIES,
    DISHES,
    MAX_ITEMS,
    PAYMENTS,
    SHOPS,
    Item,
    Receipt,
    ask,
    draw_receipt,
)

SIZES = {"train": 6, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_receipts(tmp_path_factory.mktemp("receipts"), sizes=SIZES)


# Values


def flat(receipt: Receipt) -> dict[str, Any]:
    first = receipt.items[0]
    return {
        "shop": receipt.shop,
        "currency": receipt.currency,
        "payment": receipt.payment,
        "items": len(receipt.items),
        "total's first digit": receipt.total // 100,
        "total's last digit": receipt.total % 10,
        "dish": first.name,
        "count": first.count,
        "price's last digit": first.price % 10,
    }


def chi_square_z(counts: list[int], cells: int) -> float:
    """How many standard deviations a table of counts is off uniform (Wilson-Hilferty)."""
    expected = sum(counts) / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts) + expected * (cells - len(counts))
    freedom = cells - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_values_are_uniform_and_independent() -> None:
    rows = [flat(draw_receipt(Random(f"test/{index}"))) for index in range(20_000)]
    kinds = {
        "shop": len(SHOPS), "currency": len(CURRENCIES), "payment": len(PAYMENTS), "items": MAX_ITEMS,
        "total's first digit": 9, "total's last digit": 10, "dish": len(DISHES), "count": 9,
        "price's last digit": 10,
    }  # fmt: skip
    names = list(kinds)
    for name in names:
        counts = Counter(row[name] for row in rows)
        assert len(counts) == kinds[name]
        assert abs(chi_square_z(list(counts.values()), kinds[name])) < 5, name
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            pairs = Counter((row[one], row[other]) for row in rows)
            assert abs(chi_square_z(list(pairs.values()), kinds[one] * kinds[other])) < 5, (one, other)


def test_questions_do_not_depend_on_values() -> None:
    parses = [draw_receipt(Random(index)).ground_truth() for index in range(50)]
    for seed in range(50):
        assert len({ask(parse, Random(seed)).question for parse in parses}) == 1


def test_an_answer_by_hand() -> None:
    receipt = Receipt("Comet", "JPY", "card", (Item("Tea", 2, 47), Item("Rice", 1, 90)), 532)
    parse = receipt.ground_truth()
    answers = {
        "shop": '{"shop":"Comet"',
        "total": '{"total":"532"',
        "items": '{"items":"2"',
        "last item": '{"last item":{"nm":"Rice","cnt":"1","price":"90"}',
    }
    seen = set()
    for seed in range(200):
        asked = ask(parse, Random(seed))
        field = next((name for name in answers if asked.answer.startswith(f'{{"{name}"')), None)
        if field is not None:
            assert asked.answer.startswith(answers[field]) and field in asked.question
            seen.add(field)
    assert seen == set(answers)


def leaves(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    entries = content.values() if isinstance(content, dict) else content
    return [leaf for entry in entries for leaf in leaves(entry)]


def test_value_spans_are_the_answers_strings() -> None:
    for index in range(300):
        rng = Random(index)
        asked = ask(draw_receipt(rng).ground_truth(), rng)
        assert [asked.answer[start:end] for start, end in asked.value_spans] == leaves(json.loads(asked.answer))


# Pictures


def test_rows_are_determined_by_split_index_and_seed() -> None:
    row = make_row("train", 3, seed=0)
    assert make_row("train", 3, seed=0) == row
    others = [make_row("train", 4, seed=0), make_row("train", 3, seed=1), make_row("test", 3, seed=0)]
    for other in others:
        assert other["image"]["bytes"] != row["image"]["bytes"]
        assert json.loads(other["ground_truth"])["gt_parse"] != json.loads(row["ground_truth"])["gt_parse"]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: Receipt("Delta", r.currency, r.payment, r.items, r.total),
        lambda r: Receipt(r.shop, "EUR", r.payment, r.items, r.total),
        lambda r: Receipt(r.shop, r.currency, "points", r.items, r.total),
        lambda r: Receipt(r.shop, r.currency, r.payment, r.items, 999),
        lambda r: Receipt(r.shop, r.currency, r.payment, (Item("Cake", 3, 99),), r.total),
    ],
)
def test_every_value_shows(change: Callable[[Receipt], Receipt]) -> None:
    receipt = Receipt("Comet", "JPY", "card", (Item("Cake", 2, 47),), 532)
    one, other = draw(receipt, Random(0)).image, draw(change(receipt), Random(0)).image
    assert one.size == other.size and one.tobytes() != other.tobytes()


def test_sizes_vary_and_stay_small() -> None:
    images = [draw(draw_receipt(Random(i)), Random(i)).image for i in range(40)]
    assert all(96 <= image.width <= 144 and 120 <= image.height <= 256 for image in images)
    grids = {(round(image.width / 32), round(image.height / 32)) for image in images}
    assert len(grids) >= 4
    assert {image.mode for image in images} == {"RGB"}


@pytest.mark.parametrize("degrees", [-4.0, 2.5])
def test_words_turn_with_the_picture(degrees: float) -> None:
    image = Image.new("L", (141, 200))
    ImageDraw.Draw(image).rectangle((29, 149, 31, 151), fill=255)  # around the point (30.5, 150.5)
    turned = image.rotate(degrees, Image.Resampling.BICUBIC)
    bright = [(i % 141 + 0.5, i // 141 + 0.5, value) for i, value in enumerate(turned.tobytes()) if value]
    weight = sum(value for _, _, value in bright)
    centre = tuple(sum(point[axis] * point[2] for point in bright) / weight for axis in (0, 1))
    assert turn((30.5, 150.5), image.size, degrees) == pytest.approx(centre, abs=0.2)


# Files


def test_schema_is_cord_v2s(folder: Path) -> None:
    file = folder / "data" / "train-00000-of-00001.parquet"
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(folder / "cache"))
    assert rows.features == {"image": datasets.Image(), "ground_truth": datasets.Value("string")}
    assert len(rows) == SIZES["train"]
    truth = json.loads(rows[0]["ground_truth"])
    assert list(truth) == ["gt_parse", "meta", "valid_line", "roi", "repeating_symbol", "dontcare"]
    image = rows[0]["image"]
    assert truth["meta"]["image_size"] == {"width": image.width, "height": image.height}
    line = truth["valid_line"][0]
    assert list(line) == ["words", "category", "group_id", "sub_group_id"]
    assert set(line["words"][0]) == {"quad", "is_key", "row_id", "text"}
    assert set(line["words"][0]["quad"]) == {f"{axis}{corner}" for axis in "xy" for corner in range(1, 5)}
    printed = {word["text"].removeprefix("x") for line in truth["valid_line"] for word in line["words"]}
    values = leaves({key: value for key, value in truth["gt_parse"].items() if key != "total"})
    assert set(values) | {truth["gt_parse"]["total"]["total_price"]} <= printed
    for line in truth["valid_line"]:
        corners = line["words"][0]["quad"]
        assert all(-3 <= value <= 260 for value in corners.values())


def test_conversations(folder: Path) -> None:
    rows = Receipts(folder, "train", questions=3)
    assert len(rows) == 3 * SIZES["train"]
    with pytest.raises(IndexError, match="18 conversations, not 18"):
        rows[18]
    first, again = rows[1], rows[1]
    assert first.id == "receipts/train/1" and first.messages[1] == again.messages[1]
    stored = io.BytesIO(make_row("train", 1, seed=0)["image"]["bytes"])
    other = rows[1 + SIZES["train"]]  # the same receipt, asked differently
    for conversation in (first, other):
        image = open_image(conversation.messages[0]["content"][0]["image"])
        assert image.tobytes() == Image.open(stored).tobytes()
    questions = {rows[1 + variant * SIZES["train"]].messages[0]["content"][1]["text"] for variant in range(3)}
    assert len(questions) > 1
    assert len(Receipts(folder, "validation")) == SIZES["validation"]


def test_cord_v2_reads_the_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = CordV2(str(folder), "validation")
    assert len(rows) == SIZES["validation"]
    assert rows[0].messages[1]["content"].startswith("<s_total><s_total_price>")


def test_folders_are_keyed_by_generator_seed_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"train": 1}
    first = ensure_receipts(tmp_path, sizes=small)
    written = (first / "data" / "train-00000-of-00001.parquet").stat().st_mtime_ns
    assert ensure_receipts(tmp_path, sizes=small) == first
    assert (first / "data" / "train-00000-of-00001.parquet").stat().st_mtime_ns == written
    folders = {first, ensure_receipts(tmp_path, sizes=small, seed=1), ensure_receipts(tmp_path, sizes={"train": 2})}
    monkeypatch.setattr(receipts, "generator_version", lambda: "changed")
    assert len(folders | {ensure_receipts(tmp_path, sizes=small)}) == 4


def test_many_processes_write_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=ensure_receipts, args=(tmp_path,), kwargs={"sizes": SIZES}) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert folders == [ensure_receipts(tmp_path, sizes=SIZES)]  # nothing half-written is left


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without locks: another process finishes while this one draws."""
    write_split = receipts._write_split

    def overtaken(file: Path, *rest: Any) -> None:
        write_split(file, *rest)
        name = f"receipts-{receipts.generator_version()}-seed0-train1"
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "theirs").touch()

    monkeypatch.setattr(receipts, "_write_split", overtaken)
    folder = ensure_receipts(tmp_path, sizes={"train": 1})
    assert [path.name for path in (folder / "data").iterdir()] == ["theirs"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(receipts, "_write_split", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ensure_receipts(tmp_path, sizes={"train": 1})
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
