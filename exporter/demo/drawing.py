"""Draws a scene: antialiased shapes with a soft shadow on a shaded ground.  Pillow and the standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 224  # pixels of a drawn picture's edge; the model's own preprocessing makes it smaller
_OVERSAMPLE = 4  # each shape's mask is drawn this much larger and averaged down: that is the antialiasing

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Brush:
    """How one shape is put on the picture.  Lengths are fractions of the picture's edge, the turn is in degrees."""

    shape: str
    colour: Colour
    centre: Point
    radius: float
    turn: float


def _regular(corners: int, radius: float, start: float) -> list[Point]:
    angles = [math.radians(start + 360 * corner / corners) for corner in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _square() -> list[Point]:
    return _regular(4, 1.12, 45)


def _triangle() -> list[Point]:
    return _regular(3, 1.15, -90)


def _star() -> list[Point]:
    outer, inner = _regular(5, 1.15, -90), _regular(5, 0.5, -54)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _cross() -> list[Point]:
    arm, half = 1.0, 0.36
    corner = [(half, -half), (half, -arm), (-half, -arm)]
    quarters: list[Point] = []
    for _ in range(4):
        quarters += corner
        corner = [(y, -x) for x, y in corner]
    return quarters


_OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


def _mask(brush: Brush, reach: int) -> Image.Image:
    """Coverage of a shape on a tile whose edge is 2 * `reach` pixels, the shape's centre in its middle."""
    size = 2 * reach * _OVERSAMPLE
    tile = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(tile)
    # The part of a pixel that the centre is off the pixel raster is drawn, so that shapes do not snap to pixels.
    middle = [size / 2 + (value * SIDE - math.floor(value * SIDE)) * _OVERSAMPLE for value in brush.centre]
    radius = brush.radius * SIDE * _OVERSAMPLE
    if brush.shape == "circle":
        pen.ellipse((middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius), fill=255)
    else:
        cos, sin = math.cos(math.radians(brush.turn)), math.sin(math.radians(brush.turn))
        pen.polygon(
            [
                (middle[0] + radius * (x * cos - y * sin), middle[1] + radius * (x * sin + y * cos))
                for x, y in _OUTLINES[brush.shape]()
            ],
            fill=255,
        )
    return tile.reduce(_OVERSAMPLE)


def paint(top: Colour, bottom: Colour, brushes: tuple[Brush, ...]) -> Image.Image:
    """Paints `brushes` over a ground that shades from `top` to `bottom`: an RGB picture of SIDE x SIDE pixels."""
    shade = Image.linear_gradient("L").resize((SIDE, SIDE))
    picture = Image.composite(Image.new("RGB", (SIDE, SIDE), bottom), Image.new("RGB", (SIDE, SIDE), top), shade)
    for brush in brushes:
        reach = math.ceil(brush.radius * SIDE * 1.2) + 2
        mask = _mask(brush, reach)
        corner = [math.floor(value * SIDE) - reach for value in brush.centre]
        picture.paste((0, 0, 0), (corner[0] + 2, corner[1] + 4), mask.point([value // 4 for value in range(256)]))
        picture.paste(brush.colour, (corner[0], corner[1]), mask)
    return picture
