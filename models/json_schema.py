"""What the values of a JSON file may be: kinds, ranges, choices. Every problem names the key.

A schema is a mapping of keys to checks; keys that it doesn't name are another program's, and stay. `problems` walks
a file's content by one, and `Checked` values are then safe to compute with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from models.json_files import kind

Check = Callable[[Any], str | None]
"""A value -> what it has to be instead ("a whole number from 1 to 10"); None: it is right."""


@dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`; true and 1.0 aren't."""

    low: int
    high: int

    def __call__(self, value: Any) -> str | None:
        if type(value) is int and self.low <= value <= self.high:
            return None
        return f"a whole number from {self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, `low` itself only if `inclusive`."""

    low: float
    high: float
    inclusive: bool = True

    def __call__(self, value: Any) -> str | None:
        if type(value) in (int, float) and self.low <= value <= self.high and (self.inclusive or value > self.low):
            return None
        return f"a number {'from' if self.inclusive else 'above'} {self.low:g} up to {self.high:g}"


@dataclass(frozen=True)
class Text:
    """A text of at most `longest` characters."""

    longest: int = 10_000

    def __call__(self, value: Any) -> str | None:
        return None if isinstance(value, str) and len(value) <= self.longest else f"a text of up to {self.longest:,}"


@dataclass(frozen=True)
class ListOf:
    """A list of `shortest` to `longest` values that `of` accepts."""

    of: Check
    shortest: int = 0
    longest: int = 10_000

    def __call__(self, value: Any) -> str | None:
        wrong = [problem for entry in (value if isinstance(value, list) else ()) if (problem := self.of(entry))]
        if isinstance(value, list) and self.shortest <= len(value) <= self.longest and not wrong:
            return None
        number = str(self.shortest) if self.shortest == self.longest else f"{self.shortest} to {self.longest:,}"
        each = self.of(None)  # no check of a list's values takes null
        return f"a list of {number} values, each {each}"


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def either(*checks: Check) -> Check:
    """A value that any of them accepts."""

    def check(value: Any) -> str | None:
        wrong = [problem for each in checks if (problem := each(value)) is not None]
        return " or ".join(wrong) if len(wrong) == len(checks) else None

    return check


def null(value: Any) -> str | None:
    return None if value is None else "null"


def mapping(value: Any) -> str | None:
    return None if isinstance(value, dict) else "an object"


def problems(
    content: Mapping[str, Any], schema: Mapping[str, Check], prefix: str = "", required: Iterable[str] = ()
) -> list[str]:
    """What is wrong with a file's values, a sentence for each key; empty when all fit.

    Args:
        prefix: the path of the object in its file, with a dot at its end ("text_config.").
        required: keys that have to be there.
    """
    found = [f"{prefix}{key} is missing" for key in required if key not in content]
    for key, check in schema.items():
        if key in content and (expected := check(content[key])) is not None:
            found.append(f"{prefix}{key} is {shown(content[key])}; it has to be {expected}")
    return found


def shown(value: Any) -> str:
    """A value in a message: short, and with its kind where it is a container."""
    if isinstance(value, dict | list):
        return f"{kind(value)} of {len(value)} entries"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
