"""CORD-v2's questions and answers, and what is said about malformed rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from data.cord_v2 import QUESTION, CordV2, json_to_tokens
from data.images import open_image

PARSE = {
    "menu": [{"nm": "Nasi Campur", "cnt": "1 x", "price": "75,000"}, {"nm": "Es Teh", "price": "12,000"}],
    "sub_total": {"subtotal_price": "87,000"},
    "total": {"total_price": "95,700", "cashprice": "100,000"},
}
# Keys in descending order at every level, list entries apart by <sep/>.
ANSWER = (
    "<s_total><s_total_price>95,700</s_total_price><s_cashprice>100,000</s_cashprice></s_total>"
    "<s_sub_total><s_subtotal_price>87,000</s_subtotal_price></s_sub_total>"
    "<s_menu><s_price>75,000</s_price><s_nm>Nasi Campur</s_nm><s_cnt>1 x</s_cnt>"
    "<sep/><s_price>12,000</s_price><s_nm>Es Teh</s_nm></s_menu>"
)


def table(ground_truths: list[Any], image: Any = "image") -> datasets.Dataset:
    image = Image.new("RGB", (48, 64), (250, 0, 0)) if image == "image" else image
    features = datasets.Features({"image": datasets.Image(), "ground_truth": datasets.Value("string")})
    rows = [{"image": image, "ground_truth": truth} for truth in ground_truths]
    return datasets.Dataset.from_list(rows, features=features)


def parquet(folder: Path, ground_truths: list[Any], split: str = "train", **columns: Any) -> str:
    """A folder laid out as the hub's repository."""
    file = folder / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table(ground_truths, **columns).to_parquet(str(file))
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_answers_by_hand() -> None:
    assert json_to_tokens(PARSE) == ANSWER
    assert json_to_tokens({"text_sequence": "as it is"}) == "as it is"
    assert json_to_tokens({"a": 3}) == "<s_a>3</s_a>"


def test_reads_a_clone_of_the_repository(tmp_path: Path) -> None:
    truth = json.dumps({"gt_parse": PARSE, "meta": {"split": "train"}, "valid_line": [], "roi": {}})
    path = parquet(tmp_path, [truth, truth])
    parquet(tmp_path, [truth], "validation")
    rows = CordV2(path, "train")
    assert (len(rows), len(CordV2(path, "validation"))) == (2, 1)
    conversation = rows[1]
    assert conversation.id == "cord_v2/train/1"
    user, assistant = conversation.messages
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert open_image(user["content"][0]["image"]).size == (48, 64)
    assert user["content"][1]["text"] == QUESTION == "Describe this image."
    assert assistant == {"role": "assistant", "content": ANSWER}


def test_reads_what_save_to_disk_wrote(tmp_path: Path) -> None:
    truth = json.dumps({"gt_parses": [PARSE]})
    datasets.DatasetDict({"train": table([truth])}).save_to_disk(str(tmp_path / "saved"))
    assert CordV2(str(tmp_path / "saved"), "train")[0].messages[1]["content"] == ANSWER
    with pytest.raises(ValueError, match="split test"):
        CordV2(str(tmp_path / "saved"), "test")


@pytest.mark.parametrize(
    ("truth", "key"),
    [
        ("{", "'ground_truth': not JSON"),
        (None, "'ground_truth': not JSON"),
        ("[1]", "'ground_truth': a JSON list"),
        ('{"meta": {}}', "'ground_truth.gt_parse'"),
        ('{"gt_parse": "text"}', "'ground_truth.gt_parse'"),
        ('{"gt_parses": ["text"]}', "'ground_truth.gt_parses'"),
    ],
)
def test_a_malformed_record_is_named(truth: str | None, key: str, tmp_path: Path) -> None:
    path = parquet(tmp_path, [json.dumps({"gt_parse": PARSE}), truth])
    with pytest.raises(ValueError, match=f"{path}, split train, row 1, key {key}"):
        CordV2(path, "train")[1]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (None, r"gt_parse\.menu\[1\]\.nm"),
        (True, r"gt_parse\.menu\[1\]\.nm"),
        ("a</s_nm>", r"gt_parse\.menu\[1\]\.nm: a</s_nm> reads like"),
        (float("nan"), r"gt_parse\.menu\[1\]\.nm: NaN"),
        ("<sep/>", r"gt_parse\.menu\[1\]\.nm: <sep/> reads like"),
        ({"a><s_b": "x"}, r"gt_parse\.menu\[1\]\.nm: key 'a><s_b'"),
        ({"": "x"}, r"gt_parse\.menu\[1\]\.nm: key ''"),
    ],
)
def test_a_value_that_is_none_is_named(value: Any, place: str, tmp_path: Path) -> None:
    """And never trained as the word "None"."""
    truth = json.dumps({"gt_parse": {"menu": [{"nm": "Tea"}, {"nm": value}]}})
    path = parquet(tmp_path, [truth])
    with pytest.raises(ValueError, match=f"{path}, split train, row 0, key 'ground_truth': {place}"):
        CordV2(path, "train")[0]


def test_a_folder_without_splits_is_refused(tmp_path: Path) -> None:
    table([json.dumps({"gt_parse": PARSE})]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="train, validation and test would be the same rows"):
        CordV2(str(tmp_path / "saved"), "train")


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path, [json.dumps({"gt_parse": PARSE})], image=None)
    with pytest.raises(ValueError, match="split train, row 0, key 'image'"):
        CordV2(path, "train")[0]


def test_a_list_of_images_is_named(tmp_path: Path) -> None:
    """Not the first one trained, nor the column's type a riddle at the start."""
    features = datasets.Features({"image": datasets.List(datasets.Image()), "ground_truth": datasets.Value("string")})
    row = {"image": [Image.new("RGB", (8, 8))] * 2, "ground_truth": json.dumps({"gt_parse": PARSE})}
    datasets.DatasetDict({"train": datasets.Dataset.from_list([row], features=features)}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"split train, row 0, key 'image': .* expected one image"):
        CordV2(str(tmp_path), "train")[0]


def test_unreadable_datasets_are_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "one", [json.dumps({"gt_parse": PARSE})])
    with pytest.raises(ValueError, match=r"split test.*--dataset-path"):
        CordV2(path, "test")
    with pytest.raises(ValueError, match="--dataset-path"):
        CordV2(str(tmp_path / "nowhere"), "train")
    other = datasets.Dataset.from_dict({"image": [1]})
    datasets.DatasetDict({"train": other}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no column 'ground_truth'"):
        CordV2(str(tmp_path / "other"), "train")
