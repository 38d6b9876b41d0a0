"""A function of an index over many indices, by forked workers, in order and in bounded memory."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from runtime import lifetime

_CHUNK = 16  # indices that a worker takes at a time
_LEAST = 64  # a fork isn't worth it for fewer
_function: Callable[[int], object] | None = None  # the pool's workers read it here


class Workers[T]:
    """Forked processes that inherit a function and its data: nothing is pickled or imported again. A context manager.

    Args:
        function: called with an index.
        workers: processes; below 2, this one does the work.
        count: indices there will be; few are done in this process.
    """

    def __init__(self, function: Callable[[int], T], workers: int, count: int) -> None:
        self._function = function
        workers = min(workers, count // _LEAST)
        self._pool: multiprocessing.pool.Pool | None = None
        if workers > 1:
            with lifetime.shielded():
                self._pool = multiprocessing.get_context("fork").Pool(workers, _begin, (function, os.getpid()))

    def map(self, indices: Sequence[int]) -> Iterator[T]:
        """The function of each index, in order."""
        return map(self._function, indices) if self._pool is None else self._pool.imap(_call, indices, _CHUNK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


def _begin(function: Callable[[int], object], parent: int) -> None:
    global _function
    lifetime.end_with_parent(parent)
    _function = function


def _call(index: int) -> Any:
    assert _function is not None
    return _function(index)
