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
import time
import urllib.parse
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias, runtime_checkable

import numpy as np

from llava_deploy.engines.errors import PictureError
from llava_deploy.runtime.pixels import DAMAGED, array_to_rgb, cause_of, is_upright_rgb, upright_rgb
from llava_deploy.runtime.quiet_pillow import quiet_pillow

if TYPE_CHECKING:
    from PIL import Image

# Pillow opens many more; these need no outside program (EPS runs Ghostscript) and are told by their first bytes.
# AVIF comes last: older Pillows do not know the name, and a lookup of it ends the search.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")
_SETTLED = 2.0
"""Seconds: the coarsest clock of a file system that is about, FAT's."""
_DEFLATED = 1032
"""Bytes that deflate makes of one at most (zlib's technical details, "maximum compression factor")."""
_HASHED = 1 << 20
"""Bytes of pixels that are hashed at a time: as many as stay in a processor's caches from Pillow to the hash."""
_SHOWN = 90
"""Characters of a path or URI in a message."""


@runtime_checkable
class Readable(Protocol):
    """An open binary file, or anything that reads like one."""

    def read(self, size: int = -1, /) -> bytes:
        """Read ``size`` bytes, or all."""


@runtime_checkable
class _Seekable(Protocol):
    def seek(self, offset: int, /) -> int: ...


@dataclass(frozen=True)
class TakenPicture:
    """A picture that stays as it is, so that later questions need not look at its pixels; see :func:`take_picture`.

    Attributes:
        image: upright, RGB; not to be changed.
        digest: see :func:`picture_digest`.
    """

    image: Image.Image
    digest: bytes


PictureSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Readable | Image.Image | np.ndarray | TakenPicture"
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
            (RGB order) of uint8, uint16, or floats in 0..1; or what :func:`take_picture` gave.

    Raises:
        PictureError: empty, truncated, not a picture, of more than ``MAX_PIXELS`` pixels, a missing file, a remote
            URL, or an array of another shape, dtype or range.
    """
    from PIL import Image

    if isinstance(source, TakenPicture):
        return source.image.copy()
    if isinstance(source, Image.Image):
        return upright_rgb(source, "Pillow image")
    if isinstance(source, np.ndarray):
        return array_to_rgb(source)
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


def take_picture(source: PictureSource) -> TakenPicture:
    """Load a picture for a whole conversation; source and errors as :func:`load_picture` has them."""
    if isinstance(source, TakenPicture):
        return source
    image = load_picture(source)
    return TakenPicture(image, picture_digest(image))


def source_key(source: PictureSource) -> Hashable | None:
    """What is equal only for sources that hold the same picture; ``None`` where only its pixels can tell.

    A file is told by its inode, size and times, as git tells one that was not changed; not one that was changed a
    moment ago, which may be changed again within the same tick of its file system's clock.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        source = source.encode("utf-8", "surrogatepass")
    if isinstance(source, bytes | bytearray | memoryview):
        return "bytes", hashlib.blake2b(source, digest_size=16).digest()
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        found = Path(os.fspath(source)).stat()
    except (OSError, ValueError):
        return None  # loading it says what is wrong
    if not stat.S_ISREG(found.st_mode) or time.time() - max(found.st_mtime, found.st_ctime) < _SETTLED:
        return None
    return "file", found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def picture_digest(image: Image.Image) -> bytes:
    """16 bytes that are equal for equal mode, size and pixels, in every process: the key of a feature cache.

    They are of sha256, for which processors have instructions.
    """
    width, height = image.size
    digest = hashlib.sha256(f"{image.mode} {width} {height} ".encode())
    rows = max(1, _HASHED // (width * len(image.getbands())))
    for top in range(0, height, rows):
        digest.update(image.crop((0, top, width, min(top + rows, height))).tobytes())
    return digest.digest()[:16]


def pixels_digest(source: PictureSource) -> bytes | None:
    """The digest of what :func:`load_picture` would make of a Pillow image, without making it.

    ``None`` for other sources, and for an image whose pixels are not taken as they are.
    """
    from PIL import Image

    return picture_digest(source) if isinstance(source, Image.Image) and is_upright_rgb(source) else None


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
            f"picture {name}: cannot be read ({cause_of(error)}); check the path and its rights"
        ) from error


def _from_data_uri(uri: str) -> Image.Image:
    name = f"data URI {_short(uri)}"
    head, comma, body = uri[5:].partition(",")
    if not comma:
        raise PictureError(f"{name}: want data:[type][;base64],DATA, found no comma; encode the picture again")
    data = urllib.parse.unquote_to_bytes(body.encode("utf-8", "surrogatepass"))
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
        raise PictureError(f"picture file object: cannot be read ({cause_of(error)}); open it again") from error
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
    nbytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with quiet_pillow():
            opened = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: too large by its header ({error}); scale it down first") from error
    except (UnidentifiedImageError, KeyError) as error:
        raise PictureError(
            f"{name}: not a picture, or its header is damaged; want one of {', '.join(_FORMATS)}: convert it to PNG"
        ) from error
    except DAMAGED as error:
        raise PictureError(f"{name}: its header is damaged ({cause_of(error)}); get the file again") from error
    with opened:
        _check_claim(opened, nbytes, name)
        return upright_rgb(opened, name)


def _check_claim(opened: Image.Image, nbytes: int, name: str) -> None:
    """Refuse a PNG that cannot hold what its header says: Pillow would make black pixels of all that is not there."""
    width, height = opened.size
    least = height * (1 + (width + 7) // 8)  # a filter's byte a row, and one bit a pixel
    if opened.format == "PNG" and least > _DEFLATED * nbytes:
        raise PictureError(
            f"{name}: its header says {width} x {height} pixels, too large for the {nbytes} bytes that it has; "
            "get the file again"
        )


def _short(text: str) -> str:
    """The beginning and the end, which of a path is the file's name."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 3]}…{text[-2 * _SHOWN // 3 :]}")
