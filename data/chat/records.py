"""Rows of files, by number: JSON lines by offset, parquet and `datasets` folders through Arrow.

JSON lines aren't read through Arrow: it infers one schema from all lines, and fails where a content is text in one and
a list in the next. A file needs as much memory as its index: 16 bytes a line, mapped, so that processes share them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

from data.bad_sample import BadSample, Reason
from data.cache import locked, published

_CHUNK = 1 << 24  # bytes read at a time
_BOM = b"\xef\xbb\xbf"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


class Rows(Protocol):
    """Rows of one source.

    name: of the source, for messages.
    fingerprint: changes with the content.
    folder: that paths in a row are relative to; None where they can't be relative.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """The row.

        Raises:
            BadSample: it can't be read.
        """
        ...

    def place(self, index: int) -> str:
        """Its name: the source's, and its number among the rows, from 0."""
        ...


class JsonLines:
    """A file of JSON lines.

    Args:
        path: the file; blank lines are no rows.
        cache: folder that keeps the index.
        shown: the file's name in messages, where it was unpacked from another.
    """

    def __init__(self, path: Path, cache: Path, shown: Path | None = None) -> None:
        self.name = str(shown or path)
        self.folder = (shown or path).resolve().parent
        self._path = path
        status = path.stat()
        key = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
        index = cache / f"lines-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
        with locked(index):
            if not index.is_file():
                with published(index) as file:
                    np.save(file, _index(path))
        found = np.load(index, mmap_mode="r", allow_pickle=False)
        # The content's digest stands before the offsets: [4 + 2 * rows] int64.
        self.fingerprint = np.asarray(found[:4]).tobytes().hex()
        self._spans = found[4:].reshape(-1, 2)  # first byte of each line, and the byte after its last
        self._file: tuple[int, int] | None = None  # process and descriptor

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        start, end = self._spans[index].tolist()
        line = os.pread(self._descriptor(), end - start, start)
        try:
            return json.loads(line.decode("utf-8-sig" if start == 0 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadSample(
                Reason.ROW,
                f"{self.place(index)}: not JSON: {error}; a file has one object a line, or one array of them",
            ) from error

    def place(self, index: int) -> str:
        return f"{self.name}:{index}"

    def _descriptor(self) -> int:
        """Of this process: descriptors don't survive being pickled, and pread shares no position."""
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self._path, os.O_RDONLY))
        return self._file[1]


class ArrowRows:
    """A `datasets` table; images stay undecoded, so that measuring reads an image's header only."""

    def __init__(self, table: datasets.Dataset, name: str, folder: Path | None) -> None:
        self.name, self.folder = name, folder
        features = datasets.Features({key: _undecoded(feature) for key, feature in table.features.items()})
        self._table = table.cast(features) if features != table.features else table
        self.fingerprint = table._fingerprint

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Any:
        try:
            return _present(self._table[index])
        except Exception as error:  # Arrow's own, of a damaged page
            raise BadSample(Reason.ROW, f"{self.place(index)}: {error!r}") from error

    def place(self, index: int) -> str:
        return f"{self.name}:{index}"


def open_file(path: Path, cache: Path) -> Rows:
    """The rows of a file, by its suffix. JSON arrays and gzip are unpacked once, into the cache.

    Raises:
        ValueError: it can't be read, or has another suffix.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(f"--dataset-path {path}: expected a file that ends with {', '.join(SUFFIXES)}")
    try:
        if name.endswith(".parquet"):
            cache.mkdir(parents=True, exist_ok=True)
            table = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache / "arrow"))
            return ArrowRows(table, str(path), path.resolve().parent)
        if name.endswith(".gz") or _is_array(path):
            return JsonLines(_unpacked(path, cache), cache, path)
        return JsonLines(path, cache)
    except (OSError, ValueError, EOFError, RecursionError, zlib.error, DatasetsError) as error:
        raise ValueError(f"--dataset-path {path}: {type(error).__name__}: {error}") from error


def _index(path: Path) -> np.ndarray:
    """[4 + 2 * rows] int64: 32 bytes of digest, then where each line begins and ends."""
    digest = hashlib.blake2b(digest_size=32)
    spans: list[np.ndarray] = []
    position, begin, blank = 0, 0, True  # of the line that is being read
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            data = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(data == 10)
            # A line has content if any byte of it is above a blank: the sum up to each end tells.
            full = np.concatenate([[0], np.cumsum(data > 32)])
            if len(ends):
                starts = np.concatenate([[0], ends[:-1] + 1])
                has_content = full[ends] > full[starts]
                has_content[0] |= not blank
                lines = np.stack([starts, ends], axis=1) + position
                lines[0, 0] = begin
                spans.append(lines[has_content])
                begin, blank = position + int(ends[-1]) + 1, True
            last = int(ends[-1]) + 1 if len(ends) else 0
            blank = blank and bool(full[-1] == full[last])
            position += len(chunk)
    if not blank:
        spans.append(np.array([[begin, position]]))
    head = np.frombuffer(digest.digest(), np.int64)
    return np.concatenate([head, *(part.astype(np.int64).ravel() for part in spans)])


def _is_array(path: Path) -> bool:
    """Whether a JSON file's first character opens a list: JSON lines begin with objects."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")


def _unpacked(path: Path, cache: Path) -> Path:
    """The same rows as JSON lines in the cache."""
    status = path.stat()
    key = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    target = cache / f"unpacked-{hashlib.sha256(key.encode()).hexdigest()[:24]}.jsonl"
    with locked(target):
        if not target.is_file():
            opener = gzip.open if path.name.lower().endswith(".gz") else open
            with published(target) as file, opener(path, "rb") as packed:
                if packed.peek(4096).removeprefix(_BOM).lstrip().startswith(b"["):
                    for row in json.loads(packed.read().decode("utf-8-sig")):
                        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                else:
                    shutil.copyfileobj(packed, file, _CHUNK)
    return target


def _present(value: Any) -> Any:
    """A table's value without the keys that are other rows': a column of objects has the keys of them all."""
    if isinstance(value, dict):
        return {key: _present(entry) for key, entry in value.items() if entry is not None}
    return [_present(entry) for entry in value] if isinstance(value, list) else value


def _undecoded(feature: Any) -> Any:
    """A column's type with every image, sound and film in it undecoded."""
    if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
        return type(feature)(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {key: _undecoded(inner) for key, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    return feature
