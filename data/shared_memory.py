"""Is /dev/shm large enough for what the loader's workers hand over?

A worker passes a batch on through shared memory. Where that is full (64 MB is what Docker gives a container), torch
prints the error, drops the batch and lets the rank wait for it for ever; hence this check before training, and the
loader's time limit for what the check can't know.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

FOLDER = Path("/dev/shm")
PREFETCH = 2  # batches that torch's DataLoader asks of each worker ahead of time
# A batch's tensors besides the pixels, a little more than all of them together (`data.batch.Batch`).
BYTES_PER_TOKEN = 64
BYTES_PER_PATCH = 96


class SharedMemoryTooSmall(RuntimeError):
    """/dev/shm hasn't the room for the batches that the workers prepare ahead."""


def loader_bytes(patches: np.ndarray, *, micro_batch_size: int, tokens: int, bytes_of_patch: int, workers: int) -> int:
    """What one loader has in shared memory at most: each worker's batches ahead, and the one that is trained on.

    Args:
        patches: [packs] of each pack; the largest are taken to come together.
        tokens: of a pack.
        bytes_of_patch: a patch's pixels.
        workers: 0 needs no shared memory.
    """
    if workers == 0:
        return 0
    packs = (workers * PREFETCH + 1) * micro_batch_size
    largest = np.sort(patches)[::-1][:packs]
    largest = np.resize(largest, packs)  # a small dataset comes again
    return int(packs * tokens * BYTES_PER_TOKEN + largest.sum(dtype=np.int64) * (bytes_of_patch + BYTES_PER_PATCH))


def check(needs: dict[str, int], loaders: int, free: int | None = None) -> None:
    """Refuse a run whose workers would fill /dev/shm.

    Args:
        needs: bytes of each split's loader (`loader_bytes`).
        loaders: ranks on this machine that load; each has all of the splits.
        free: bytes; None asks the system, which may have no such folder.

    Raises:
        SharedMemoryTooSmall: with the figures and the fixes.
    """
    if free is None:
        free = shutil.disk_usage(FOLDER).free if FOLDER.is_dir() else None
    if free is None or loaders * sum(needs.values()) <= free:
        return
    parts = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in needs.items())
    raise SharedMemoryTooSmall(
        f"{FOLDER} has {free / 1e6:.0f} MB free, and the loaders' workers may need "
        f"{loaders * sum(needs.values()) / 1e6:.0f} MB ({parts}; {loaders} of these on this machine). Enlarge it ("
        "docker run --shm-size=16g or --ipc=host; in Kubernetes an emptyDir with medium: Memory at /dev/shm), or lower "
        "--num-workers (0 needs none), --micro-batch-size, --max-pixels or --max-patches-per-pack"
    )


def loaders_here(ranks_per_batch: int) -> int:
    """Ranks of this machine that load.

    Args:
        ranks_per_batch: ranks that share a micro-batch, the first of which loads.
    """
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // ranks_per_batch)
