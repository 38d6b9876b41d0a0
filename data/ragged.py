"""Random documents that are hard on a parallel layout: what scripts/check_parallel.py trains on.

L tokens of a document, P patches, D values of a patch.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Self

import numpy as np
import torch

from data.conversation import Split
from data.sample import Sample
from data.sizes import SampleSize
from models.spec import ModelInputs

SAMPLES = 1 << 9
# Patches in height and width: wide, narrow, one feature alone.
IMAGES = ((2, 2), (4, 6), (8, 4), (2, 10))
# Half of the documents have no image.
IMAGE_COUNTS = (0, 0, 1, 3)
TRAINED_SHARE = 0.4


class RaggedDataset:
    """Documents of uneven lengths with none to three images of several shapes; see `data.sizes.SampleDataset`.

    Args:
        split: splits differ in their numbers.
        seed: of all numbers.
        longest: tokens of a document at most; half of that where images don't make it longer.
        dtype: of the pixels.
        images: False for text alone.
    """

    cache_dir: Path | None = None

    def __init__(
        self,
        split: Split,
        model_inputs: ModelInputs,
        *,
        seed: int,
        longest: int,
        dtype: torch.dtype,
        images: bool = True,
    ) -> None:
        self.name = f"ragged/{split}"
        self.fingerprint = f"longest {longest}, seed {seed}"
        self._inputs = model_inputs
        self._seed = (seed, zlib.crc32(self.name.encode()))
        self._longest = longest
        self._dtype = dtype
        self._image_counts = IMAGE_COUNTS if images else (0,)

    def __len__(self) -> int:
        return SAMPLES

    def size(self, index: int) -> SampleSize:
        sample = self[index]
        return SampleSize(len(sample.input_ids), len(sample.pixel_values), int(sample.trained[1:].sum()))

    def __getitem__(self, index: int) -> Sample:
        numbers = np.random.default_rng((*self._seed, index))
        image_id, merge = self._inputs.image_token_id, self._inputs.merge_size
        length = int(numbers.integers(1, self._longest // 2 + 1))
        ids: list[int] = []
        grids: list[tuple[int, int, int]] = []
        for shape in numbers.choice(IMAGES, numbers.choice(self._image_counts)).tolist():
            height, width = (side * merge // 2 for side in shape)
            part = [*self._text(numbers, int(numbers.integers(1, 4))), *[image_id] * (height * width // merge**2)]
            if len(ids) + len(part) < self._longest:
                ids += part
                grids.append((1, height, width))
        ids += self._text(numbers, max(1, length - len(ids)))
        input_ids = torch.tensor(ids)
        grid_thw = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        patches = int(grid_thw.prod(-1).sum())
        pixels = torch.from_numpy(numbers.standard_normal((patches, self._inputs.patch_dim), dtype=np.float32))
        is_trained = torch.from_numpy(numbers.random(len(ids)) < TRAINED_SHARE)
        return Sample(
            input_ids=input_ids,
            trained=is_trained & (input_ids != image_id),
            pixel_values=pixels.to(self._dtype),
            grid_thw=grid_thw,
            id=f"{self.name}/{index}",
        )

    def without_pixels(self) -> Self:
        return self

    def _text(self, numbers: np.random.Generator, count: int) -> list[int]:
        """Ids below nine tenths of the image token's: special ids sit beside it, at a vocabulary's end."""
        return numbers.integers(0, self._inputs.image_token_id * 9 // 10, count).tolist()
