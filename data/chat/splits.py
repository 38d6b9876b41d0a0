"""What `--dataset-path` names, and which of its rows are train, validation and test.

A file or folder whose name says its split ("train.jsonl", "data/validation-00000.parquet"), a `DatasetDict` folder
and a hub name have named splits. Rows without one are all trained, or cut by `--split 98,1,1`: a row's place is the
SHA-256 of its canonical JSON, so it stays in its split whatever is added, moved or renamed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
from argparse import Namespace
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np

from data.bad_sample import BadSample
from data.cache import cache_folder, locked, published
from data.chat.records import SUFFIXES, ArrowRows, Rows, open_file
from data.conversation import Split
from data.workers import Workers

_SPLITS: tuple[Split, ...] = get_args(Split)
_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
_NAMED = re.compile(rf"({'|'.join(_NAMES)})([-_.\d].*)?", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Part:
    """Rows of a source that belong to a split.

    chosen: [rows of the split] their numbers, ascending; None for all.
    """

    rows: Rows
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.chosen is None else len(self.chosen)


class SplitRows:
    """The rows of one split over all sources.

    Attributes:
        fingerprint: changes with the rows and their order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._starts = [0, *accumulate(len(part) for part in self._parts)]
        content = [
            part.rows.fingerprint
            + (hashlib.sha256(part.chosen.tobytes()).hexdigest() if part.chosen is not None else "")
            for part in self._parts
        ]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def find(self, index: int) -> tuple[Rows, int]:
        """The source of a row, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"{len(self)} rows, not {index}")
        number = bisect_right(self._starts, index) - 1
        part, inside = self._parts[number], index - self._starts[number]
        return part.rows, inside if part.chosen is None else int(part.chosen[inside])


def split_rows(args: Namespace, split: Split) -> SplitRows:
    """The rows of a split of `--dataset-path`.

    Raises:
        ValueError: a path that isn't there or can't be read, no training rows, or `--split` for data with splits of
            its own.
    """
    if not args.dataset_path:
        raise ValueError("--dataset-provider chat: needs --dataset-path FILE, FOLDER, GLOB or HUB_NAME")
    cache = cache_folder(args)
    found = [entry for path in args.dataset_path for entry in _sources(path, cache)]
    names = Counter(Path(rows.name).resolve() for _, rows in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"--dataset-path: {twice[0]} is named twice, so its rows would count twice; name it once")
    named = {name for name, _ in found if name is not None}
    if args.split is None:
        return SplitRows([Part(rows) for name, rows in found if (name or "train") == split])
    if named - {"train"}:
        raise ValueError(
            f"--split {args.split}: the data has splits of its own ({', '.join(sorted(named))}); leave it out"
        )
    bounds = _bounds(args.split)
    number = _SPLITS.index(split)
    return SplitRows(
        [Part(rows, _chosen(rows, bounds[number], bounds[number + 1], cache, args.num_workers)) for _, rows in found]
    )


def _sources(path: str, cache: Path) -> list[tuple[Split | None, Rows]]:
    """Everything that one `--dataset-path` names, each with its split's name if it has one."""
    if not path:
        raise ValueError("--dataset-path: an empty name; give FILE, FOLDER, GLOB or HUB_NAME")
    place = Path(path).expanduser()
    if place.is_file():
        return [(_split_of(place), open_file(place, cache))]
    if place.is_dir():
        return _folder(place, cache)
    if glob.has_magic(path):
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        # `**` gives folders and what is in them.
        inside = {parent for file in files for parent in file.parents}
        files = [file for file in files if file not in inside]
        found = [entry for file in files for entry in _sources(str(file), cache)]
        if not found:
            raise ValueError(f"--dataset-path {path}: no file has such a name")
        return found
    if "://" in path:
        raise ValueError(f"--dataset-path {path}: training reads no network; download it and give the file")
    if _HUB_NAME.fullmatch(path) and not path.startswith("."):
        return _hub(path)
    raise ValueError(f"--dataset-path {path}: no such file or folder")


def _folder(folder: Path, cache: Path) -> list[tuple[Split | None, Rows]]:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise ValueError(f"--dataset-path {folder}: {error}") from error
        if isinstance(saved, datasets.DatasetDict):
            return _tables(saved, str(folder), folder)
        return [(None, ArrowRows(saved, str(folder), folder))]
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.name.lower().endswith(SUFFIXES)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"--dataset-path {folder}: no file in it ends with {', '.join(SUFFIXES)}")
    return [(_split_of(file, folder), open_file(file, cache)) for file in files]


def _hub(name: str) -> list[tuple[Split | None, Rows]]:
    try:
        return _tables(datasets.load_dataset(name), name, None)
    except (OSError, ValueError) as error:
        raise ValueError(f"--dataset-path {name}: no such file or folder, and the hub says: {error}") from error


def _tables(tables: datasets.DatasetDict, name: str, folder: Path | None) -> list[tuple[Split | None, Rows]]:
    found: list[tuple[Split | None, Rows]] = []
    for split, table in tables.items():
        match = _NAMED.fullmatch(str(split))
        if match is None:
            raise ValueError(f"--dataset-path {name}: a split {split!r}; expected one of {', '.join(_NAMES)}")
        found.append((_NAMES[match[1].lower()], ArrowRows(table, f"{name}/{split}", folder)))
    return found


def _split_of(file: Path, folder: Path | None = None) -> Split | None:
    """The split that a file's name says, or that of a folder between it and `folder`."""
    inside = file.relative_to(folder).parts if folder is not None else (file.name,)
    for part in reversed(inside):
        if match := _NAMED.fullmatch(part):
            return _NAMES[match[1].lower()]
    return None


def _bounds(text: str) -> list[float]:
    """Megatron's `--split` as the four ends of three intervals that fill 0 to 1."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"--split {text}: expected up to three weights, such as 98,1,1")
    weights += [0.0] * (3 - len(weights))
    return [0.0, *(total / sum(weights) for total in accumulate(weights))]


def _chosen(rows: Rows, low: float, high: float, cache: Path, workers: int) -> np.ndarray:
    """Numbers of the rows whose place lies in [low, high)."""
    path = cache / f"places-{hashlib.sha256(f'{rows.fingerprint} {len(rows)}'.encode()).hexdigest()[:24]}.npy"
    with locked(path):
        if not path.is_file():
            with Workers(_Place(rows), workers, len(rows)) as pool, published(path) as file:
                np.save(file, np.fromiter(pool.map(range(len(rows))), np.float64, len(rows)))
    places = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.flatnonzero((places >= low) & (places < high))


@dataclass(frozen=True)
class _Place:
    """Where in 0..1 a row lies."""

    rows: Rows

    def __call__(self, index: int) -> float:
        try:
            text = canonical(self.rows[index])
        except (BadSample, RecursionError):  # it is counted when it is measured
            text = str(index)
        return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6]) / (1 << 48)


def canonical(row: Any) -> str:
    """A row as JSON that depends neither on the order of keys nor on the file it stands in."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_digest)


def _digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
