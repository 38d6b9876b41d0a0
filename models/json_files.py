"""Reading a JSON file from outside: bounded, unambiguous, and named in every error.

Every JSON file that a HuggingFace folder or a checkpoint brings along comes through `read_json`: config.json, the
index, tokenizer and processor files. Python's own reader takes NaN, keys given twice, numbers of any length, a pipe
that never ends, and answers deep nesting with RecursionError.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LARGEST = 2**26  # bytes; the largest tokenizers have 35 MB
DEEPEST = 64  # nested objects and lists; real files have at most ten
_DIGITS = 40  # of a number; tokenizers write 10^30 for "no limit"


class JsonError(ValueError):
    """A JSON file that can't be read; `reason` is the message without the file's path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        JsonError: no such file, no regular file (a pipe would be waited for without end), more than `LARGEST` bytes,
            no UTF-8, no JSON, deeper than `DEEPEST`, a key given twice, a number that is infinite or absurdly long.
    """
    text = _text(path)
    try:
        content = json.loads(
            text,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_no_constant,
            object_pairs_hook=_without_repetitions,
        )
    except json.JSONDecodeError as error:
        raise JsonError(path, _where(text, error)) from None
    except RecursionError:
        raise JsonError(path, f"nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise JsonError(path, str(error)) from None
    if _is_deeper(content, DEEPEST):
        raise JsonError(path, f"nested deeper than {DEEPEST} levels")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` of a file that has to hold an object.

    Raises:
        JsonError: as `read_json`; or another kind of value.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise JsonError(path, f"holds {kind(content)} where an object {{...}} is expected")
    return content


def regular_file_problem(path: Path) -> str | None:
    """Why a path isn't a file that can be read to its end; None if it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return error.strerror or str(error)
    return None if stat.S_ISREG(mode) else f"is {_file_kind(mode)}, not a regular file"


def kind(value: Any) -> str:
    """A JSON value's kind, in words for a message."""
    if value is None:
        return "null"
    kinds = ((bool, "a boolean"), (int, "an integer"), (float, "a number"), (str, "a text"), (list, "a list"))
    return next((name for type_, name in kinds if isinstance(value, type_)), "an object")


def _text(path: Path) -> str:
    if problem := regular_file_problem(path):
        raise JsonError(path, problem)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise JsonError(path, error.strerror or str(error)) from error
    if len(content) > LARGEST:
        raise JsonError(path, f"has more than {LARGEST:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise JsonError(path, f"isn't UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from None


def _file_kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "something else")


def _where(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip():
        return "is empty"
    if error.pos >= len(text.rstrip()):
        return "isn't complete JSON: it ends in the middle"
    found = text[error.pos : error.pos + 20].splitlines()[0]
    return f"isn't JSON: line {error.lineno}, column {error.colno} has {found!r}"


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"has a number of {len(text):,} digits: {text[:12]}...")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"has a number that isn't finite: {text[:20]}")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"has {text}, which is no JSON")


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"has the key {twice!r} twice in one object")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    """Level by level, since a recursive look would be what it is there to prevent."""
    level: list[Any] = [content]
    for _ in range(levels + 1):
        level = [child for value in level if isinstance(value, dict | list) for child in _children(value)]
        if not level:
            return False
    return True


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
