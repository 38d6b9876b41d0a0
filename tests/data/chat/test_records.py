"""Files by row: offsets, blanks, packed files, tables; and splits that never change."""

from __future__ import annotations

import gzip
import json
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from data.bad_sample import BadSample, Reason
from data.chat import records
from data.chat.records import JsonLines, open_file
from data.chat.splits import SplitRows, canonical, split_rows

ROWS = [{"text": "a"}, {"text": ["b"]}, {"text": "é漢"}, {"n": 1, "text": None}]  # no schema fits them all


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def arguments(tmp_path: Path, *paths: Path | str, split: str | None = None) -> Namespace:
    return Namespace(
        dataset_path=[str(path) for path in paths],
        data_cache_path=str(tmp_path / "cache"),
        split=split,
        num_workers=0,
        dataset_provider="chat",
    )


def all_rows(found: SplitRows) -> list[Any]:
    return [rows[number] for rows, number in map(found.find, range(len(found)))]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n  \n\t"])
def test_lines_are_found_in_any_chunks(chunk: int, end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n \n\n".join(lines([row])[:-1] for row in ROWS) + end)
    found = JsonLines(path, tmp_path / "cache")
    assert [found[index] for index in range(len(found))] == ROWS
    assert found.place(2) == f"{path}:2"


def test_an_index_is_made_once_and_anew_for_other_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS))
    first = JsonLines(path, tmp_path / "cache")
    monkeypatch.setattr(records, "_index", lambda path: pytest.fail("indexed again"))
    assert JsonLines(path, tmp_path / "cache").fingerprint == first.fingerprint
    monkeypatch.undo()
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(lines(ROWS))
    assert JsonLines(copy, tmp_path / "cache").fingerprint == first.fingerprint  # of the content
    path.write_bytes(lines(ROWS[:2]))
    assert JsonLines(path, tmp_path / "cache").fingerprint != first.fingerprint
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "cache").glob("*.npy")} == {"0o644"}


def test_a_broken_line_loses_nothing_but_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n\xff\xfe\n' + b"[" * 100_000 + b'\n{"text": "b"}')
    found = JsonLines(path, tmp_path / "cache")
    assert (found[0], found[4]) == ({"text": "a"}, {"text": "b"})
    for index in (1, 2, 3):
        with pytest.raises(BadSample, match=f"rows.jsonl:{index}: not JSON") as caught:
            found[index]
        assert caught.value.reason == Reason.ROW


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz", "rows.jsonl.gz"])
def test_arrays_and_gzip_are_unpacked_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = lines(ROWS) if "jsonl" in name else json.dumps(ROWS, indent=1).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for _ in range(2):
        found = open_file(path, tmp_path / "cache")
        assert [found[index] for index in range(len(found))] == ROWS
        assert (found.folder, found.place(1)) == (tmp_path, f"{path}:1")
        monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: pytest.fail("unpacked again"))


def test_tables_keep_their_images_undecoded(tmp_path: Path) -> None:
    picture = Image.new("RGB", (48, 64), (9, 9, 9))
    rows = [{"text": "a", "images": [picture]}, {"text": "b", "images": []}]
    features = datasets.Features({"text": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(tmp_path / "train.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "train.parquet", tmp_path / "saved"):
        first, second = all_rows(split_rows(arguments(tmp_path, path), "train"))
        assert first["text"] == "a" and first["images"][0]["bytes"][:4] == b"\x89PNG"
        assert second == {"text": "b", "images": []}


def test_named_splits(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("train-0.jsonl", "train-1.jsonl", "validation.jsonl", "test/part.jsonl", ".hidden.jsonl", "readme.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines([{"text": name}]))
    found = {
        split: all_rows(split_rows(arguments(tmp_path, folder), split)) for split in ("train", "validation", "test")
    }
    assert found == {
        "train": [{"text": "train-0.jsonl"}, {"text": "train-1.jsonl"}],
        "validation": [{"text": "validation.jsonl"}],
        "test": [{"text": "test/part.jsonl"}],
    }
    args = arguments(tmp_path, folder / "train-*.jsonl", folder / "validation.jsonl")
    assert [len(split_rows(args, split)) for split in ("train", "validation", "test")] == [2, 1, 0]
    with pytest.raises(ValueError, match=r"the data has splits of its own \(test, train, validation\)"):
        split_rows(arguments(tmp_path, folder, split="98,1,1"), "train")


def test_split_is_by_content_and_for_ever(tmp_path: Path) -> None:
    rows = [{"text": str(number), "n": number} for number in range(2000)]
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    args = arguments(tmp_path, tmp_path / "rows.jsonl", split="90,5,5")
    found = {split: all_rows(split_rows(args, split)) for split in ("train", "validation", "test")}
    assert sorted(row["n"] for split in found.values() for row in split) == list(range(2000))
    assert [len(split) for split in found.values()] == [1806, 95, 99]  # as they have always been
    assert [row["n"] for row in found["test"][:3]] == [20, 39, 82]
    other = [*random.Random(0).sample(rows, 2000), {"text": "new"}]
    (tmp_path / "other.jsonl").write_bytes(lines([dict(reversed(row.items())) for row in other]))
    args = arguments(tmp_path, tmp_path / "other.jsonl", split="90,5,5")
    test = all_rows(split_rows(args, "test"))
    assert {row["n"] for row in test if "n" in row} == {row["n"] for row in found["test"]}
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'


def test_without_split_everything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    args = arguments(tmp_path, tmp_path / "rows.jsonl")
    assert [len(split_rows(args, split)) for split in ("train", "validation", "test")] == [4, 0, 0]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.jsonl", "no such file or folder"),
        ("https://example.com/rows.jsonl", "training reads no network"),
        ("empty", "no file in it ends with"),
        ("none-*.jsonl", "no file has such a name"),
        ("rows.csv", "expected a file that ends with"),
        ("broken.parquet", "broken.parquet"),
        ("broken.json.gz", "broken.json.gz"),
        ("broken.json", "broken.json"),
    ],
)
def test_paths_that_cannot_work_are_refused(path: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, content in (
        ("rows.csv", "a,b"),
        ("broken.parquet", "x"),
        ("broken.json.gz", "x"),
        ("broken.json", "[1,"),
    ):
        (tmp_path / name).write_text(content)
    given = path if "://" in path else str(tmp_path / path)
    with pytest.raises(ValueError, match=f"--dataset-path .*{said}"):
        split_rows(arguments(tmp_path, given), "train")


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0"])
def test_splits_that_are_none_are_refused(split: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(ValueError, match="--split"):
        split_rows(arguments(tmp_path, tmp_path / "rows.jsonl", split=split), "train")


def test_memory_is_the_index(tmp_path: Path) -> None:
    """16 bytes a line, mapped from the file: processes share them."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text":"a"}\n' * 200_000)
    found = JsonLines(path, tmp_path / "cache")
    assert len(found) == 200_000 and found[199_999] == {"text": "a"}
    (index,) = (tmp_path / "cache").glob("lines-*.npy")
    assert index.stat().st_size < 16 * 200_000 + 1000
    assert isinstance(found._spans, np.memmap)
