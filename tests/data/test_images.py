"""Patches and grids equal to those of the HF processor's own path, bit by bit."""

from __future__ import annotations

import base64
import os
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from qwen_vl_utils.vision_process import fetch_image
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.bad_sample import BadSample, Reason
from data.images import (
    ImageProcessor,
    Picture,
    PixelLimits,
    normalise,
    open_image,
    patch_dim,
    patch_grid,
    process_images,
)

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
        pixel_values, grid_thw = process_images([Picture(image, limits)], image_processor, torch.float32)
        assert torch.equal(grid_thw, own["image_grid_thw"]), (width, height)
        assert torch.equal(pixel_values, own["pixel_values"]), (width, height)
        assert grid_thw.tolist()[0][0] == 1  # a still image is one step in time
        assert [list(patch_grid(Picture(image, limits), image_processor))] == grid_thw.tolist()


def test_given_limits_equal_to_the_processors_own(image_processor: ImageProcessor) -> None:
    images = [noise(30, 40), noise(640, 480), noise(640, 480), noise(200, 200)]
    own = image_processor(images, min_pixels=9_000, max_pixels=50_000, return_tensors="pt")
    limits = PixelLimits.of(image_processor, 9_000, 50_000)
    pixel_values, grid_thw = process_images(
        [Picture(image, limits) for image in images], image_processor, torch.float32
    )
    assert torch.equal(grid_thw, own["image_grid_thw"])
    assert torch.equal(pixel_values, own["pixel_values"])
    areas = grid_thw.prod(-1) * 16**2
    assert areas.min() >= 9_000 and areas.max() <= 50_000


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "YCbCr", "HSV"])
def test_opaque_modes_equal_the_processors_own(mode: str, torchvision_processor: ImageProcessor) -> None:
    image = noise(90, 70, "RGB").convert(mode)
    own = torchvision_processor(image, return_tensors="pt")
    limits = PixelLimits.of(torchvision_processor, None, None)
    pixel_values, _ = process_images([Picture(image, limits)], torchvision_processor, torch.float32)
    assert torch.equal(pixel_values, own["pixel_values"])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str, torchvision_processor: ImageProcessor, tmp_path: Path) -> None:
    """HF's processor drops the alpha channel; qwen-vl-utils, which serves the model, puts white behind it."""
    image = Image.new("RGBA", (70, 90), (200, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 35, 90))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "image.png")
    upright = normalise(open_image(tmp_path / "image.png"))
    assert (upright.mode, upright.getpixel((0, 0)), upright.getpixel((69, 0))) == ("RGB", (0, 0, 0), (255, 255, 255))
    limits = PixelLimits.of(torchvision_processor, None, None)
    pixel_values, _ = process_images([Picture(image, limits)], torchvision_processor, torch.float32)
    assert torch.equal(pixel_values, torchvision_processor(upright, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_exif_turns_the_image_and_its_measures(
    kind: str, orientation: int, torchvision_processor: ImageProcessor, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    noise(96, 160).save(tmp_path / f"image.{kind}", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / f"image.{kind}")).convert("RGB")
    image = open_image(tmp_path / f"image.{kind}")
    picture = Picture(image, PixelLimits.of(torchvision_processor, None, None))
    grid = patch_grid(picture, torchvision_processor)
    assert grid == ((1, 10, 6) if orientation < 5 else (1, 6, 10))
    pixel_values, grid_thw = process_images([picture], torchvision_processor, torch.float32)
    assert grid_thw.tolist() == [list(grid)]
    assert torch.equal(pixel_values, torchvision_processor(expected, return_tensors="pt")["pixel_values"])


def test_measuring_decodes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torchvision_processor) -> None:
    for kind in ("png", "jpeg", "webp", "tiff"):
        noise(64, 64).save(tmp_path / f"image.{kind}")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    limits = PixelLimits.of(torchvision_processor, None, None)
    for kind in ("png", "jpeg", "tiff"):
        assert patch_grid(Picture(open_image(tmp_path / f"image.{kind}"), limits), torchvision_processor) == (1, 4, 4)


def test_deep_greys_are_scaled_and_unknown_ranges_refused(tmp_path: Path) -> None:
    deep = np.array([[0, 257], [32768, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert [p[0] for p in normalise(open_image(tmp_path / "deep.png")).get_flattened_data()] == [0, 1, 128, 255]
    floats = Image.fromarray(np.array([[0.0, 0.5], [0.25, 1.0]], np.float32))
    assert [p[0] for p in normalise(floats).get_flattened_data()] == [0, 128, 64, 255]
    for values in (
        np.array([[0.0, 2.0]], np.float32),
        np.array([[0.0, np.nan]], np.float32),
        np.array([[-1]], np.int32),
    ):
        with pytest.raises(BadSample, match="range nothing says"):
            normalise(Image.fromarray(values))


def test_a_parts_own_limits(torchvision_processor: ImageProcessor) -> None:
    limits = PixelLimits.of(torchvision_processor, None, None)
    small, sized = limits.for_part({"max_pixels": 8_192}), limits.for_part({"resized_height": 70, "resized_width": 100})
    image = noise(200, 200)
    pixel_values, grid_thw = process_images(
        [Picture(image, limits), Picture(image, small), Picture(image, sized)], torchvision_processor, torch.float32
    )
    assert grid_thw.tolist() == [[1, 12, 12], [1, 4, 4], [1, 4, 6]]
    own = torchvision_processor(image, min_pixels=4096, max_pixels=8_192, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values[144:160], own)
    part = {"type": "image", "image": image, "resized_height": 70, "resized_width": 100}
    fetched = fetch_image(part, image_patch_size=16)
    own = torchvision_processor(fetched, do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values[160:], own)
    for wrong in (
        {"max_pixels": "many"},
        {"resized_height": 64},
        {"min_pixels": 0},
        {"min_pixels": 10, "max_pixels": 5},
    ):
        with pytest.raises(BadSample) as caught:
            limits.for_part(wrong)
        assert caught.value.reason == Reason.MALFORMED


def test_dtype_and_no_images(torchvision_processor: ImageProcessor) -> None:
    limits = PixelLimits.of(torchvision_processor, None, None)
    image = noise(64, 64)
    whole, _ = process_images([Picture(image, limits)], torchvision_processor, torch.float32)
    half, grid_thw = process_images([Picture(image, limits)], torchvision_processor, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, whole.to(torch.bfloat16))
    assert half.shape == (16, patch_dim(torchvision_processor)) and grid_thw.dtype == torch.int64
    none, grid_thw = process_images([], torchvision_processor, torch.bfloat16)
    assert none.shape == (0, 3 * 2 * 16**2) and none.dtype == torch.bfloat16 and grid_thw.shape == (0, 3)


@pytest.mark.parametrize("size", [(1, 201), (2011, 10)])
def test_extreme_shapes_are_refused(size: tuple[int, int], torchvision_processor: ImageProcessor) -> None:
    limits = PixelLimits.of(torchvision_processor, None, None)
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        patch_grid(Picture(noise(*size), limits), torchvision_processor)


@pytest.mark.parametrize(("least", "most"), [(5_000, 4_000), (0, 4_000), (None, 4_000), (200_000, None)])
def test_contradicting_limits_are_refused(
    least: int | None, most: int | None, torchvision_processor: ImageProcessor
) -> None:
    with pytest.raises(ValueError, match=r"--min-pixels .* --max-pixels"):
        PixelLimits.of(torchvision_processor, least, most)


def test_sources_of_images(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    noise(40, 30).save(path)
    content = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    for source in (path, str(path), f"file://{path}", content, uri, {"bytes": content, "path": None}, noise(40, 30)):
        assert open_image(source).size == (40, 30)
    assert open_image("image.png", tmp_path).size == (40, 30)


def test_what_is_no_image_is_refused_by_its_reason(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.png")
    cases = [
        ("https://example.com/image.png", Reason.MISSING, "training reads no network"),
        ("data:image/png;base64,####", Reason.IMAGE, "not base64"),
        (tmp_path / "nowhere.png", Reason.MISSING, "No such file"),
        (tmp_path / "pipe.png", Reason.MISSING, "not a regular file"),
        ("/dev/zero", Reason.MISSING, "not a regular file"),
        (tmp_path, Reason.MISSING, "not a regular file"),
        (tmp_path / "text.png", Reason.IMAGE, "not an image"),
        (b"", Reason.IMAGE, "not an image"),
        (None, Reason.MALFORMED, "an image is None"),
        (["a.png"], Reason.MALFORMED, "an image is"),
    ]
    for source, reason, said in cases:
        with pytest.raises(BadSample, match=said) as caught:
            open_image(source)
        assert caught.value.reason == reason
    with pytest.raises(BadSample) as caught:
        open_image("data:image/png;base64," + "A" * 5000 + "#")
    assert len(str(caught.value)) < 400


def test_postscript_is_never_opened(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript."""
    path = tmp_path / "image.eps"
    noise(40, 30).save(path, "EPS")
    path.rename(tmp_path / "image.png")
    for source in (tmp_path / "image.png", (tmp_path / "image.png").read_bytes(), Image.open(tmp_path / "image.png")):
        with pytest.raises(BadSample) as caught:
            open_image(source)
        assert caught.value.reason == Reason.IMAGE


def test_an_absurd_size_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    noise(8, 8).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4) + (60_000).to_bytes(4)
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    with pytest.raises(BadSample, match="decompression bomb") as caught:
        open_image(bytes(content))
    assert caught.value.reason == Reason.ABSURD
