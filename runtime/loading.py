"""Reading a checkpoint as data: nothing that it names is run, and every byte is compared with its checksum.

A `.metadata` is a pickle, and so are the arguments and counters of a `torch_dist` checkpoint. torch and megatron-core
0.19.2 unpickle both without restriction (torch/distributed/checkpoint/filesystem.py, `FileSystemReader.read_metadata`;
megatron-core core/dist_checkpointing/serialization.py:230, through torch's default planner), on whichever path a flag
names. So while Megatron loads, the one pickle reader of that module is the restricted one, `torch.load` keeps to
`weights_only=True` (megatron-core registers its own classes as safe), and a record's zip checksums are compared the
first time that this rank reads of it. Outside loading nothing is changed: a dataset may unpickle its own files.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

from torch.distributed.checkpoint import FileSystemReader, filesystem

from runtime import checkpoints
from runtime.checksums import record_problem

# torch's own switch, read at every torch.load.
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class DamagedRecord(ValueError):
    """A shard's record isn't what was written; the message names the file and the record."""


class CheckedReader(FileSystemReader):
    """torch's reader of checkpoints, which compares checksums: once for each record that is read of."""

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        self._sound: set[tuple[str, int]] = set()

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        _check_once(self._sound, Path(self.path), file, sinfo)
        return super()._slice_file(file, sinfo)


@contextmanager
def as_data() -> Iterator[list[str]]:
    """Inside the block, a checkpoint's index and its pickled state are read without running anything, and records with
    wrong checksums are refused (`DamagedRecord`).

    Yields:
        Why an index was refused: torch keeps that to itself and says "metadata is None".
    """
    refused: list[str] = []

    def load_index(file: IO[bytes], **_: Any) -> Any:
        try:
            return checkpoints.read_index(file)
        except Exception as error:
            refused.append(f"{file.name} can't be read: {error}")
            raise

    restricted = SimpleNamespace(**{**vars(pickle), "load": load_index})
    slice_file = FileSystemReader._slice_file
    sound: set[tuple[str, int]] = set()

    def checked_slice(self: FileSystemReader, file: Any, sinfo: Any) -> IO[bytes]:
        _check_once(sound, Path(self.path), file, sinfo)
        return slice_file(self, file, sinfo)

    with (
        mock.patch.object(filesystem, "pickle", restricted),
        mock.patch.object(FileSystemReader, "_slice_file", checked_slice),
        mock.patch.dict(os.environ, {WEIGHTS_ONLY: "1"}),
    ):
        yield refused


def _check_once(sound: set[tuple[str, int]], folder: Path, file: IO[bytes], info: Any) -> None:
    place = (str(folder / info.relative_path), info.offset)
    if place in sound:
        return
    if problem := record_problem(file, info.offset, info.length):
        raise DamagedRecord(f"{place[0]}: the record at byte {info.offset:,} is damaged: {problem}")
    sound.add(place)


@functools.cache
def install() -> None:
    """Make Megatron's `load_checkpoint`, which its training loop calls by name, read checkpoints as data."""
    from megatron.training import checkpointing, training

    load = checkpointing.load_checkpoint

    @functools.wraps(load)
    def load_as_data(*args: Any, **kwargs: Any) -> Any:
        with as_data() as refused, _failure_explained(refused):
            return load(*args, **kwargs)

    loader: Callable[..., Any] = load_as_data
    checkpointing.load_checkpoint = training.load_checkpoint = loader


class CheckpointNotLoaded(RuntimeError):
    """Megatron gave up on a checkpoint and would have ended the program as if it had succeeded."""


@contextmanager
def _failure_explained(refused: list[str]) -> Iterator[None]:
    """Add to an error which checkpoint couldn't be loaded and which one can; no exit without an error.

    Megatron leaves with code 0 when `--exit-on-missing-checkpoint` finds nothing and when a file of its old format
    can't be read (training/checkpointing.py:1697 and :1742).
    """
    from megatron.training.global_vars import get_args

    try:
        yield
    except SystemExit as error:
        raise CheckpointNotLoaded(f"no checkpoint was loaded; {_what_there_is(get_args())}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        error.add_note("; ".join([*dict.fromkeys(refused), _what_there_is(get_args())]))
        raise


def _what_there_is(args: Any) -> str:
    """Which checkpoint was being loaded, and which else can be; or where there are some."""
    given = [("--load", args.load), ("--pretrained-checkpoint", vars(args).get("pretrained_checkpoint"))]
    named = [(flag, Path(folder)) for flag, folder in given if folder is not None]
    for _, folder in named:
        start = checkpoints.choose(folder, args.ckpt_step, args.ckpt_format)
        if start.folder is not None:
            return f"while loading {start.folder}; {checkpoints.other_steps(start.folder, args.ckpt_format)}"
    return "; ".join(f"while loading {flag} {folder}{checkpoints.elsewhere(folder)}" for flag, folder in named)
