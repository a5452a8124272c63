"""What a swap leaves as it is, read back from the bundle, under canonical names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_deploy.engines.arrays import mapped_array
from llava_deploy.engines.contract import DecoderShape
from llava_deploy.engines.manifest import EMBEDDING_TABLE
from llava_deploy.exporter.config import EMBED_TOKENS
from llava_deploy.exporter.sources.tensors import TensorSource

_CHUNK = 1 << 22  # values


@dataclass(frozen=True)
class StoredTable:
    """A bundle's token-embedding table."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        """The canonical name."""
        return self.name

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def origin(self) -> str:
        """The file, for messages."""
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.path,)

    def read(self) -> np.ndarray:
        """The values, mapped.

        Raises:
            BundleError: the file holds something else.
        """
        return mapped_array(self.path, self.dtype, self.shape, remedy="export the bundle again")


def stored_table(bundle: Path, shape: DecoderShape) -> StoredTable:
    """The table of ``bundle``, whose decoder has this shape."""
    return StoredTable(EMBED_TOKENS, bundle / EMBEDDING_TABLE, (shape.vocab_size, shape.hidden_size), shape.dtype)


def differs(stored: TensorSource, given: TensorSource) -> bool:
    """Whether a weight has other values than those stored, once it is rounded to their dtype."""
    want, found = np.asarray(stored.read()).reshape(-1), np.asarray(given.read()).reshape(-1)
    return want.shape != found.shape or any(not np.array_equal(left, right) for left, right in _chunks(want, found))


def _chunks(want: np.ndarray, found: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, want.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        with np.errstate(over="ignore"):
            yield want[part], found[part].astype(want.dtype)
