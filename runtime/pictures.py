"""Pictures as people hand them in: path, bytes, file, data URI, array or Pillow image, always to an upright RGB image.

Nothing is fetched, and Pillow's global settings are left as the caller has them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import struct
import threading
import urllib.parse
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias, runtime_checkable

import numpy as np

from llava_deploy.engines.errors import PictureError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970
"""A picture with more pixels than this is refused by its header, before anything is decoded (0.5 GiB as RGB)."""

# Pillow opens many more; these need no outside program (EPS runs Ghostscript) and are told by their first bytes.
# AVIF comes last: older Pillows do not know the name, and a lookup of it ends the search.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
_DAMAGED = (
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
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")
_EXIF_ORIENTATION = 0x0112
_WHITE = (255, 255, 255, 255)
_warnings_lock = threading.Lock()


@runtime_checkable
class Readable(Protocol):
    """An open binary file, or anything that reads like one."""

    def read(self, size: int = -1, /) -> bytes:
        """Read ``size`` bytes, or all."""


@runtime_checkable
class _Seekable(Protocol):
    def seek(self, offset: int, /) -> int: ...


PictureSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Readable | Image.Image | np.ndarray"
)


def load_picture(source: PictureSource) -> Image.Image:
    """Any picture as a new, upright Pillow image of mode RGB; of an animation, the first frame.

    - The EXIF orientation is applied.
    - Transparency (alpha channel, palette or colour key) is laid over white, as transformers' ``CLIPImageProcessor``
      does since version 5. LLaVA's own tools drop it with ``convert("RGB")``, which shows the colours under the
      transparent parts.
    - 16-bit grey is scaled to 8 bits, where ``convert("RGB")`` would clip it.

    Args:
        source: a path; a ``data:`` URI; the bytes of a picture file; an open binary file, read from its start where it
            can seek; a Pillow image, which stays as it is; or an array [height, width] or [height, width, 1, 3 or 4]
            (RGB order) of uint8, uint16, or floats in 0..1.

    Raises:
        PictureError: empty, truncated, not a picture, of more than ``MAX_PIXELS`` pixels, a missing file, a remote
            URL, or an array of another shape, dtype or range.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _from_pillow(source, "Pillow image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), "picture bytes")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _from_data_uri(source)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source))
    if isinstance(source, Readable):
        return _from_readable(source)
    raise PictureError(
        f"picture: want a path, bytes, open binary file, data URI, Pillow image or ndarray, "
        f"found {type(source).__name__}; convert it to one of these"
    )


def picture_digest(image: Image.Image) -> bytes:
    """16 bytes that are equal for equal mode, size and pixels, in every process: the key of a feature cache."""
    width, height = image.size
    digest = hashlib.blake2b(f"{image.mode} {width} {height} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


def _from_path(path: str) -> Image.Image:
    name = _short(path)
    if _URL.match(path):
        raise PictureError(f"picture {name}: want a local file, found a URL; download it first, nothing is fetched")
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise PictureError(f"picture {name}: want a picture file, found {kind}; name a file")
        with Path(path).open("rb") as file:
            return _decode(file, f"picture {name}")
    except FileNotFoundError as error:
        raise PictureError(f"picture {name}: no such file; check the path") from error
    except (OSError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(
            f"picture {name}: cannot be read ({_cause(error)}); check the path and its rights"
        ) from error


def _from_data_uri(uri: str) -> Image.Image:
    name = f"data URI {_short(uri)}"
    head, comma, body = uri[5:].partition(",")
    if not comma:
        raise PictureError(f"{name}: want data:[type][;base64],DATA, found no comma; encode the picture again")
    data = urllib.parse.unquote_to_bytes(body)
    if head.lower().endswith(";base64"):
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error as error:
            raise PictureError(f"{name}: not base64 ({error}); encode the picture again") from error
    return _from_bytes(data, name)


def _from_readable(source: Readable) -> Image.Image:
    try:
        if isinstance(source, _Seekable):
            with_start = not isinstance(source, io.IOBase) or source.seekable()
            if with_start:
                source.seek(0)
        data = source.read()
    except (OSError, ValueError) as error:
        raise PictureError(f"picture file object: cannot be read ({_cause(error)}); open it again") from error
    if not isinstance(data, bytes):
        raise PictureError(f"picture file object: want bytes, read {type(data).__name__}; open the file in mode 'rb'")
    return _from_bytes(data, "picture file object")


def _from_bytes(data: bytes, name: str) -> Image.Image:
    return _decode(io.BytesIO(data), name)


def _decode(file: BinaryIO, name: str) -> Image.Image:
    """Decode the first frame of an open, seekable file."""
    from PIL import Image, UnidentifiedImageError

    if not file.read(1):
        raise PictureError(f"{name}: empty (0 bytes); write the picture again")
    file.seek(0)
    try:
        with _quiet():
            opened = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: too large by its header ({error}); scale it down first") from error
    except (UnidentifiedImageError, KeyError) as error:
        raise PictureError(
            f"{name}: not a picture, or its header is damaged; want one of {', '.join(_FORMATS)}: convert it to PNG"
        ) from error
    except _DAMAGED as error:
        raise PictureError(f"{name}: its header is damaged ({_cause(error)}); get the file again") from error
    with opened:
        return _from_pillow(opened, name)


def _from_pillow(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    _check_size(image.size, name)
    try:
        image.load()
        return _upright(_to_rgb(image, name), _orientation(image))
    except PictureError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise PictureError(f"{name}: too large to decode ({_cause(error)}); scale it down first") from error
    except _DAMAGED as error:
        raise PictureError(f"{name}: truncated or damaged ({_cause(error)}); get the file again") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
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
    except _DAMAGED:
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


def _from_array(array: np.ndarray) -> Image.Image:
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings about the header in: what matters of them is an error here.

    Python's warning filters are one list for all threads, hence the lock.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:60] + "…")


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
