"""What the packed formats have in common: parts that stand under one module's name, groups, scales, zero points."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.quantization.request import GROUP_SIZES
from llava_deploy.exporter.quantization.weight import (
    QuantizedSource,
    QuantizedWeight,
    WeightFormat,
    require_scales,
)
from llava_deploy.exporter.sources.tensors import DTYPES, StoredTensor

PER_INT32 = 8
"""4-bit values in an int32."""

_TOP_BITS = np.uint8(0x88)  # of both nibbles: q - 8 in two's complement is q with its top bit flipped
_DAMAGED = "the files do not belong together, or are damaged: take them from their source again"


class Packing(Protocol):
    """How one format stores a linear layer.

    Attributes:
        required: last parts of the names of a layer's tensors; the first is the packed values.
        optional: more of them.
    """

    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]

    def open(self, module: str, parts: Mapping[str, StoredTensor]) -> PackedTensor:
        """One layer's weight, from its tensors; nothing is read.

        Raises:
            CheckpointError: their shapes or dtypes do not fit together, or to the config.
        """


@dataclass(frozen=True)
class PackedTensor(QuantizedSource):
    """A weight that stands in several tensors of a file.

    Attributes:
        group_size: input features that share a scale in the file; a multiple of the format's, whose groups repeat
            scales and zero points where the file's are wider.
        parts: the tensors, by the last part of their names.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    format: WeightFormat
    group_size: int
    parts: Mapping[str, StoredTensor]

    @property
    def origin(self) -> str:
        """File and key of the packed values."""
        return next(iter(self.parts.values())).origin

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(part.path for part in self.parts.values()))

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @abstractmethod
    def read_quantized(self) -> QuantizedWeight:
        """The weight in 4 bits."""

    def _weight(
        self,
        data: np.ndarray,
        scales: np.ndarray,
        zero_points: np.ndarray | None,
        *,
        permutation: np.ndarray | None = None,
    ) -> QuantizedWeight:
        """Put unsigned values together; the arguments are as in :class:`QuantizedWeight`, groups as in the file.

        ``zero_points`` of a symmetric weight have to be 8, and ``None`` means that they are.
        """
        repeats = self.group_size // self._stored_group
        scales = np.repeat(scales, repeats, axis=0)
        if self.format.symmetric:
            if zero_points is not None and (zero_points != _TOP_BITS).any():
                raise CheckpointError(
                    f"{self.origin}: want zero points of 8, as the config says that the weights are symmetric, found "
                    f"others; correct quantization_config, and for GPTQ its checkpoint_format too"
                )
            return QuantizedWeight(self.format, data ^ _TOP_BITS, scales, None, permutation)
        if zero_points is None:
            raise CheckpointError(f"{self.origin}: want zero points, found none; {_DAMAGED}")
        return QuantizedWeight(self.format, data, scales, np.repeat(zero_points, repeats, axis=0), permutation)

    @property
    def _stored_group(self) -> int:
        return self.shape[1] if self.format.group_size is None else self.format.group_size


def group_sizes(in_features: int, said: int, source: StoredTensor) -> tuple[int, int]:
    """How many input features share a scale in the file, and in a weight of ours.

    Args:
        in_features: of the layer.
        said: what the config says; -1 means all.
        source: the packed values, for messages.

    Raises:
        CheckpointError: the groups do not divide the input features, or cannot be cut into groups of 32 or more.
    """
    size = in_features if said == -1 else said
    if in_features % size:
        raise CheckpointError(
            f"{source.origin}: want input features that groups of {size} divide, as the config's group_size says, "
            f"found {in_features}; {_DAMAGED}"
        )
    stored = next((group for group in sorted(GROUP_SIZES, reverse=True) if size % group == 0), None)
    if stored is None:
        raise CheckpointError(
            f"{source.origin}: want groups of a multiple of {min(GROUP_SIZES)} input features, found {size}; "
            "other groups are not supported: take the unquantised checkpoint"
        )
    return size, stored


