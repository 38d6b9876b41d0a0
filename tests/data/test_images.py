"""Patches and grids equal to those of the HF processor's own path, bit by bit."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.images import ImageProcessor, PixelLimits, open_image, patch_dim, patch_grid, process_images

MEAN_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SIZE = {"shortest_edge": 4096, "longest_edge": 160_000}


@pytest.fixture(scope="module", params=[Qwen2VLImageProcessor, Qwen2VLImageProcessorPil])
def image_processor(request: pytest.FixtureRequest) -> ImageProcessor:
    """Both of HF's backends: torchvision, its default, and Pillow. They differ by up to two grey levels."""
    return request.param(patch_size=16, merge_size=2, temporal_patch_size=2, size=SIZE, **MEAN_STD)


@pytest.fixture(scope="module")
def torchvision_processor() -> ImageProcessor:
    return Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, size=SIZE, **MEAN_STD)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Random pixels: every error of interpolation shows."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def fifty_sizes() -> list[tuple[int, int]]:
    """Multiples of the patch and off by one, tiny, thin, and 34 at random, odd ones among them."""
    rng = Random(0)
    sizes = [
        (32, 32), (64, 64), (128, 160), (97, 203), (31, 33), (1, 1), (2, 3), (7, 1400), (1400, 7), (5, 999),
        (16, 16), (15, 3000), (400, 400), (401, 399), (1024, 768), (80, 81),
    ]  # fmt: skip
    while len(sizes) < 50:
        width, height = (int(2 ** rng.uniform(1, 10)) for _ in range(2))
        if max(width, height) <= 200 * min(width, height):
            sizes.append((width, height))
    return sizes


def test_equal_to_the_processors_own_path_on_50_sizes(image_processor: ImageProcessor) -> None:
    sizes = fifty_sizes()
    assert len(set(sizes)) == 50
    for width, height in sizes:
        image = noise(width, height)
        own = image_processor(image, return_tensors="pt")
        limits = PixelLimits.of(image_processor, None, None)
        pixel_values, grid_thw = process_images([image], image_processor, limits, torch.float32)
        assert torch.equal(grid_thw, own["image_grid_thw"]), (width, height)
        assert torch.equal(pixel_values, own["pixel_values"]), (width, height)
        assert grid_thw.tolist()[0][0] == 1  # a still image is one step in time
        assert [list(patch_grid(image, image_processor, limits))] == grid_thw.tolist()


def test_given_limits_equal_to_the_processors_own(image_processor: ImageProcessor) -> None:
    images = [noise(30, 40), noise(640, 480), noise(640, 480), noise(200, 200)]
    own = image_processor(images, min_pixels=9_000, max_pixels=50_000, return_tensors="pt")
    limits = PixelLimits.of(image_processor, 9_000, 50_000)
    pixel_values, grid_thw = process_images(images, image_processor, limits, torch.float32)
    assert torch.equal(grid_thw, own["image_grid_thw"])
    assert torch.equal(pixel_values, own["pixel_values"])
    areas = grid_thw.prod(-1) * 16**2
    assert areas.min() >= 9_000 and areas.max() <= 50_000


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "1"])
def test_other_modes_equal_the_processors_own(mode: str, torchvision_processor: ImageProcessor) -> None:
    image = noise(90, 70, "RGBA").convert(mode)
    own = torchvision_processor(image, return_tensors="pt")
    limits = PixelLimits.of(torchvision_processor, None, None)
    pixel_values, _ = process_images([image], torchvision_processor, limits, torch.float32)
    assert torch.equal(pixel_values, own["pixel_values"])


def test_dtype_and_no_images(torchvision_processor: ImageProcessor) -> None:
    limits = PixelLimits.of(torchvision_processor, None, None)
    image = noise(64, 64)
    whole, _ = process_images([image], torchvision_processor, limits, torch.float32)
    half, grid_thw = process_images([image], torchvision_processor, limits, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, whole.to(torch.bfloat16))
    assert half.shape == (16, patch_dim(torchvision_processor)) and grid_thw.dtype == torch.int64
    none, grid_thw = process_images([], torchvision_processor, limits, torch.bfloat16)
    assert none.shape == (0, 3 * 2 * 16**2) and none.dtype == torch.bfloat16 and grid_thw.shape == (0, 3)


@pytest.mark.parametrize("size", [(1, 201), (2011, 10)])
def test_extreme_shapes_are_refused(size: tuple[int, int], torchvision_processor: ImageProcessor) -> None:
    limits = PixelLimits.of(torchvision_processor, None, None)
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        patch_grid(noise(*size), torchvision_processor, limits)


@pytest.mark.parametrize(("least", "most"), [(5_000, 4_000), (0, 4_000), (None, 4_000), (200_000, None)])
def test_contradicting_limits_are_refused(
    least: int | None, most: int | None, torchvision_processor: ImageProcessor
) -> None:
    with pytest.raises(ValueError, match=r"--min-pixels .* --max-pixels"):
        PixelLimits.of(torchvision_processor, least, most)


def test_images_come_from_files_and_never_from_the_network(tmp_path: Path) -> None:
    noise(40, 30).save(tmp_path / "image.png")
    for source in (tmp_path / "image.png", str(tmp_path / "image.png"), f"file://{tmp_path}/image.png"):
        assert open_image(source).size == (40, 30)
    with pytest.raises(ValueError, match="training reads no network"):
        open_image("https://example.com/image.png")
