"""Checksums of what shards hold: the CRC-32 that each record's zip format has written beside it.

A shard (`__0_0.distcp`) is a row of records, each a zip archive as torch.save writes it. torch reads them without
comparing the checksums (its miniz is built so), and a bit that has flipped on a disk becomes a wrong weight.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from typing import IO

_AT_ONCE = 2**22  # bytes


def record_problem(file: IO[bytes], offset: int, length: int) -> str | None:
    """What is wrong with one record of a shard; None: all of its bytes are those that were written.

    Args:
        file: the open shard, whose position stays.
        offset, length: the record's place, in bytes.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Window(file.fileno(), offset, length))) as archive:
            for member in archive.infolist():
                with archive.open(member) as opened:
                    while opened.read(_AT_ONCE):
                        pass
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        return str(error) or type(error).__name__
    return None


class _Window(io.RawIOBase):
    """Part of a file, read without moving the file's own position."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError("seek before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._length - self._position))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:wanted]], self._offset + self._position)
        self._position += count
        return count
