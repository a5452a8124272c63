"""The pictures of the goldens: drawn, so that every model is asked about the same ones, and kept as PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from llava_deploy.exporter.demo.scenes import Scene, Thing

LEAST_SIDE, MOST_SIDE = 16, 448
"""Pixels of a tower's side that the pictures are drawn for; a larger tower has them scaled up."""

SCENE = Scene((Thing(0, "circle", "red"), Thing(5, "star", "blue"), Thing(7, "square", "green")), look=7)
PORTRAIT = Scene((Thing(1, "cross", "purple"), Thing(6, "triangle", "orange")), look=11)
LANDSCAPE = Scene((Thing(4, "star", "yellow"),), look=2)
_COLOURS = 64  # of the one with a palette


def golden_pictures(image_size: int) -> tuple[bytes, bytes, bytes]:
    """Three PNG files: a landscape in colour, a portrait with a palette, and a landscape in grey.

    None is square or of the model's size, so that each is resized, and padded or cropped: the portrait is narrower than
    the tower's side, the others are larger. What surrounds the drawn scenes has edges and no two equal columns or rows,
    so that a picture that is off by a pixel shows.
    """
    side = min(max(image_size, LEAST_SIDE), MOST_SIDE)
    colour = _picture(SCENE, (7 * side // 4 + 5, 5 * side // 4 + 3))
    portrait = _picture(PORTRAIT, (4 * side // 5, 4 * side // 3 + 1)).quantize(_COLOURS, dither=Image.Dither.NONE)
    grey = _picture(LANDSCAPE, (2 * side + 1, 3 * side // 2)).convert("L")
    return _png(colour), _png(portrait), _png(grey)


def open_png(data: bytes) -> Image.Image:
    """A picture as RGB, as transformers and LLaVA's tools make it of one that has no transparency."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return image.convert("RGB")


def _picture(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """The scene in the middle of a chequered ground that shades along both sides."""
    width, height = size
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    fields = (x // 7 + y // 5) % 2
    red, green, blue = 40 + 180 * x // width + 0 * y, 40 + 180 * y // height + 0 * x, 70 + 110 * fields
    ground = Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))
    inner = min(size) - min(size) // 8
    drawn = scene.picture().resize((inner, inner), Image.Resampling.BICUBIC)
    ground.paste(drawn, ((width - inner) // 2, (height - inner) // 2))
    return ground


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
