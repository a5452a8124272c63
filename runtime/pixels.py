"""Arrays and Pillow images of every mode to upright 8-bit RGB."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from llava_deploy.engines.errors import PictureError
from llava_deploy.runtime.quiet_pillow import quiet_pillow

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970
"""A picture with more pixels than this is refused by its header, before anything is decoded (0.5 GiB as RGB)."""

DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
    Warning,  # where the caller turns warnings into errors
)
"""What Pillow raises on damaged files."""

_BAND = 1 << 22
"""Pixels that are made RGB at a time."""

_EXIF_ORIENTATION = 0x0112
_WHITE = (255, 255, 255, 255)


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Load a Pillow image of any mode and give a new one, upright and RGB; see ``load_picture`` for the rules.

    Args:
        image: stays as it is, but for being loaded.
        name: what an error calls it.

    Raises:
        PictureError: empty, too large, truncated or damaged, or values out of range.
    """
    from PIL import Image

    _check_size(image.size, name)
    try:
        with quiet_pillow():
            image.load()
            orientation = _orientation(image)
        return _upright(_to_rgb(image, name), orientation)
    except PictureError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise PictureError(f"{name}: too large to decode ({cause_of(error)}); scale it down first") from error
    except DAMAGED as error:
        raise PictureError(f"{name}: truncated or damaged ({cause_of(error)}); get the file again") from error


def is_upright_rgb(image: Image.Image) -> bool:
    """Whether an image is in memory, not a file that is yet to be read, with the pixels of :func:`upright_rgb`."""
    from PIL import Image

    in_memory = type(image) is Image.Image and 0 < image.width * image.height <= MAX_PIXELS
    return in_memory and _is_plain(image) and _orientation(image) == 1


def _is_plain(image: Image.Image) -> bool:
    return image.mode == "RGB" and image.info.get("transparency") is None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Band by band where it is large: what is between must not take the memory of the picture several times."""
    from PIL import Image

    width, height = image.size
    rows = max(1, _BAND // width)
    if rows >= height or _is_plain(image):
        return _band_to_rgb(image, name)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(_band_to_rgb(band, name), (0, top))
    return whole


def _band_to_rgb(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 'I' is what Pillow makes of 16-bit PGM, 'I;16…' of 16-bit PNG and TIFF
        return Image.fromarray(_scale_16_bit(np.asarray(image), name)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_scale_unit(np.asarray(image), name)).convert("RGB")
    if image.mode == "La":  # Pillow converts premultiplied grey to nothing but LA
        image = image.convert("LA")
    if "A" in image.getbands() or image.mode == "RGBa" or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION)
    except DAMAGED:
        return 1  # a picture with a damaged EXIF block is shown as it is stored, as viewers do
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undo an EXIF orientation (Exif 2.32, tag 0x0112); values outside 2..8 mean upright."""
    from PIL import Image

    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(undo[orientation]) if orientation in undo else image


def array_to_rgb(array: np.ndarray) -> Image.Image:
    """An array as ``load_picture`` takes it, as a new RGB image.

    Raises:
        PictureError: another shape, dtype or range, empty, or too large.
    """
    from PIL import Image

    found = f"{array.dtype}{list(array.shape)}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise PictureError(
            f"picture array: want [height, width] or [height, width, 1, 3 or 4], found {found}; "
            "move the channels last, and pass the pictures of a batch one by one"
        )
    name = f"picture array {found}"
    _check_size((array.shape[1], array.shape[0]), name)
    if array.dtype == np.uint8:
        pixels = array
    elif array.dtype == np.uint16:
        pixels = _scale_16_bit(array, name)
    elif np.issubdtype(array.dtype, np.floating):
        pixels = _scale_unit(array, name)
    else:
        raise PictureError(f"{name}: want uint8, uint16 or floats in 0..1; convert it to uint8")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels)), name)


def _scale_16_bit(values: np.ndarray, name: str) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(f"{name}: want grey values in 0..65535, found {values.min()}..{values.max()}; scale them")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _scale_unit(values: np.ndarray, name: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())  # a NaN anywhere makes both NaN
    if not (low >= 0 and high <= 1):
        raise PictureError(f"{name}: want floats in 0..1, found {low}..{high}; scale them, or pass uint8")
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise PictureError(f"{name}: empty ({width} x {height} pixels); pass a picture with pixels")
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"{name}: too large ({width} x {height} pixels), want at most {MAX_PIXELS} pixels; scale it down first"
        )


def cause_of(error: BaseException) -> str:
    """An exception in a few words, on one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
