"""What the loaders' workers need of /dev/shm."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from toy_data import PAD, ToyInputs, sample

from data import shared_memory
from data.batch import collate, flatten
from data.shared_memory import SharedMemoryTooSmall, check, loader_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_batch_is_larger_than_the_estimate(dtype: torch.dtype) -> None:
    """Of a full pack of toy documents, and by less than half: the margin is what other models' patches may add."""
    images = random.Random(0).choices([0, 1, 4], k=20)
    samples = [sample([9] * n + [1] * 40, [0] * n + [1] * 40, [[1, 2, 2]] * n) for n in images]
    tokens, patches = sum(40 + n for n in images), 4 * sum(images)
    batch = collate([samples], ToyInputs(), alignment=1, packed=True, seq_len=100, dtype=dtype, pad_token_id=PAD)
    actual = flatten(batch).buffer.nbytes
    need = loader_bytes(
        np.array([patches]), micro_batch_size=1, tokens=tokens, bytes_of_patch=3 * dtype.itemsize, workers=1
    )
    assert actual < need / 3  # one is trained on, two are prepared
    assert need / 3 < 3 * actual


def test_the_largest_packs_may_come_together() -> None:
    patches = np.array([1, 100, 1, 10, 1, 1, 1])
    per_patch = 6 + shared_memory.BYTES_PER_PATCH
    need = loader_bytes(patches, micro_batch_size=1, tokens=0, bytes_of_patch=6, workers=1)
    assert need == (100 + 10 + 1) * per_patch
    need = loader_bytes(patches[:2], micro_batch_size=1, tokens=0, bytes_of_patch=6, workers=2)
    assert need == (100 + 1 + 100 + 1 + 100) * per_patch  # five batches of two packs
    assert loader_bytes(patches, micro_batch_size=1, tokens=9, bytes_of_patch=6, workers=0) == 0


def test_refused_with_figures_and_fixes() -> None:
    needs = {"toy/train": 60_000_000, "toy/validation": 10_000_000}
    check(needs, loaders=2, free=140_000_000)
    with pytest.raises(SharedMemoryTooSmall) as refused:
        check(needs, loaders=2, free=64_000_000)
    for fragment in ("/dev/shm has 64 MB free", "140 MB", "toy/train 60 MB", "--shm-size=16g", "--num-workers"):
        assert fragment in str(refused.value)
