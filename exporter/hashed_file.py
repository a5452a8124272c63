"""Files that are hashed while they are written: no second pass over gigabytes for the manifest."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from threading import Condition

import numpy as np

from llava_deploy.engines.manifest import FileEntry

_BUFFER = 1 << 20  # bytes: they are hashed while they are still in the processor's cache


class HashedFile:
    """A new file that is written from its beginning to its end; a thread reads it again, close behind, and hashes it.

    Read from the file, so that the hash is of what is there, and no buffer has to be kept until it is hashed: these
    pages are still in memory.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        self._size = 0
        self._whole = False
        self._grown = Condition()
        self._entry: FileEntry | None = None

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, data: bytes | np.ndarray) -> None:
        """Append bytes, or a C-contiguous array's values.

        Raises:
            OSError: the disk is full.
        """
        left = memoryview(data).cast("B") if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
        while left:
            count = self._file.write(left)
            left = left[count:]
            with self._grown:
                self._size += count
                self._grown.notify()

    @property
    def entry(self) -> FileEntry:
        """The file as the manifest of its directory lists it; it is there when the file is whole."""
        if self._entry is None:
            raise ValueError(f"{self.path}: is still being written; this is a bug")
        return self._entry

    def seal(self, sha256: str) -> None:
        """Make the entry, of a file that is whole and its hash."""
        self._entry = FileEntry(path=self.path.name, size=self._size, sha256=sha256)

    def finish(self) -> None:
        """No byte more will be written."""
        with self._grown:
            self._whole = True
            self._grown.notify()

    def follow(self) -> str:
        """Hash the file as it grows, until it is finished; hex sha256.

        Raises:
            OSError: it cannot be read, or is shorter than what was written.
        """
        digest, buffer, at = hashlib.sha256(), memoryview(bytearray(_BUFFER)), 0
        while (end := self._wait_for_more(at)) > at:
            while at < end:
                count = os.preadv(self._file.fileno(), [buffer[: end - at]], at)
                if count == 0:
                    raise OSError(errno.EIO, "it has become shorter while it was written", str(self.path))
                digest.update(buffer[:count])
                at += count
        return digest.hexdigest()

    def _wait_for_more(self, at: int) -> int:
        """Bytes written, more than ``at``; ``at`` where no more come."""
        with self._grown:
            self._grown.wait_for(lambda: self._whole or self._size > at)
            return self._size


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Create ``path`` and give it for writing; its ``entry`` is known when the block has ended.

    Raises:
        OSError: it cannot be created, written or read again.
    """
    with path.open("w+b", buffering=0) as raw, ThreadPoolExecutor(1, "hash") as thread:
        file = HashedFile(path, raw)
        digest = thread.submit(file.follow)
        try:
            yield file
        finally:
            file.finish()
        file.seal(digest.result())
