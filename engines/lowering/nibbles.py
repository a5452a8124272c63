"""Four-bit weights as tensors that are computed while they are written, some megabytes of a mapped file at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

CHUNK = 1 << 22  # bytes
_ADDABLE = 16  # nibbles whose sum fits a byte: 16 * 15 < 256


def packed_bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    """A tensor's bytes as ONNX stores them, uint8 ``[nbytes]``; of external data, a read-only map of the file."""
    if isinstance(tensor, ir.ExternalTensor):
        return np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.nbytes,))
    return np.frombuffer(tensor.tobytes(), np.uint8)


def byte_chunks(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """A tensor's bytes in pieces; the whole is in memory only where the tensor is."""
    if isinstance(tensor, ChunkedTensor):
        yield from tensor.chunks()
        return
    values = packed_bytes(tensor)
    for start in range(0, values.size, CHUNK):
        yield values[start : start + CHUNK]


class ChunkedTensor(ir.LazyTensor):
    """A tensor that is computed in pieces as it is written."""

    @abstractmethod
    def chunks(self) -> Iterator[np.ndarray]:
        """Its bytes, uint8, in pieces."""


class FlippedNibbles(ChunkedTensor):
    """Unsigned 4-bit values less 8, as INT4: each nibble with its top bit flipped (``byte ^ 0x88``)."""

    def __init__(self, source: ir.TensorProtocol) -> None:
        super().__init__(self._whole, ir.DataType.INT4, ir.Shape(source.shape.numpy()), name=source.name)
        self._source = source

    def chunks(self) -> Iterator[np.ndarray]:
        """The packed bytes, uint8, in pieces."""
        for chunk in byte_chunks(self._source):
            yield chunk ^ np.uint8(0x88)

    def _whole(self) -> ir.TensorProtocol:
        """For whoever wants it in one piece, as tests do."""
        packed = np.concatenate([*self.chunks()])
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=self.shape, name=self.name)


def group_sums(packed: np.ndarray, group_size: int) -> np.ndarray:
    """Sums of each group's values, uint16 ``[groups, columns]``.

    Args:
        packed: uint8 ``[rows, columns / 2]``, two unsigned values in a byte.
        group_size: rows of a group, a multiple of 16, at most 4096.
    """
    rows, width = packed.shape
    groups = packed.reshape(rows // group_size, group_size // _ADDABLE, _ADDABLE, width)
    sums = np.empty((len(groups), 2 * width), np.uint16)
    for group, total in zip(groups, sums, strict=True):
        for half, column in ((group & 15, 0), (group >> 4, 1)):
            total[column::2] = half.sum(axis=1, dtype=np.uint8).sum(axis=0, dtype=np.uint16)
    return sums
