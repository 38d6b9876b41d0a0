"""A model's inputs and a dataset small enough to write expected batches by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.sample import Sample
from data.sizes import SampleSize
from models.spec import BatchShape

IMAGE = 9
PAD = 99


class ToyInputs:
    """2 x 2 merged patches of 3 values; positions count 1, 10 and 100 at a time."""

    image_token_id = IMAGE
    merge_size = 2
    patch_dim = 3
    patch_size = 1
    further_tokens = 2

    def position_ids(self, input_ids: Tensor, grid_thw: Tensor) -> Tensor:
        return torch.arange(len(input_ids)) * torch.tensor([[1], [10], [100]])

    def vision_inputs(self, grid_thw: Tensor) -> dict[str, Tensor | int]:
        patches = grid_thw.prod(-1)
        starts = torch.nn.functional.pad(patches.cumsum(0), (1, 0)).to(torch.int32)
        return {"cu_seqlens": starts, "max_seqlen": int(patches.max())}

    def flops(self, shape: BatchShape) -> float:
        return float(sum(length**2 for length in shape.document_lengths) + int(shape.grid_thw.prod(-1).sum()))


def sample(
    ids: list[int], trained: list[int], grids: list[list[int]] | None = None, name: str = "toy/0", first_pixel: int = 0
) -> Sample:
    """A sample whose pixel rows count up from `first_pixel`."""
    grid_thw = torch.tensor(grids or [], dtype=torch.int64).view(-1, 3)
    patches = int(grid_thw.prod(-1).sum())
    rows = torch.arange(first_pixel, first_pixel + patches, dtype=torch.float32)
    return Sample(
        input_ids=torch.tensor(ids),
        trained=torch.tensor(trained, dtype=torch.bool),
        pixel_values=rows[:, None].expand(-1, ToyInputs.patch_dim).clone(),
        grid_thw=grid_thw,
        id=name,
    )


class ToyDataset:
    """Sample i is the id 100 + i, repeated to its length, after the image tokens of its patches (4 to a token)."""

    name = "toy/train"

    def __init__(self, lengths: list[int], patches: list[int] | None = None, cache_dir: Path | None = None) -> None:
        self.lengths = lengths
        self.patches = patches or [0] * len(lengths)
        self.fingerprint = str(self.lengths)
        self.cache_dir = cache_dir
        self.measured = 0
        self.pixels = True

    def __len__(self) -> int:
        return len(self.lengths)

    def size(self, index: int) -> SampleSize:
        self.measured += 1
        image = self.patches[index] // ToyInputs.merge_size**2
        trained = self.lengths[index] - max(image, 1)  # nothing predicts the first token
        return SampleSize(self.lengths[index], self.patches[index], trained)

    def __getitem__(self, index: int) -> Sample:
        patches = self.patches[index]
        image = patches // ToyInputs.merge_size**2
        text = self.lengths[index] - image
        made = sample(
            [IMAGE] * image + [100 + index] * text,
            [0] * image + [1] * text,
            [[1, 2, patches // 2]] if patches else None,
            name=f"{self.name}/{index}",
            first_pixel=1000 * index,
        )
        return made if self.pixels else replace(made, pixel_values=made.pixel_values[:0])

    def without_pixels(self) -> ToyDataset:
        dataset = copy.copy(self)
        dataset.pixels = False
        return dataset
