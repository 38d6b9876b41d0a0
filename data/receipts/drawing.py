"""Receipts as pictures: Pillow's own fonts and shapes, a few layouts, turned by a few degrees.

Coordinates are pixels, x to the right and y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data.receipts.values import Receipt

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

MARGIN = 6  # of the paper, and of the table around it
MAX_DEGREES = 4.0
WHITE: Colour = (255, 255, 255)
# Coarse values are panels across the paper in colours of their own, each with a shape: seen at any resolution.
LOGOS: dict[str, tuple[str, Colour]] = {
    "Acorn": ("disc", (120, 70, 30)),
    "Bridge": ("square", (40, 70, 210)),
    "Comet": ("star", (240, 205, 30)),
    "Delta": ("triangle", (30, 140, 60)),
    "Ember": ("diamond", (215, 40, 40)),
    "Falcon": ("cross", (25, 25, 25)),
    "Grove": ("ring", (130, 50, 180)),
    "Harbor": ("bars", (20, 175, 185)),
}
BANDS: dict[str, Colour] = {
    "EUR": (120, 160, 250), "GBP": (250, 120, 220), "JPY": (250, 140, 90), "USD": (130, 220, 90),
}  # fmt: skip
STAMPS: dict[str, tuple[str, Colour]] = {
    "card": ("square", (20, 30, 90)),
    "cash": ("disc", (0, 90, 40)),
    "coupon": ("triangle", (150, 80, 0)),
    "points": ("cross", (150, 0, 80)),
}


@dataclass(frozen=True)
class Word:
    """text where it stands: box is (left, top, right, bottom) on the paper; is_key marks a label."""

    text: str
    box: Box
    category: str  # CORD-v2's, "menu.price"
    group: int = 0
    is_key: bool = False


@dataclass(frozen=True)
class Drawing:
    """image: RGB. valid_line: CORD-v2's list of words with their corners in the image."""

    image: Image.Image
    valid_line: list[dict[str, Any]]


class _Paper:
    """A sheet being printed from top to bottom."""

    def __init__(self, width: int, height: int, rng: Random) -> None:
        shade = rng.randint(238, 255)
        self.image = Image.new("RGB", (width, height), (shade, shade, rng.randint(230, shade)))
        self.draw = ImageDraw.Draw(self.image)
        self.ink = (rng.randint(0, 60),) * 3
        self.words: list[Word] = []
        self.y = 0

    def panel(self, height: float, colour: Colour) -> None:
        """Fill the full width from self.y down."""
        self.draw.rectangle((0, self.y, self.image.width, self.y + height), fill=colour)

    def write(self, x: float, text: str, size: int, category: str, align: str = "left", **word: Any) -> None:
        """Print a word at height self.y, its left edge, middle or right edge at x; size 0 is the bitmap font."""
        font = _font(size)
        x -= font.getlength(text) * {"left": 0.0, "middle": 0.5, "right": 1.0}[align]
        self.draw.text((x, self.y), text, fill=word.pop("fill", self.ink), font=font)
        self.words.append(Word(text, self.draw.textbbox((x, self.y), text, font=font), category, **word))


def draw(receipt: Receipt, rng: Random) -> Drawing:
    """Print a receipt and photograph it: 96 to 144 pixels wide, as high as its content needs.

    rng decides on layout, sizes, colours' shades and angle, nothing that a question asks about.
    """
    width = rng.randint(96, 144)
    paper = _Paper(width - 2 * MARGIN, 400, rng)
    band_on_top = rng.random() < 0.5
    _print_logo(paper, receipt, rng)
    if band_on_top:
        _print_band(paper, receipt, rng)
    _print_items(paper, receipt, rng)
    _print_total(paper, receipt, rng)
    if not band_on_top:
        _print_band(paper, receipt, rng)
    _print_stamp(paper, receipt, rng)
    sheet = paper.image.crop((0, 0, paper.image.width, paper.y))
    return _photograph(sheet, paper.words, rng)


