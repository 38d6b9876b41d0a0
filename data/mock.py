"""Random tokens and pixels, the same for an index in every run: for speed measurements and tests.

L tokens, P patches, D values of a patch.
"""

from __future__ import annotations

import copy
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from data.conversation import Split
from data.sample import Sample
from data.sizes import SampleSize
from models.spec import ModelInputs

SAMPLES = 1 << 14


class MockDataset:
    """Samples of one length with one image each, in the middle of the text; see `data.sizes.SampleDataset`.

    Text ids are drawn below nine tenths of the image token's id: special ids sit beside it, at a vocabulary's end.
    Every text token is trained.

    Args:
        split: splits differ in their numbers.
        seed: of all numbers.
        length: tokens of a sample, L.
        image_size: height and width of the image in pixels; 0 for text alone.
        dtype: of the pixels.

    Raises:
        ValueError: the image isn't whole merged patches, or doesn't leave a text token on either side.
    """

    cache_dir: Path | None = None

    def __init__(
        self,
        split: Split,
        model_inputs: ModelInputs,
        *,
        seed: int,
        length: int,
        image_size: int,
        dtype: torch.dtype,
    ) -> None:
        merged = model_inputs.patch_size * model_inputs.merge_size
        if image_size % merged:
            raise ValueError(f"--image-size {image_size}: mock needs a multiple of {merged}, a merged patch's side")
        side = image_size // model_inputs.patch_size
        self.name = f"mock/{split}"
        self.fingerprint = f"length {length}, image {image_size}, seed {seed}"
        self._grid = torch.tensor([[1, side, side]] if side else [], dtype=torch.int64).view(-1, 3)
        self._patches = side * side
        self._image_tokens = self._patches // model_inputs.merge_size**2
        self._length = length
        self._seed = (seed, zlib.crc32(self.name.encode()))
        self._inputs = model_inputs
        self._dtype = dtype
        self._pixel_rows = self._patches
        if self._image_tokens + 2 > length:
            raise ValueError(
                f"--image-size {image_size}: its {self._image_tokens} image tokens don't fit a sample of "
                f"{length} tokens; lower --image-size or raise --seq-length"
            )

    def __len__(self) -> int:
        return SAMPLES

    def size(self, index: int) -> SampleSize:
        first_is_text = int(self._length > self._image_tokens)
        return SampleSize(self._length, self._patches, self._length - self._image_tokens - first_is_text)

    def __getitem__(self, index: int) -> Sample:
        numbers = np.random.default_rng((*self._seed, index))
        image_token_id = self._inputs.image_token_id
        input_ids = torch.from_numpy(numbers.integers(0, image_token_id * 9 // 10, self._length))
        start = (self._length - self._image_tokens) // 2
        input_ids[start : start + self._image_tokens] = image_token_id
        pixels = torch.from_numpy(numbers.standard_normal((self._pixel_rows, self._inputs.patch_dim), dtype=np.float32))
        return Sample(
            input_ids=input_ids,
            trained=input_ids != image_token_id,
            pixel_values=pixels.to(self._dtype),
            grid_thw=self._grid,
            id=f"{self.name}/{index}",
        )

    def without_pixels(self) -> Self:
        dataset = copy.copy(self)
        dataset._pixel_rows = 0
        return dataset


def build(args: Namespace, split: Split, model_inputs: ModelInputs) -> MockDataset:
    """One sample fills `--seq-length`; its image is `--image-size` square, none with `--image-seq-length 0` or
    `--language-model-only`.

    Raises:
        ValueError: see `MockDataset`; or the image has more tokens than `--image-seq-length` allows.
    """
    image_size = args.image_size if args.image_seq_length and not args.language_model_only else 0
    tokens = (image_size // (model_inputs.patch_size * model_inputs.merge_size)) ** 2
    if tokens > args.image_seq_length:
        raise ValueError(
            f"--image-size {image_size} makes {tokens} image tokens and --image-seq-length allows "
            f"{args.image_seq_length}: an image isn't cut, so raise the one or lower the other"
        )
    return MockDataset(
        split, model_inputs, seed=args.seed, length=args.seq_length, image_size=image_size, dtype=args.params_dtype
    )
