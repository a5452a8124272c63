"""Pictures to ``pixel_values``, as LLaVA's tools and transformers' ``CLIPImageProcessor`` (Pillow backend) do it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from llava_deploy.engines.errors import PictureError
from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.runtime.pixels import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image


def preprocess(image: Image.Image, recipe: ImageRecipe) -> np.ndarray:
    """One RGB picture as the vision graph takes it.

    Equal to ``CLIPImageProcessor`` bit for bit. A picture so narrow that resizing all of it would need more than
    ``MAX_PIXELS`` pixels, which the original attempts, is resized only where the crop keeps it.

    Returns:
        float32 [3, height, width], RGB.

    Raises:
        PictureError: the picture is not RGB, or is so narrow that padding or resizing it would need more than
            ``MAX_PIXELS`` pixels.
    """
    pixels = _cropped_pixels(image, recipe)
    out = np.empty((3, *pixels.shape[:2]), np.float32)
    _normalise(pixels, recipe, out)
    return out


def preprocess_batch(images: Sequence[Image.Image], recipe: ImageRecipe, out: np.ndarray) -> None:
    """Write ``preprocess`` of each picture into ``out``.

    Args:
        images: RGB pictures of any sizes.
        recipe: how each is prepared.
        out: float32 or float16 [images, 3, height, width]; all of it is overwritten.

    Raises:
        PictureError: a picture comes out in another size than ``out`` holds, or cannot be prepared at all; or there
            are more or fewer pictures than places.
    """
    if len(images) != len(out):
        raise PictureError(f"pixel_values: want {len(out)} pictures, found {len(images)}; pass one for each place")
    for index, (image, place) in enumerate(zip(images, out, strict=True)):
        pixels = _cropped_pixels(image, recipe)
        if place.shape != (3, *pixels.shape[:2]):
            raise PictureError(
                f"picture {index}: want pixels of shape {list(place.shape)}, its recipe gives "
                f"{[3, *pixels.shape[:2]]}; export the bundle again with a crop or an exact size"
            )
        _normalise(pixels, recipe, place)


def _normalise(pixels: np.ndarray, recipe: ImageRecipe, out: np.ndarray) -> None:
    """``pixels`` uint8 [height, width, 3] into ``out`` float [3, height, width]."""
    table = _value_table(recipe.rescale_factor, recipe.mean, recipe.std)
    for channel in range(3):
        out[channel] = table[channel].take(pixels[:, :, channel])


@lru_cache(maxsize=8)
def _value_table(
    rescale_factor: float | None, mean: tuple[float, float, float] | None, std: tuple[float, float, float] | None
) -> np.ndarray:
    """What each 8-bit value becomes, float32 [3, 256], in ``CLIPImageProcessor``'s own order and precisions."""
    levels = np.arange(256, dtype=np.float64)
    scaled = (levels if rescale_factor is None else levels * rescale_factor).astype(np.float32)
    table = np.repeat(scaled[None], 3, axis=0)  # [3, 256]
    if mean is not None:
        table -= np.array(mean, np.float32)[:, None]
    if std is not None:
        table /= np.array(std, np.float32)[:, None]
    table.setflags(write=False)
    return table


def _cropped_pixels(image: Image.Image, recipe: ImageRecipe) -> np.ndarray:
    """Pad, resize and crop; uint8 [height, width, 3]."""
    if image.mode != "RGB":
        raise PictureError(f"picture: want mode RGB, found {image.mode}; pass it through load_picture first")
    if recipe.pad_to_square:
        image = _pad_to_square(image, recipe.pad_color)
    width, height = _resized_size(image.size, recipe.resize)
    crop_height, crop_width = (height, width) if recipe.crop is None else recipe.crop
    left, right, x = _window(width, crop_width)
    top, bottom, y = _window(height, crop_height)
    if (right - left) * (bottom - top) > MAX_PIXELS:
        raise PictureError(
            f"picture: {image.width} x {image.height} pixels would be resized to {width} x {height}, "
            f"want at most {MAX_PIXELS} pixels; cut it to a less narrow shape first"
        )
    if recipe.resize is not None and width * height > MAX_PIXELS:
        # Not the rule: Pillow keeps the box in float32 and may filter the axes in the other order, so values differ.
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
        pixels = np.asarray(image.resize((right - left, bottom - top), recipe.resample, box=box))
    else:
        whole = image if recipe.resize is None else image.resize((width, height), recipe.resample)
        pixels = np.asarray(whole)[top:bottom, left:right]
    if pixels.shape[:2] == (crop_height, crop_width):
        return pixels
    canvas = np.zeros((crop_height, crop_width, 3), np.uint8)
    canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return canvas


def _resized_size(size: tuple[int, int], resize: tuple[str, int] | tuple[str, int, int] | None) -> tuple[int, int]:
    """(width, height) after the resize; sizes are cut, not rounded, as the original does."""
    if resize is None:
        return size
    if len(resize) == 3:
        _, height, width = resize
        return width, height
    width, height = size
    short = resize[1]
    long = int(short * max(size) / min(size))
    return (short, long) if width <= height else (long, short)


def _window(size: int, crop: int) -> tuple[int, int, int]:
    """Of one axis: the range that a centre crop keeps, and where that range starts in the crop.

    Where the crop is larger than the picture, the odd pixel of padding goes before it.
    """
    if size >= crop:
        start = (size - crop) // 2
        return start, start + crop, 0
    return 0, size, (crop - size + 1) // 2


def _pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """LLaVA's ``expand2square`` (``llava/mm_utils.py``): centred, the odd pixel of padding after the picture."""
    from PIL import Image

    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    if side * side > MAX_PIXELS:
        raise PictureError(
            f"picture: {width} x {height} pixels would be padded to {side} x {side}, "
            f"want at most {MAX_PIXELS} pixels; scale it down first"
        )
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