def _print_logo(paper: _Paper, receipt: Receipt, rng: Random) -> None:
    """The shop's colour across the paper, its shape and name in white."""
    shape, colour = LOGOS[receipt.shop]
    side, width = rng.randint(26, 34), paper.image.width
    paper.panel(side + 26, _shaded(colour, rng))
    x = rng.choice((MARGIN, (width - side) // 2, width - MARGIN - side))
    paper.y += 5
    _shape(paper.draw, shape, (x, paper.y, x + side, paper.y + side), WHITE)
    paper.y += side + 2
    paper.write(x + side / 2, receipt.shop, 11, "store_info.nm", "middle", fill=WHITE)
    paper.y += 23


def _print_band(paper: _Paper, receipt: Receipt, rng: Random) -> None:
    paper.panel(20, _shaded(BANDS[receipt.currency], rng))
    paper.y += 2
    paper.write(paper.image.width / 2, receipt.currency, 13, "payment_info.currency", "middle")
    paper.y += 22


def _print_items(paper: _Paper, receipt: Receipt, rng: Random) -> None:
    size, right = rng.choice((0, 10, 11, 12)), paper.image.width - MARGIN
    count_first, ruled = rng.random() < 0.5, rng.random() < 0.5
    for group, item in enumerate(receipt.items, start=1):
        name_at = MARGIN + 12 if count_first else MARGIN
        paper.write(name_at, item.name, size, "menu.nm", group=group)
        if count_first:
            paper.write(MARGIN, str(item.count), size, "menu.cnt", group=group)
        else:
            paper.write(paper.words[-1].box[2] + 3, f"x{item.count}", size, "menu.cnt", group=group)
        paper.write(right, str(item.price), size, "menu.price", "right", group=group)
        paper.y += (size or 10) + 4
        if ruled:
            paper.draw.line((MARGIN, paper.y - 1, right, paper.y - 1), fill=(170, 170, 170))


def _print_total(paper: _Paper, receipt: Receipt, rng: Random) -> None:
    """The label small, the figure large."""
    paper.y += 2
    paper.draw.line((MARGIN, paper.y, paper.image.width - MARGIN, paper.y), fill=paper.ink, width=2)
    paper.y += 5
    label = rng.choice(("TOTAL", "Total", "Sum"))
    size = min(rng.randint(22, 28), (paper.image.width - 2 * MARGIN - 40) // 2)  # three digits beside the label
    paper.write(MARGIN, label, 11, "total.total_price", is_key=True)
    paper.write(paper.image.width - MARGIN, str(receipt.total), size, "total.total_price", "right")
    paper.y += size + 6


def _print_stamp(paper: _Paper, receipt: Receipt, rng: Random) -> None:
    shape, colour = STAMPS[receipt.payment]
    side, right = rng.randint(16, 20), rng.random() < 0.5
    paper.panel(side + 8, _shaded(colour, rng))
    paper.y += 4
    x = paper.image.width - MARGIN - side if right else MARGIN
    _shape(paper.draw, shape, (x, paper.y, x + side, paper.y + side), WHITE)
    beside, align = (x - 4, "right") if right else (x + side + 4, "left")
    paper.y += side // 2 - 6
    paper.write(beside, receipt.payment, 11, "payment_info.method", align, fill=WHITE)
    paper.y += side - side // 2 + 10


def _photograph(sheet: Image.Image, words: list[Word], rng: Random) -> Drawing:
    """The sheet on a table, turned a little."""
    shade = rng.randint(90, 220)
    table = (shade, shade - rng.randint(0, 15), shade - rng.randint(0, 30))
    image = Image.new("RGB", (sheet.width + 2 * MARGIN, sheet.height + 2 * MARGIN), table)
    image.paste(sheet, (MARGIN, MARGIN))
    degrees = rng.uniform(-MAX_DEGREES, MAX_DEGREES)
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=table)
    return Drawing(turned, [_valid_line(word, image.size, degrees) for word in words])


def _valid_line(word: Word, image_size: tuple[int, int], degrees: float) -> dict[str, Any]:
    """CORD-v2's record of a word: corners x1, y1 (top left) to x4, y4 (bottom left), clockwise."""
    left, top, right, bottom = (edge + MARGIN for edge in word.box)
    quad: dict[str, int] = {}
    for number, corner in enumerate(((left, top), (right, top), (right, bottom), (left, bottom)), start=1):
        x, y = turn(corner, image_size, degrees)
        quad |= {f"x{number}": round(x), f"y{number}": round(y)}
    record = {"quad": quad, "is_key": int(word.is_key), "row_id": word.group, "text": word.text}
    return {"words": [record], "category": word.category, "group_id": word.group, "sub_group_id": 0}


def turn(point: tuple[float, float], image_size: tuple[int, int], degrees: float) -> tuple[float, float]:
    """Where `Image.rotate(degrees)` moves a point of an image of size (width, height)."""
    angle, (width, height) = math.radians(degrees), image_size
    x, y = point[0] - width / 2, point[1] - height / 2
    return (
        width / 2 + x * math.cos(angle) + y * math.sin(angle),
        height / 2 - x * math.sin(angle) + y * math.cos(angle),
    )


def _shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, colour: Colour) -> None:
    left, top, right, bottom = box
    x, y, half = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    if shape == "disc":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=round(half / 2))
    elif shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=colour)
    elif shape == "diamond":
        draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=colour)
    elif shape == "cross":
        draw.rectangle((x - half / 3, top, x + half / 3, bottom), fill=colour)
        draw.rectangle((left, y - half / 3, right, y + half / 3), fill=colour)
    elif shape == "bars":
        for i in range(3):
            draw.rectangle((left, top + i * half * 0.75, right, top + (i * 0.75 + 0.5) * half), fill=colour)
    elif shape == "star":
        radii = [half if i % 2 == 0 else half * 0.45 for i in range(10)]
        spokes = [math.pi * (i / 5 - 0.5) for i in range(10)]
        points = [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, spokes, strict=True)]
        draw.polygon(points, fill=colour)
    else:
        raise ValueError(f"no shape {shape!r}")


def _shaded(colour: Colour, rng: Random) -> Colour:
    red, green, blue = (min(255, max(0, part + rng.randint(-20, 20))) for part in colour)
    return red, green, blue


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's two fonts: a scalable one, and at size 0 a bitmap one, 11 pixels high."""
    if size == 0:
        return ImageFont.load_default_imagefont()
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, which receipts are printed with")
    return font
