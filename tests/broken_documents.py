"""Documents that turn out broken where pixels are read, and nowhere else.

Providers: `--dataset-provider broken_documents:build` or `:step` with this folder on PYTHONPATH.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from typing import Any, Self

from data.bad_sample import BadSample, Reason
from data.conversation import Split
from data.mock import MockDataset
from data.ragged import RaggedDataset
from data.sample import Sample
from models.spec import ModelInputs


class BrokenDocuments(RaggedDataset):
    """Ragged documents, every other one broken."""

    pixels = True

    def size(self, index: int) -> Any:
        return self.without_pixels()._size(index)

    def _size(self, index: int) -> Any:
        return super().size(index)

    def __getitem__(self, index: int) -> Sample:
        if self.pixels and index % 2:
            raise BadSample(Reason.IMAGE, f"{self.name}/{index}: cut in half")
        return super().__getitem__(index)

    def without_pixels(self) -> Self:
        dataset = copy.copy(self)
        dataset.pixels = False
        return dataset


class BrokenSteps(MockDataset):
    """Documents that fill a pack each, broken in some steps: for one loader without workers."""

    loaded = 0
    is_broken: Callable[[int], bool]  # the number of a document in the order of loading

    def __getitem__(self, index: int) -> Sample:
        self.loaded += 1
        if self.is_broken(self.loaded - 1):
            raise BadSample(Reason.IMAGE, f"{self.name}/{index}: cut in half")
        return super().__getitem__(index)


def build(args: Namespace, split: Split, processor: None, model_inputs: ModelInputs) -> BrokenDocuments:
    return BrokenDocuments(split, model_inputs, seed=args.seed, longest=args.seq_length, dtype=args.params_dtype)


def step(args: Namespace, split: Split, processor: None, model_inputs: ModelInputs) -> BrokenSteps:
    """All of step 2 is broken, and the last data-parallel rank's part of step 3."""
    dataset = BrokenSteps(
        split, model_inputs, seed=args.seed, length=args.seq_length, image_size=32, dtype=args.params_dtype
    )
    ranks = args.data_parallel_size
    in_step = args.global_batch_size // ranks

    def is_broken(number: int) -> bool:
        from megatron.core import mpu

        number //= in_step
        return number == 1 or (number == 2 and ranks > 1 and mpu.get_data_parallel_rank() == ranks - 1)

    dataset.is_broken = is_broken
    return dataset