def require_packed(source: StoredTensor, dtype: str) -> tuple[int, int]:
    """Hold the packed values to their dtype, and give their shape.

    Raises:
        CheckpointError: another dtype, or not two dimensions.
    """
    if source.dtype != dtype or len(source.shape) != 2 or 0 in source.shape:
        raise CheckpointError(
            f"{source.origin}: want {dtype} values in two dimensions, found {source.dtype} {list(source.shape)}; "
            f"this is no such packing, or {_DAMAGED}"
        )
    return source.shape[0], source.shape[1]


def require_shape(source: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...], reason: str) -> None:
    """Hold another part to its dtype and shape; ``reason`` says where the shape follows from.

    Raises:
        CheckpointError: it is of another dtype or shape.
    """
    if source.dtype not in dtypes or source.shape != shape:
        raise CheckpointError(
            f"{source.origin}: want {' or '.join(dtypes)} {list(shape)}, as {reason}, found {source.dtype} "
            f"{list(source.shape)}; {_DAMAGED}"
        )


SCALE_DTYPES = tuple(DTYPES)
"""What scales may be stored in."""


def read_scales(source: StoredTensor) -> np.ndarray:
    """Scales as float16 or float32; bfloat16 is widened, which is exact.

    Raises:
        CheckpointError: one is NaN, infinite or zero.
    """
    scales = source.read()
    scales = scales.astype(np.float32) if scales.dtype.name == "bfloat16" else np.ascontiguousarray(scales)
    require_scales(scales, source.origin)
    return scales


def read_bytes(source: StoredTensor) -> np.ndarray:
    """Packed integers as the bytes that they consist of, the lowest first: ``[…, columns, bytes of one]``."""
    values = np.ascontiguousarray(source.read_integers())
    return values.view(np.uint8).reshape(*values.shape, values.itemsize)


def rows_from_words(words: np.ndarray) -> np.ndarray:
    """Unpack int32 words that hold 8 rows each, the first in the lowest bits.

    Args:
        words: uint8 ``[rows / 8, columns, 4]``.

    Returns:
        uint8 ``[rows, columns / 2]``, the even column in the low half of each byte.
    """
    groups, columns, size = words.shape
    rows = np.empty((groups, size, 2, columns // 2), np.uint8)
    for byte in range(size):
        even, odd = words[:, 0::2, byte], words[:, 1::2, byte]
        np.bitwise_or(even & 15, odd << 4, out=rows[:, byte, 0])
        np.bitwise_or(even >> 4, odd & 0xF0, out=rows[:, byte, 1])
    return rows.reshape(groups * size * 2, columns // 2)


def order_by_group(source: StoredTensor, groups: int, group_size: int) -> np.ndarray:
    """The input features in the order of their groups, int64 ``[in_features]``, from a ``g_idx``.

    Raises:
        CheckpointError: a group that is not there, or one of another size than the others.
    """
    index = source.read_integers()
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise CheckpointError(
            f"{source.origin}: want groups from 0 to {groups - 1}, found {int(index.min())} to {int(index.max())}; "
            f"{_DAMAGED}"
        )
    counts = np.bincount(index, minlength=groups)
    if (counts != group_size).any():
        group = int(np.flatnonzero(counts != group_size)[0])
        raise CheckpointError(
            f"{source.origin}: want {group_size} input features in each group, found {int(counts[group])} in group "
            f"{group}; an unbalanced g_idx cannot be stored in groups of one size: take the unquantised checkpoint"
        )
    return np.argsort(index, kind="stable").astype(np.int64)


def require_in_order(source: StoredTensor, group_size: int) -> None:
    """Hold a ``g_idx`` to groups that follow each other.

    Raises:
        CheckpointError: they do not, where the config says so.
    """
    index = source.read_integers()
    if not np.array_equal(index, np.arange(index.size) // group_size):
        raise CheckpointError(
            f"{source.origin}: want groups of {group_size} in order, as the config says (desc_act, actorder), found "
            "another order; correct quantization_config if the checkpoint was quantised with activation order"
        )
