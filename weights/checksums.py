"""Checksums of a safetensors folder, in a file beside it: does every byte that is read equal what was written?

    checksums.json    {"algorithm": "crc32", "block_bytes": 16777216, "tensors": {"lm_head.weight": ["9f3a01c2", ...]}}

One CRC-32 for each block of a tensor's bytes, so that a rank that reads a slice compares the blocks that the slice
touches and no others. Folders of other programs have no such file and load without it. Torch-free.
"""

from __future__ import annotations

import json
import mmap
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.json_files import JsonError, read_object
from models.json_schema import Check, Integer, mapping, problems

CHECKSUMS = "checksums.json"
BLOCK = 2**24  # bytes


def checksums_of(content: memoryview | bytes) -> list[str]:
    """The CRC-32 of each block of a tensor's bytes, as hexadecimal digits."""
    return [f"{zlib.crc32(content[start : start + BLOCK]):08x}" for start in range(0, len(content), BLOCK)]


def write_checksums(folder: Path, tensors: Mapping[str, list[str]]) -> None:
    record = {"algorithm": "crc32", "block_bytes": BLOCK, "tensors": tensors}
    (folder / CHECKSUMS).write_text(json.dumps(record) + "\n")


def read_checksums(folder: Path, sizes: Mapping[str, int]) -> tuple[dict[str, list[str]], list[str]]:
    """A folder's checksums by tensor, and what is wrong with their file; none of both where there is none.

    Args:
        sizes: bytes of every tensor of the folder.
    """
    if not (folder / CHECKSUMS).exists():
        return {}, []
    try:
        record = read_object(folder / CHECKSUMS)
    except JsonError as error:
        return {}, [f"{CHECKSUMS}: {error.reason}"]
    schema: dict[str, Check] = {"block_bytes": Integer(BLOCK, BLOCK), "tensors": mapping, "algorithm": _crc32}
    if wrong := problems(record, schema, required=schema):
        return {}, [f"{CHECKSUMS}: {problem}" for problem in wrong]
    tensors = record["tensors"]
    wrong = [
        f"{CHECKSUMS}: {name} has no checksums, or not as many as its {size:,} bytes have blocks: the file belongs to "
        "other weights; delete it if these are right"
        for name, size in sizes.items()
        if not _are_checksums(tensors.get(name), -(-size // BLOCK))
    ]
    return tensors, wrong[:3]


def _crc32(value: Any) -> str | None:
    return None if value == "crc32" else '"crc32"'


def _are_checksums(value: Any, count: int) -> bool:
    if not isinstance(value, list) or len(value) != count:
        return False
    return all(isinstance(entry, str) and re.fullmatch(r"[0-9a-f]{8}", entry) for entry in value)


def elements_between(index: Sequence[slice | int], shape: Sequence[int]) -> tuple[int, int]:
    """The first element of a slice of a row-major tensor, and the one behind its last; (0, 0) if it has none."""
    first = last = 0
    for dim, size in enumerate(shape):
        entry = index[dim] if dim < len(index) else slice(None)
        start, stop = (entry, entry + 1) if isinstance(entry, int) else entry.indices(size)[:2]
        if start >= stop:
            return 0, 0
        first, last = first * size + start, last * size + stop - 1
    return first, last + 1


class CheckedFile:
    """One safetensors file, whose bytes are compared with their checksums when they are about to be read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with open(file, "rb") as opened:
            self._content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        header_bytes = int.from_bytes(self._content[:8], "little")
        header = json.loads(bytes(self._content[8 : 8 + header_bytes]))  # whose form safetensors has checked
        self._places = {
            name: [8 + header_bytes + offset for offset in entry["data_offsets"]]
            for name, entry in header.items()
            if name != "__metadata__"
        }
        self._sound: set[tuple[str, int]] = set()

    def problem(self, name: str, checksums: Sequence[str], first: int = 0, last: int | None = None) -> str | None:
        """What is wrong with bytes `first` to `last` of a tensor; None: they are what was written.

        Blocks that were compared before aren't read again.
        """
        start, end = self._places[name]
        last = end - start if last is None else last
        for block in range(first // BLOCK, -(-last // BLOCK)):
            if (name, block) in self._sound:
                continue
            low = start + block * BLOCK
            high = min(low + BLOCK, end)
            if f"{zlib.crc32(self._content[low:high]):08x}" != checksums[block]:
                return (
                    f"{self.file.name}: {name} is damaged between bytes {low:,} and {high:,} of the file, by "
                    f"{CHECKSUMS}; restore it, or delete {CHECKSUMS} if another program has changed it on purpose"
                )
            self._sound.add((name, block))
        return None
