"""Saving checkpoints so that each is valid or invisible, and says why when it fails; and reading them as data.

megatron-core 0.19.2 saves from the middle of its training loop, which takes no callback, so `install()` puts four
functions of this file around Megatron's own, or in their place:

    save_checkpoint          removes another checkpoint of the same iteration first, deletes old ones afterwards
    schedule_async_save      the same for `--async-save`, once the checkpoint is complete, in a process that ends with
                             this one
    write_preloaded_data     names the file and the operating system's reason when a shard can't be written
    get_write_results_queue  its process ends with this one, and not by a SIGTERM to the job
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runtime import checkpoints, lifetime

Function = Callable[..., Any]


class CheckpointSaver:
    """Megatron's saving, watched: one for the process, since Megatron's functions are the process's.

    Args:
        save, schedule: `megatron.training.checkpointing`'s `save_checkpoint` and `schedule_async_save`.
    """

    def __init__(self, save: Function, schedule: Function) -> None:
        self._save = save
        self._schedule = schedule
        self._target = (Path(), 0)  # folder and iteration of the save under way, for the asynchronous part of it

    def save(self, iteration: int, *args: Any, train_data_iterator: Any = None, **kwargs: Any) -> None:
        """Megatron's `save_checkpoint` over nothing of the same iteration; then `--keep-last`.

        Megatron writes over an older checkpoint of this iteration file by file (training/checkpointing.py:795): killed
        meanwhile, it leaves a mixture that looks complete. With virtual pipelining it asks a list of iterators for the
        data's state (:1248).
        """
        from megatron.training.global_vars import get_args

        options = get_args()
        folder = Path(options.save)
        persistent = not kwargs.get("non_persistent_ckpt", False)
        if isinstance(train_data_iterator, list):  # all chunks of a rank read one source
            train_data_iterator = train_data_iterator[0]
        self._target = (folder, iteration)
        with _failure_explained(folder, iteration):
            if persistent:
                if _is_first_rank():
                    checkpoints.make_room(folder, iteration, options.ckpt_format)
                torch.distributed.barrier()
            self._save(iteration, *args, train_data_iterator=train_data_iterator, **kwargs)
        if persistent and not options.async_save:
            _delete_old()

    def schedule(self, request: Any) -> None:
        """Megatron's `schedule_async_save`, whose last steps run once all ranks have written their files."""
        finalize, target = request.finalize_fns[:], self._target

        def finalize_all() -> None:
            with _failure_explained(*target):
                for function in finalize:
                    function()
            _delete_old()  # the tracker names the new checkpoint by now

        request.finalize_fns[:] = [finalize_all]
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(lifetime.call_in_child, os.getpid(), request.async_fn))
        with lifetime.shielded():
            self._schedule(request)


@functools.cache
def install() -> None:
    """Put a `CheckpointSaver` in the place of Megatron's functions; calling it again changes nothing."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import checkpointing, training

    saver = CheckpointSaver(checkpointing.save_checkpoint, checkpointing.schedule_async_save)
    checkpointing.save_checkpoint = training.save_checkpoint = saver.save
    checkpointing.schedule_async_save = saver.schedule
    writer: Any = filesystem_async.FileSystemWriterAsync
    writer.write_preloaded_data = staticmethod(_naming_the_file(writer.write_preloaded_data))
    filesystem_async.get_write_results_queue = lifetime.write_results_queue


def _is_first_rank() -> bool:
    return torch.distributed.get_rank() == 0


def _delete_old() -> None:
    """`--keep-last`, on the first rank."""
    from megatron.training.global_vars import get_args

    args = get_args()
    last = vars(args).get("keep_last")  # our flag, which Megatron's own programs don't have
    if last is None or not _is_first_rank():
        return
    try:
        deleted = checkpoints.keep_last(Path(args.save), last, args.ckpt_format)
    except OSError as error:  # it costs disk space, no checkpoint
        print(f"WARNING: old checkpoints can't be deleted: {error}", file=sys.stderr, flush=True)
    else:
        for iteration in deleted:
            print(f"  deleted the checkpoint of iteration {iteration} (--keep-last)", flush=True)


@contextmanager
def _failure_explained(folder: Path, iteration: int) -> Iterator[None]:
    """Add to an error which checkpoint failed, the room on its disk, and which one is left."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        last = checkpoints.read_tracker(folder)
        error.add_note(
            f"while saving {folder / checkpoints.folder_name(iteration)} (free there: "
            f"{shutil.disk_usage(folder).free:,} bytes); it is incomplete and won't be loaded, "
            + ("and there is none before it" if last is None else f"iteration {last} is the last complete one")
        )
        raise


def _naming_the_file(write: Function) -> Function:
    """Megatron reports a shard's error as its type alone (dist_checkpointing/strategies/filesystem_async.py:291)."""

    @functools.wraps(write)
    def write_or_say(transforms: Any, local_proc_idx: int, write_bucket: Any, *args: Any, **kwargs: Any) -> Any:
        result = write(transforms, local_proc_idx, write_bucket, *args, **kwargs)
        if isinstance(error := result[1], Exception):
            while not isinstance(error, OSError) and error.__context__ is not None:
                error = error.__context__  # torch's archive writer hides the file system's error behind its own
            print(f"ERROR: {write_bucket[0]} can't be written: {error}", file=sys.stderr, flush=True)
        return result

    return write_or_say
