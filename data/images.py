"""Images to patches: opened safely, normalised to RGB, and resized exactly as the processor that serves the model will.

    source -> open_image (header only) -> normalise (pixels: EXIF orientation, RGB, transparency on white) -> patches

Training, generate.py and evaluate.py all come through here. HF's processors drop an alpha channel, and only some of
HF's own ways of opening a file apply the EXIF orientation; here both happen, so the bits are the HF processor's own on
the normalised image.

Shape letters: P patches, I images, D values of a patch (channels * temporal * patch²).
"""

from __future__ import annotations

import base64
import binascii
import io
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from qwen_vl_utils.vision_process import to_rgb
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from data.bad_sample import BadSample, Reason, shown
from data.conversation import SIZE_KEYS

ImageProcessor = Any  # transformers' Qwen2VLImageProcessor, of either backend: they share no typed base

# What is opened at all. Pillow knows formats that start other programs (EPS: Ghostscript) or that nobody means.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap the sides
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PixelLimits:
    """Area in pixels that an image is resized into, its aspect ratio kept.

    size: height and width instead, from a part's `resized_height` and `resized_width`.
    """

    min_pixels: int
    max_pixels: int
    size: tuple[int, int] | None = None

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

    def for_part(self, part: Mapping[str, Any]) -> PixelLimits:
        """These, but for what an image part says itself.

        Raises:
            BadSample: a size that is no size.
        """
        given = {key: part[key] for key in SIZE_KEYS if part.get(key) is not None}
        if not given:
            return self
        for key, value in given.items():
            # JSON's numbers may be infinite.
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 1 << 31 or value % 1:
                raise BadSample(Reason.MALFORMED, f"key {key!r} of an image part: {shown(value)}; give pixels")
        height, width = (given.get(key) for key in ("resized_height", "resized_width"))
        if (height is None) != (width is None):
            raise BadSample(Reason.MALFORMED, "an image part has one of resized_height and resized_width; give both")
        limits = PixelLimits(
            int(given.get("min_pixels", self.min_pixels)),
            int(given.get("max_pixels", self.max_pixels)),
            None if height is None or width is None else (int(height), int(width)),
        )
        if limits.min_pixels > limits.max_pixels:
            raise BadSample(
                Reason.MALFORMED,
                f"an image part's min_pixels {limits.min_pixels} are more than its max_pixels {limits.max_pixels}",
            )
        return limits


@dataclass(frozen=True)
class Picture:
    """An image in its place: opened, not decoded, and what it will be resized into."""

    image: Image.Image
    limits: PixelLimits


