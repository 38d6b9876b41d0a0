"""Images to patches: resized once, and exactly as the processor that serves the model will.

Shape letters: P patches, I images, D values of a patch (channels * temporal * patch²).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

ImageProcessor = Any  # transformers' Qwen2VLImageProcessor, of either backend: they share no typed base


@dataclass(frozen=True)
class PixelLimits:
    """Area in pixels that an image is resized into, its aspect ratio kept."""

    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, image_processor: ImageProcessor, min_pixels: int | None, max_pixels: int | None) -> PixelLimits:
        """The given limits; where None, the processor's own.

        Raises:
            ValueError: not 0 < min_pixels <= max_pixels.
        """
        size = image_processor.size
        limits = cls(
            size["shortest_edge"] if min_pixels is None else min_pixels,
            size["longest_edge"] if max_pixels is None else max_pixels,
        )
        if not 0 < limits.min_pixels <= limits.max_pixels:
            raise ValueError(
                f"--min-pixels {limits.min_pixels} and --max-pixels {limits.max_pixels}: give "
                "0 < min-pixels <= max-pixels (a limit that isn't given is the processor's own)"
            )
        return limits


def open_image(source: Image.Image | str | Path) -> Image.Image:
    """A PIL image as it is, or the image file at a path (opened, not decoded yet).

    Raises:
        ValueError: an address or another kind of source; more pixels than Pillow takes for an honest image.
        OSError: no such file, or not an image.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.startswith("file://"):
        source = source.removeprefix("file://")
    if isinstance(source, Path) or (isinstance(source, str) and "://" not in source):
        try:
            return Image.open(source)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{source}: {error}") from error
    raise ValueError(
        f"an image must be a PIL image or a path, not {str(source)[:80]!r}: training reads no network, "
        "download it first"
    )


def patch_grid(image: Image.Image, image_processor: ImageProcessor, limits: PixelLimits) -> tuple[int, int, int]:
    """Patches that the image will have in time, height and width, from its size alone.

    Raises:
        ValueError: one side is more than 200 times the other (the processor's own bound).
    """
    patch = image_processor.patch_size
    height, width = smart_resize(
        image.height,
        image.width,
        factor=patch * image_processor.merge_size,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
    )
    return 1, height // patch, width // patch


def process_images(
    images: Sequence[Image.Image],
    image_processor: ImageProcessor,
    limits: PixelLimits,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Images -> pixel_values [P, D] in `dtype` and grid_thw [I, 3] int64.

    Bit-identical, before the cast, to `image_processor(images, min_pixels=..., max_pixels=...)`.
    """
    if not images:
        return torch.empty(0, patch_dim(image_processor), dtype=dtype), torch.empty(0, 3, dtype=torch.int64)
    resized = [_resize(image, image_processor, limits) for image in images]
    # Each part's limits are the area that the image already has, so that process_vision_info, which would
    # resize with Pillow (up to two grey levels off torchvision, HF's default), leaves every pixel alone.
    parts = [
        {
            "type": "image",
            "image": image,
            "min_pixels": image.width * image.height,
            "max_pixels": image.width * image.height,
        }
        for image in resized
    ]
    fetched, _ = process_vision_info([{"role": "user", "content": parts}], image_patch_size=image_processor.patch_size)
    features = image_processor(fetched, do_resize=False, return_tensors="pt")
    return features["pixel_values"].to(dtype), features["image_grid_thw"].to(torch.int64)


def image_of(cell: dict[str, Any] | None, where: str) -> Image.Image:
    """The image of an undecoded cell of an image column; its header is read, its pixels aren't decoded.

    Raises:
        ValueError: no image in the cell.
    """
    try:
        if cell is not None and cell["bytes"] is not None:
            return Image.open(io.BytesIO(cell["bytes"]))
        if cell is not None and cell["path"] is not None:
            return Image.open(cell["path"])
    except OSError as error:
        raise ValueError(f"{where}, key 'image': {error}") from error
    raise ValueError(f"{where}, key 'image': it is empty")


def patch_dim(image_processor: ImageProcessor) -> int:
    """Values of one row of pixel_values: RGB, two frames of a still image, one patch."""
    return 3 * image_processor.temporal_patch_size * image_processor.patch_size**2


def _resize(image: Image.Image, image_processor: ImageProcessor, limits: PixelLimits) -> Image.Image:
    """The image as the processor's own path has it just before normalisation."""
    pixels = image_processor.process_image(image, do_convert_rgb=image_processor.do_convert_rgb)
    resized = image_processor.resize(
        pixels,
        size=SizeDict(shortest_edge=limits.min_pixels, longest_edge=limits.max_pixels),
        resample=image_processor.resample,
        factor=image_processor.patch_size * image_processor.merge_size,
    )
    return to_pil_image(torch.as_tensor(resized))
