"""A linear layer's weight in 4 or 8 bits, in the bytes that ONNX stores, and where such a weight comes from."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.engines.nibbles import unpack_nibbles


@dataclass(frozen=True)
class WeightFormat:
    """How a weight ``[in_features, out_features]`` is stored.

    Attributes:
        bits: of one value.
        group_size: input features that share a scale and a zero point; ``None``: all of them.
        symmetric: no zero points; values are signed. Otherwise they are unsigned, each group with its own zero point.
        permuted: the input features are taken in another order (GPTQ's act-order).
    """

    bits: Literal[4, 8]
    group_size: int | None
    symmetric: bool
    permuted: bool


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that stands for ``(values - zero_points) * scales``, as ONNX's ``DequantizeLinear`` has it.

    Attributes:
        format: how to read the rest.
        data: uint8; 4 bits: ``[in_features, out_features / 2]``, the even column in the low half of each byte; 8 bits:
            ``[in_features, out_features]``. Symmetric values are in two's complement.
        scales: float16 or float32 ``[groups, out_features]``, one group where ``group_size`` is ``None``.
        zero_points: uint8 packed like ``data``, ``[groups, out_features / 2]``; ``None`` where symmetric.
        permutation: int64 ``[in_features]``: the input feature that row ``i`` belongs to; ``None`` unless permuted.
    """

    format: WeightFormat
    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    permutation: np.ndarray | None

    @property
    def in_features(self) -> int:
        """Rows."""
        return int(self.data.shape[0])

    @property
    def out_features(self) -> int:
        """Columns."""
        return int(self.scales.shape[1])

    def values(self) -> np.ndarray:
        """The integers with their zero points taken off, int16 ``[in_features, out_features]``."""
        if self.format.bits == 8:
            return self.data.view(np.int8).astype(np.int16)
        values = unpack_nibbles(self.data).astype(np.int16)
        if self.zero_points is None:
            return (values ^ 8) - 8
        return values - np.repeat(unpack_nibbles(self.zero_points), self._rows_per_group, axis=0)

    def dequantized(self) -> np.ndarray:
        """What it stands for, as a linear layer keeps it: float32 ``[out_features, in_features]``."""
        scales = np.repeat(self.scales.astype(np.float32), self._rows_per_group, axis=0)
        weight = self.values() * scales  # [in_features, out_features]
        if self.permutation is not None:
            ordered = np.empty_like(weight)
            ordered[self.permutation] = weight
            weight = ordered
        return np.ascontiguousarray(weight.T)

    @property
    def _rows_per_group(self) -> int:
        return self.in_features // int(self.scales.shape[0])


def require_scales(scales: np.ndarray, origin: str) -> None:
    """Hold scales to what a weight can be made with.

    Raises:
        CheckpointError: one is NaN, infinite or zero.
    """
    for is_bad, what in ((~np.isfinite(scales), "NaN or infinite"), (scales == 0, "zero")):
        if is_bad.any():
            group, column = (int(index[0]) for index in np.nonzero(is_bad))
            raise CheckpointError(
                f"{origin}: {int(is_bad.sum())} of {scales.size} scales are {what}, the first in group {group}, output "
                f"{column}; the checkpoint is damaged, take it from its source again"
            )


class QuantizedSource:
    """A :class:`~llava_deploy.exporter.sources.tensors.TensorSource` that holds a quantised weight.

    Subclasses are frozen dataclasses with the attributes below; ``method`` is a constant of the class. To whoever does
    not ask for the quantised form it is a float32 tensor ``[out_features, in_features]``.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    format: WeightFormat
    method: ClassVar[QuantizationMethod]

    @abstractmethod
    def read_quantized(self) -> QuantizedWeight:
        """The weight in few bits.

        Raises:
            CheckpointError: its parts do not fit together, or a scale is NaN, infinite or zero.
        """

    @property
    @abstractmethod
    def origin(self) -> str:
        """File and key, for messages."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that its values come from."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are read for it."""

    @property
    def dtype(self) -> str:
        """Of what ``read`` gives."""
        return "float32"

    def read(self) -> np.ndarray:
        """The weight that it stands for, float32 ``[out_features, in_features]``."""
        return self.read_quantized().dequantized()
