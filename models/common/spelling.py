"""Numbers of an architecture with their spellings elsewhere, in the metadata of dataclass fields.

    hidden_size: int = number("hidden_size", "--hidden-size", required=True)

says the key of `config.json` and Megatron's flag once; writing and reading either is a loop over the fields.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Spelling:
    """How one number is spelled outside of its dataclass.

    hf: its key in the section of `config.json` that the dataclass stands for, with dots between levels; None: none.
    flag: the flag that gives it; None: it has none.
    dest: the attribute of the parsed arguments that holds it.
    only: the kind of decoder that has it; None: both have.
    required: a `config.json` without it is refused.
    read: a value from outside -> the field's type.
    """

    hf: str | None
    flag: str | None
    dest: str | None
    only: Literal["dense", "moe"] | None
    required: bool
    read: Callable[[Any], Any]

    def applies(self, is_moe: bool) -> bool:
        return self.only is None or (self.only == "moe") == is_moe


def number(
    hf: str | None,
    flag: str | None = None,
    default: Any = MISSING,
    *,
    dest: str | None = None,
    only: Literal["dense", "moe"] | None = None,
    required: bool = False,
    read: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """A dataclass field with its `Spelling`; `dest` is Megatron's rule for the flag unless given."""
    spelling = Spelling(hf, flag, dest or (flag and flag[2:].replace("-", "_")), only, required, read)
    return field(default=default, metadata={"spelling": spelling})


def spellings(described: Any) -> Iterator[tuple[str, Spelling]]:
    """(field's name, spelling) of a dataclass or an instance of one."""
    return (
        (each.name, each.metadata["spelling"]) for each in dataclasses.fields(described) if "spelling" in each.metadata
    )


def words(value: Any) -> list[str]:
    """A flag's value as the command line has it."""
    return [str(each) for each in (value if isinstance(value, tuple) else (value,))]


def overridden(numbers: Any, args: Namespace) -> Any:
    """A dataclass of numbers with those replaced that a flag gives; the flags' defaults are None."""
    given = {name: getattr(args, s.dest) for name, s in spellings(numbers) if s.dest is not None}
    return dataclasses.replace(numbers, **{name: value for name, value in given.items() if value is not None})


def section_of(numbers: Any) -> dict[str, Any]:
    """A dataclass of numbers as a section of `config.json`; None isn't written."""
    section: dict[str, Any] = {}
    for name, spelling in spellings(numbers):
        value = getattr(numbers, name)
        if spelling.hf is None or value is None:
            continue
        *levels, key = spelling.hf.split(".")
        target = section
        for level in levels:
            target = target.setdefault(level, {})
        target[key] = list(value) if isinstance(value, tuple) else value
    return section


def numbers_of(described: type, section: Mapping[str, Any], is_moe: bool) -> dict[str, Any]:
    """What a section of `config.json` says of a dataclass of numbers; absent keys are left to its defaults."""
    numbers = {}
    for name, spelling in spellings(described):
        if spelling.hf is None or not spelling.applies(is_moe):
            continue
        *levels, key = spelling.hf.split(".")
        found = section
        for level in levels:
            found = found.get(level, {})
        if key in found:
            numbers[name] = spelling.read(found[key])
    return numbers
