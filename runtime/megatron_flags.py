"""Megatron's flags without importing Megatron, whose import takes seconds.

`megatron_flags.json` lists those of the pinned megatron-core; `python scripts/list_flags.py --rewrite` writes it from
the installed parser, and a test compares the two.
"""

from __future__ import annotations

import argparse
import json
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("megatron_flags.json")

_ACTIONS: dict[str, Any] = {
    "store": "store",
    "store_true": "store_true",
    "store_false": "store_false",
    "boolean": argparse.BooleanOptionalAction,
}
_TYPES: dict[str, type] = {"int": int, "float": float, "text": str}


@dataclass(frozen=True)
class Flag:
    """One of Megatron's flags, as its parser has it.

    names: all spellings, the usual one first.
    dest: the attribute of the parsed arguments.
    action: what it does with its value; "boolean" has a `--no-` form too.
    type: of one value; "text" is also what Megatron reads with a function of its own (patterns, lists, enumerations).
    nargs: as argparse has it.
    choices: what a value may be.
    default: members of enumerations by their name.
    """

    names: tuple[str, ...]
    dest: str
    action: Literal["store", "store_true", "store_false", "boolean"]
    type: Literal["int", "float", "text"] | None
    nargs: int | str | None
    choices: tuple[Any, ...] | None
    default: Any

    @classmethod
    def of(cls, action: argparse.Action) -> Flag:
        """Describe one action of Megatron's parser.

        Raises:
            TypeError: an action of another kind.
        """
        kinds: dict[type, Any] = {
            argparse._StoreAction: "store",
            argparse._StoreTrueAction: "store_true",
            argparse._StoreFalseAction: "store_false",
            argparse.BooleanOptionalAction: "boolean",
        }
        if type(action) not in kinds:
            raise TypeError(f"{action.option_strings}: {type(action).__name__} isn't known here")
        kind = kinds[type(action)]
        value_type = {int: "int", float: "float"}.get(action.type, "text") if kind == "store" else None  # type: ignore[call-overload]
        choices = None if action.choices is None else tuple(_plain(choice) for choice in action.choices)
        nargs = action.nargs if kind == "store" else None
        return cls(tuple(action.option_strings), action.dest, kind, value_type, nargs, choices, _plain(action.default))

    def add_to(self, parser: ArgumentParser) -> None:
        settings: dict[str, Any] = {"dest": self.dest, "action": _ACTIONS[self.action], "default": self.default}
        if self.type is not None:
            settings |= {"type": _TYPES[self.type], "nargs": self.nargs, "choices": self.choices}
        names = self.names if self.action != "boolean" else self.names[:1]  # argparse makes the --no- form itself
        parser.add_argument(*names, **settings)


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def describe(parser: ArgumentParser) -> list[Flag]:
    """All flags of Megatron's parser besides `--help`, in its order."""
    return [Flag.of(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def write(flags: Iterable[Flag], file: Path) -> None:
    """One flag a line, so that another version of megatron-core shows as a readable difference."""
    lines = ",\n".join(json.dumps(asdict(flag)) for flag in flags)
    file.write_text(f"[\n{lines}\n]\n")


@cache
def megatron_flags() -> tuple[Flag, ...]:
    """The list of the repository."""
    listed: list[dict[str, Any]] = json.loads(FILE.read_text())
    # JSON has lists for tuples.
    tuples = ({name: tuple(each[name]) for name in ("names", "choices") if each[name] is not None} for each in listed)
    return tuple(Flag(**{**each, **changed}) for each, changed in zip(listed, tuples, strict=True))


@cache
def flags_by_name() -> dict[str, Flag]:
    """The same by every spelling."""
    return {name: flag for flag in megatron_flags() for name in flag.names}


def dest_of(flag: str) -> str:
    """argparse's rule for the attribute that holds a flag's value."""
    return flag[2:].replace("-", "_")


def add_megatron_flags(parser: ArgumentParser) -> None:
    """Give a parser all of Megatron's flags, under Megatron's names, types and defaults."""
    for flag in megatron_flags():
        flag.add_to(parser)