def open_image(source: Any, folder: Path | None = None) -> Image.Image:
    """An image, opened but not decoded.

    Args:
        source: a PIL image; a path, also as file://; a data URI with base64; an image file's bytes; or a cell of a
            `datasets` image column that isn't decoded: {"bytes": ..., "path": ...}.
        folder: that paths are relative to; the working directory if None.

    Raises:
        BadSample: an address on the network, no regular file, a format that isn't opened, or more pixels than Pillow
            takes for an honest image.
    """
    if isinstance(source, Image.Image):
        if source.format is not None and source.format not in FORMATS:
            raise BadSample(Reason.IMAGE, f"an image of format {source.format}; convert it to PNG or JPEG")
        return source
    if isinstance(source, Mapping) and {"bytes", "path"} & source.keys():
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), "an image's bytes")
    if isinstance(source, str) and source.startswith("data:"):
        return _open(io.BytesIO(_decoded(source)), "a data URI")
    if isinstance(source, str) and source.startswith("file://"):
        source = source.removeprefix("file://")
    if isinstance(source, str) and "://" in source:
        raise BadSample(
            Reason.MISSING, f"{shown(source)}: training reads no network; download it and give the file's path"
        )
    if isinstance(source, str | Path) and source:
        return _open_file(Path(folder or "", source))
    raise BadSample(
        Reason.MALFORMED,
        f"an image is {shown(source)}; give a path, a data URI, bytes or a PIL image",
    )


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as `normalise` will make them, from the header alone."""
    width, height = image.size
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def normalise(image: Image.Image) -> Image.Image:
    """The image upright, in RGB, with transparency on white; 16 bits and floats scaled to 8.

    Raises:
        BadSample: a mode whose range isn't known.
        OSError, SyntaxError and more: Pillow can't decode it.
    """
    turn = _TURNS.get(_orientation(image))
    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _scaled(image)
    elif image.mode != "RGB" or image.has_transparency_data:
        image = to_rgb(image.convert("RGBA") if image.has_transparency_data else image)
    return image if turn is None else image.transpose(turn)


def patch_grid(picture: Picture, image_processor: ImageProcessor) -> tuple[int, int, int]:
    """Patches that the image will have in time, height and width, from its header alone.

    Raises:
        BadSample: one side is more than 200 times the other (the processor's own bound).
    """
    patch = image_processor.patch_size
    height, width = _resized(picture, oriented_size(picture.image), patch * image_processor.merge_size)
    return 1, height // patch, width // patch


def process_images(
    pictures: Sequence[Picture], image_processor: ImageProcessor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Images -> pixel_values [P, D] in `dtype` and grid_thw [I, 3] int64.

    Bit-identical, before the cast, to `image_processor(images, min_pixels=..., max_pixels=...)` on normalised images.

    Raises:
        BadSample: an image that can't be decoded; names its number.
    """
    if not pictures:
        return torch.empty(0, patch_dim(image_processor), dtype=dtype), torch.empty(0, 3, dtype=torch.int64)
    normalised = [_normalise(picture, number) for number, picture in enumerate(pictures)]
    pixels, grids = [], []
    for limits, group in groupby(zip(pictures, normalised, strict=True), key=lambda pair: pair[0].limits):
        pairs = list(group)
        if limits.size is None:
            images = [image for _, image in pairs]
            sizes = {"min_pixels": limits.min_pixels, "max_pixels": limits.max_pixels}
        else:
            factor = image_processor.patch_size * image_processor.merge_size
            height, width = _resized(pairs[0][0], limits.size, factor)
            images, sizes = [image.resize((width, height)) for _, image in pairs], {"do_resize": False}
        features = image_processor(images, return_tensors="pt", **sizes)
        pixels.append(features["pixel_values"])
        grids.append(features["image_grid_thw"])
    return torch.cat(pixels).to(dtype), torch.cat(grids).to(torch.int64)


def patch_dim(image_processor: ImageProcessor) -> int:
    """Values of one row of pixel_values: RGB, two frames of a still image, one patch."""
    return 3 * image_processor.temporal_patch_size * image_processor.patch_size**2


# Opening


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open_file(path: Path) -> Image.Image:
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise BadSample(Reason.MISSING, f"{shown(str(path))}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(kind):  # reading a pipe or a device may never end
        raise BadSample(Reason.MISSING, f"{path}: not a regular file")
    return _open(path, str(path))


def _open(file: io.BytesIO | Path, name: str) -> Image.Image:
    try:
        return Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise BadSample(Reason.ABSURD, f"{name}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged header leads to
        said = "not an image of a format that is opened" if isinstance(error, OSError) else repr(error)
        raise BadSample(Reason.IMAGE, f"{name}: {said} ({', '.join(_formats())})") from error


def _decoded(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadSample(Reason.IMAGE, f"{shown(uri)}: a data URI has to hold base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(Reason.IMAGE, f"{shown(uri)}: not base64: {error}") from error


# Pixels


def _orientation(image: Image.Image) -> int:
    # For a PNG without EXIF before its pixels, Pillow's getexif decodes the pixels to look behind them.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception as error:  # a damaged block; whatever Pillow makes of it
        raise BadSample(Reason.IMAGE, f"its EXIF data can't be read: {error!r}") from error


def _normalise(picture: Picture, number: int) -> Image.Image:
    file = getattr(picture.image, "filename", "")
    name = f"image {number} ({file})" if file else f"image {number}"
    try:
        return normalise(picture.image)
    except BadSample as error:
        raise error.named(name) from error
    except Image.DecompressionBombError as error:
        raise BadSample(Reason.ABSURD, f"{name}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # as in _open
        raise BadSample(Reason.IMAGE, f"{name}: {type(error).__name__}: {shown(str(error))}") from error


def _scaled(image: Image.Image) -> Image.Image:
    """16-bit greys and floats as 8-bit RGB: 65,535 and 1.0 are white."""
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise BadSample(Reason.IMAGE, "an image of floats outside 0..1, whose range nothing says; save it as PNG")
        values = values * 255.0
    elif values.min() < 0 or values.max() > 65535:
        raise BadSample(Reason.IMAGE, "an image of 32-bit integers, whose range nothing says; save it as PNG")
    else:
        values = values / 257.0
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _resized(picture: Picture, size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width in pixels that an upright image of this size is resized to."""
    limits = picture.limits
    height, width = limits.size or size
    # qwen-vl-utils rounds a given size to whole merged patches, within its own limits; here there are none.
    bounds = (limits.min_pixels, limits.max_pixels) if limits.size is None else (1, 1 << 62)
    try:
        return smart_resize(height, width, factor=factor, min_pixels=bounds[0], max_pixels=bounds[1])
    except (ValueError, ZeroDivisionError) as error:
        raise BadSample(Reason.ABSURD, f"{width} x {height} pixels: {error}") from error
