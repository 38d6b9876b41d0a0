"""JSON from outside: what is refused, each with the file and the reason, in bounded time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from models import json_files
from models.json_files import JsonError, read_json, read_object
from models.json_schema import Integer, ListOf, Number, Text, boolean, either, null, problems

REFUSED = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "cut short": (b'{"a": [1, 2', "isn't complete JSON: it ends in the middle"),
    "a word": (b"{\n  oops: 1}", "isn't JSON: line 2, column 3 has 'oops: 1}'"),
    "a comma too many": (b'{"a": 1,}', "isn't JSON: line 1, column"),
    "two values": (b"{} {}", "isn't JSON: line 1, column 4 has '{}'"),
    "no UTF-8": (b'{"a": "\xff"}', "isn't UTF-8 text: byte 7 is 0xff"),
    "not a number": (b'{"a": NaN}', "has NaN, which is no JSON"),
    "infinity": (b'{"a": -Infinity}', "has -Infinity, which is no JSON"),
    "too large a number": (b'{"a": 1e999}', "has a number that isn't finite: 1e999"),
    "too many digits": (b'{"a": ' + b"7" * 5000 + b"}", "has a number of 5,000 digits: 777777777777..."),
    "a key twice": (b'{"a": {"b": 1, "c": 2, "b": 3}}', "has the key 'b' twice in one object"),
    "nested": (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 64 levels"),
    "nested a little too deep": (b"[" * 66 + b"]" * 66, "nested deeper than 64 levels"),
    "nested objects": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested deeper than 64 levels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_file_and_the_reason(tmp_path: Path, case: str) -> None:
    content, reason = REFUSED[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(JsonError) as refused:
        read_json(path)
    assert str(refused.value).startswith(f"{path}: ") and reason in refused.value.reason
    assert time.monotonic() - begin < 5


def test_real_content_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, "é", null, true], "model_max_length": 1000000000000000019884624838656, "b": {}}')
    assert read_object(path)["model_max_length"] == 1000000000000000019884624838656
    path.write_text("[" * 64 + "]" * 64)
    read_json(path)
    with pytest.raises(JsonError, match=r"holds a list where an object \{\.\.\.\} is expected"):
        read_object(path)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, folder, loop = (tmp_path / name for name in ("pipe", "folder", "loop"))
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    for path, reason in (
        (pipe, "is a pipe, not a regular file"),
        (folder, "is a folder, not a regular file"),
        (Path("/dev/zero"), "is a device, not a regular file"),
        (tmp_path / "none", "No such file"),
        (loop, "symbolic links"),
    ):
        with pytest.raises(JsonError, match=reason):
            read_json(path)
    (tmp_path / "large").write_text("[" + " " * 100 + "]")
    monkeypatch.setattr(json_files, "LARGEST", 100)
    with pytest.raises(JsonError, match="has more than 100 bytes"):
        read_json(tmp_path / "large")


@pytest.mark.parametrize(
    ("check", "right", "wrong", "expected"),
    [
        (Integer(1, 10), [1, 10], [0, 11, True, 1.0, "1", None, [1]], "a whole number from 1 to 10"),
        (Number(0, 1), [0, 1, 0.5], [-0.1, 1.1, True, "0", None], "a number from 0 up to 1"),
        (Number(0, 1, inclusive=False), [1, 0.5], [0, float("nan")], "a number above 0 up to 1"),
        (Text(3), ["", "abc"], ["abcd", 1, None], "a text of up to 3"),
        (boolean, [True, False], [1, 0, "true", None], "true or false"),
        (ListOf(Integer(0, 5), 2, 2), [[0, 5]], [[0], [0, 6], [0, 1, 2], 7, None], "a list of 2 values, each"),
        (either(boolean, null), [True, None], [0, "no"], "true or false or null"),
    ],
)
def test_values_by_kind_and_range(check: object, right: list, wrong: list, expected: str) -> None:
    for value in right:
        assert problems({"key": value}, {"key": check}) == []
    for value in wrong:
        (problem,) = problems({"key": value}, {"key": check}, "section.")
        assert problem.startswith("section.key is ") and f"; it has to be {expected}" in problem


def test_a_key_that_has_to_be_there() -> None:
    assert problems({}, {"a": boolean}, "x.", required=("a",)) == ["x.a is missing"]
