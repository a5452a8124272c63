"""One zstd frame and nothing else: what it says of itself, its content in order, and that the file ends where it ends.

A decoder takes what follows a frame for the next one, or leaves it unread; so the frame's blocks are counted here while
their bytes pass. Source: RFC 8878, section 3.1.1.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

import zstandard

from llava_deploy.engines.errors import BundleError, LlavaDeployError
from llava_deploy.runtime.archive.listing import REMEDY

LEVEL = 1
"""Weights gain nothing from more: level 12 takes seven times as long for the same size of float16 and int4."""

WORKERS = 4
"""Threads of the compressor. A constant: the bytes with none differ from those with some."""

WINDOW_LOG = 20
LARGEST_WINDOW = 8 << 20
"""Bytes: a frame that wants more memory than this to be read is refused."""

LARGEST_FACTOR = 64
"""A frame whose header promises more than so many times the file is refused as a bomb: text shrinks to a tenth, weights
hardly at all, and zstd itself goes to some 30,000."""

HARMLESS = 16 << 20
"""Bytes of content that no factor is asked of: a few pictures of one colour shrink to nothing."""

MAGIC = zstandard.FRAME_HEADER
_SKIPPABLE = b"\x2a\x4d\x18"  # the last three bytes of the magic number of a frame that decoders pass over
_LONGEST_HEADER = 18
_LARGEST_BLOCK = 128 << 10
_RLE, _RESERVED = 1, 3
_CHECKSUM = 4
_CHUNK = 1 << 20


def is_archive(path: Path) -> bool:
    """Whether a path leads to a file that begins like an archive."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def compressor() -> zstandard.ZstdCompressor:
    """What makes an archive's frame; its size has to be given to it beforehand."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=WINDOW_LOG, threads=WORKERS, write_checksum=True, write_content_size=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class Frame:
    """The content of a frame, in order.

    Attributes:
        path: of the file.
        size: of the file, in bytes.
        content_size: of the content, in bytes, as the header promises and the decoder enforces.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._source = _FrameSource(path, file)
        header = self._source.header
        self.content_size = header.content_size
        if header.window_size > LARGEST_WINDOW:
            raise BundleError(
                f"{path}: want a frame with a window of at most {LARGEST_WINDOW:,} bytes, found one of "
                f"{header.window_size:,}; {REMEDY}"
            )
        if self.content_size > max(HARMLESS, LARGEST_FACTOR * self.size):
            raise BundleError(
                f"{path}: a decompression bomb: {self.size:,} bytes that promise to become {self.content_size:,}, more "
                f"than {LARGEST_FACTOR} times as many; do not use it"
            )
        # It calls nothing of a file but read.
        decoder = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._reader = decoder.stream_reader(cast("IO[bytes]", self._source), read_size=_CHUNK, closefd=False)

    def read(self, size: int) -> bytes:
        """The next bytes of the content, ``size`` of them or fewer, but at least one.

        Raises:
            BundleError: the content ends before, or the frame is damaged.
        """
        content = self._read(size)
        if not content:
            raise BundleError(f"{self.path}: its content is shorter than its header says; {REMEDY}")
        return content

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes.

        Raises:
            BundleError: as :meth:`read`.
        """
        parts = []
        while size:
            parts.append(self.read(size))
            size -= len(parts[-1])
        return b"".join(parts)

    def finish(self) -> None:
        """Have the decoder compare the checksum, and see that the file ends with the frame.

        Raises:
            BundleError: there is more, or the checksum is another.
        """
        if self._read(1):
            raise BundleError(f"{self.path}: its content is longer than its header says; {REMEDY}")
        self._source.finish()

    def _read(self, size: int) -> bytes:
        try:
            return self._reader.read(size)
        except zstandard.ZstdError as error:
            raise BundleError(f"{self.path}: damaged: {error}; copy it again") from error


@contextlib.contextmanager
def open_frame(path: Path) -> Iterator[Frame]:
    """Open the file of an archive, and judge its frame by its header.

    Raises:
        BundleError: no such file, no frame, or one that is never read: without a size or a checksum, with a
            dictionary, with a window that takes too much memory, or a bomb.
        LlavaDeployError: the file cannot be read.
    """
    if not path.exists():
        raise BundleError(f"{path}: want an archive, found nothing; make one with: llava-deploy pack BUNDLE -o {path}")
    if not path.is_file():
        found = "a directory" if path.is_dir() else f"a file of mode {stat.filemode(path.stat().st_mode)}"
        raise BundleError(f"{path}: want an archive that llava-deploy pack made, found {found}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise LlavaDeployError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    with file:
        yield Frame(path, file)


class _FrameSource:
    """What the decoder reads from: the bytes of a file up to the end of its one frame."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._left = 0  # bytes until the next block's header, or until the end
        self._block = b""  # what has come of a block's header
        self._is_last = False
        begin = self._from_file(_LONGEST_HEADER)
        self.header, length = _judged(path, begin)
        self._begin = begin
        self._walk(begin[length:])

    def read(self, size: int) -> bytes:
        """The next bytes, at most ``size``, as a decoder asks for them."""
        if self._begin:
            chunk, self._begin = self._begin, b""
            return chunk
        if self._is_last and not self._left:
            return b""
        chunk = self._from_file(min(size, _CHUNK))
        if not chunk:
            raise BundleError(f"{self._path}: cut short: the frame goes on after the file's end; copy it again")
        self._walk(chunk)
        return chunk

    def finish(self) -> None:
        """See that the file ends here."""
        self._refuse_more(self._from_file(_CHECKSUM))

    def _walk(self, chunk: bytes) -> None:
        """Follow the blocks through the next bytes of the file."""
        at = 0
        while at < len(chunk):
            if self._left:
                step = min(self._left, len(chunk) - at)
                self._left -= step
                at += step
            elif self._is_last:
                self._refuse_more(chunk[at:])
            else:
                part = chunk[at : at + 3 - len(self._block)]
                self._block += part
                at += len(part)
                if len(self._block) == 3:
                    self._begin_block(int.from_bytes(self._block, "little"))
                    self._block = b""

    def _begin_block(self, header: int) -> None:
        kind, size = header >> 1 & 3, header >> 3
        if kind == _RESERVED or size > _LARGEST_BLOCK:
            raise BundleError(f"{self._path}: damaged: a block of kind {kind} and {size:,} bytes; copy it again")
        self._is_last = bool(header & 1)
        self._left = (1 if kind == _RLE else size) + (_CHECKSUM if self._is_last else 0)

    def _refuse_more(self, rest: bytes) -> None:
        if not rest:
            return
        found = "a second frame" if rest[:4] == MAGIC or rest[1:4] == _SKIPPABLE else "more data"
        raise BundleError(f"{self._path}: want the file to end with its frame, found {found} behind it; {REMEDY}")

    def _from_file(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise LlavaDeployError(f"{self._path}: cannot be read ({error.strerror}); copy it again") from error


def _judged(path: Path, begin: bytes) -> tuple[zstandard.FrameParameters, int]:
    """The header of a frame that begins so, and its length in bytes."""
    if begin[: len(MAGIC)] != MAGIC:
        found = f"one that begins with {begin[:8]!r}" if begin else "an empty one"
        raise BundleError(f"{path}: want a file that llava-deploy pack made, a zstd frame, found {found}")
    try:
        header, length = zstandard.get_frame_parameters(begin), zstandard.frame_header_size(begin)
    except zstandard.ZstdError as error:
        raise BundleError(f"{path}: damaged: no header of a zstd frame ({error}); copy it again") from error
    wrong = {
        "its content's size": header.content_size == zstandard.CONTENTSIZE_UNKNOWN,
        "a checksum": not header.has_checksum,
        "no dictionary": header.dict_id != 0,
    }
    for wanted, is_wrong in wrong.items():
        if is_wrong:
            raise BundleError(f"{path}: want a frame with {wanted}, as llava-deploy pack makes it; {REMEDY}")
    return header, length
