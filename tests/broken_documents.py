"""Ragged documents of which every other one turns out broken where pixels are read, and nowhere else."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any, Self

from data.bad_sample import BadSample, Reason
from data.conversation import Split
from data.ragged import RaggedDataset
from data.sample import Sample
from models.spec import ModelInputs


class BrokenDocuments(RaggedDataset):
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


def build(args: Namespace, split: Split, processor: None, model_inputs: ModelInputs) -> BrokenDocuments:
    """A provider: `--dataset-provider broken_documents:build` with this folder on PYTHONPATH."""
    return BrokenDocuments(split, model_inputs, seed=args.seed, longest=args.seq_length, dtype=args.params_dtype)
