"""Reading a checkpoint as data: nothing that it names is run.

A `.metadata` is a pickle, and so are the arguments and counters of a `torch_dist` checkpoint. torch and megatron-core
0.19.2 unpickle both without restriction (torch/distributed/checkpoint/filesystem.py, `FileSystemReader.read_metadata`;
megatron-core core/dist_checkpointing/serialization.py:230, through torch's default planner), on whichever path a flag
names. So while Megatron loads, the one pickle reader of that module is the restricted one, and `torch.load` keeps to
`weights_only=True`; megatron-core registers its own classes as safe. Outside loading nothing is changed: a dataset may
unpickle its own files.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

from torch.distributed.checkpoint import filesystem

from runtime.checkpoints import IndexUnpickler

# torch's own switch, read at every torch.load.
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def as_data() -> Iterator[None]:
    """Inside the block, a checkpoint's index and its pickled state are read without running anything."""
    restricted = SimpleNamespace(**{**vars(pickle), "load": _load_index})
    with mock.patch.object(filesystem, "pickle", restricted), mock.patch.dict(os.environ, {WEIGHTS_ONLY: "1"}):
        yield


def _load_index(file: IO[bytes], **_: Any) -> Any:
    return IndexUnpickler(file).load()


@functools.cache
def install() -> None:
    """Make Megatron's `load_checkpoint`, which its training loop calls by name, read checkpoints as data."""
    from megatron.training import checkpointing, training

    load = checkpointing.load_checkpoint

    @functools.wraps(load)
    def load_as_data(*args: Any, **kwargs: Any) -> Any:
        with as_data():
            return load(*args, **kwargs)

    loader: Callable[..., Any] = load_as_data
    checkpointing.load_checkpoint = training.load_checkpoint = loader
