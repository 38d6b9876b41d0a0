"""Files that are computed once and kept in `--data-cache-path`: whole or not there, and readable by everybody."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

DEFAULT_CACHE = Path(__file__).resolve().parents[1] / "outputs" / "data-cache"


def cache_folder(args: Namespace) -> Path:
    """`--data-cache-path`, or a folder in outputs/; made if need be."""
    folder = Path(args.data_cache_path or DEFAULT_CACHE).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def published(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which appears under its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp's is private
        os.replace(temporary, path)  # a reader never sees half a file
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes this file; others wait. No lock is needed where the file is there."""
    if path.is_file():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock", mode=0o666):
        yield
