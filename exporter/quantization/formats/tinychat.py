"""TinyChat's files, which llm-awq writes with ``--dump_quant``: the second packing, of ``…-awq-v2.pt``.

Source: llm-awq, ``awq/quantize/qmodule.py`` (``pack_intweight`` with interleave 4 and kstride 64, ``WQLinear``). Of a
layer with K inputs and N outputs: ``qweight`` int16 ``[N / 4, K]``; ``scales`` and ``scaled_zeros`` float16
``[groups, N]``, where the K / group_size groups are filled up with zeros to a multiple of 8, 16 or 32 rows for groups
of 128, 64 or 32. Of each 4 outputs and 64 inputs the words hold output after output; of 32 inputs, word i of 8 holds
inputs i, 8 + i, 16 + i and 24 + i, from the lowest bits on.

``scaled_zeros`` is ``-(z * s)`` rounded to float16. The whole zero point z is found again from it, and has to give the
stored value, so that a weight is ``(q - z) * s`` without that rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.engines.nibbles import pack_nibbles
from llava_deploy.exporter.layouts import llava, llava_hf
from llava_deploy.exporter.quantization.formats.assemble import assemble
from llava_deploy.exporter.quantization.formats.packed import (
    PackedTensor,
    read_bytes,
    require_packed,
    require_shape,
)
from llava_deploy.exporter.quantization.request import GROUP_SIZES
from llava_deploy.exporter.quantization.weight import (
    QuantizedWeight,
    WeightFormat,
    require_scales,
)
from llava_deploy.exporter.sources.tensors import StoredTensor, TensorSource, open_file

_INTERLEAVE = 4
_STRIDE = 64
_FILLED_UP = {128: 8, 64: 16, 32: 32}
"""Group size to what the rows of its scales are a multiple of (``calculate_zeros_width``)."""


@dataclass(frozen=True)
class TinychatTensor(PackedTensor):
    """A weight in TinyChat's second packing."""

    method: ClassVar[QuantizationMethod] = "tinychat"

    def read_quantized(self) -> QuantizedWeight:
        """The weight in 4 bits."""
        qweight, scales, scaled_zeros = (self.parts[part] for part in TinychatPacking.required)
        groups = self.shape[1] // self.group_size
        values = self._without_fill(scales, groups)
        require_scales(values, scales.origin)
        zero_points = _zero_points(values, self._without_fill(scaled_zeros, groups), scaled_zeros)
        return self._weight(_unpacked(read_bytes(qweight)), values, pack_nibbles(zero_points))

    @staticmethod
    def _without_fill(source: StoredTensor, groups: int) -> np.ndarray:
        values = np.ascontiguousarray(source.read())
        if values[groups:].any():
            raise CheckpointError(
                f"{source.origin}: want zeros after its {groups} groups, found other values; "
                "this is no file of TinyChat's second packing, or is damaged"
            )
        return values[:groups]


@dataclass(frozen=True)
class TinychatPacking:
    """The file says the group size by the number of its scales."""

    required: ClassVar[tuple[str, ...]] = ("qweight", "scales", "scaled_zeros")
    optional: ClassVar[tuple[str, ...]] = ()

    def open(self, module: str, parts: Mapping[str, StoredTensor]) -> TinychatTensor:
        """As :meth:`Packing.open`."""
        qweight, scales, scaled_zeros = (parts[part] for part in self.required)
        quarter, in_features = require_packed(qweight, "int16")
        if in_features % _STRIDE:
            raise CheckpointError(
                f"{qweight.origin}: want a multiple of {_STRIDE} input features, found {in_features}; "
                "this is no file of TinyChat's second packing, or is damaged"
            )
        out_features = _INTERLEAVE * quarter
        size = _group_size(in_features, scales)
        require_shape(scales, ("float16",), (scales.shape[0], out_features), "the shape of qweight says")
        require_shape(scaled_zeros, ("float16",), scales.shape, "the shape of scales is")
        form = WeightFormat(4, size, symmetric=False, permuted=False)
        shape = (out_features, in_features)
        return TinychatTensor(f"{module}.weight", qweight.key, shape, form, size, parts)


def open_tinychat(path: Path) -> Mapping[str, TensorSource]:
    """Every tensor of a file, packed weights put together, by the file's own names.

    Raises:
        CheckpointError: no such file, damaged, or of another packing.
    """
    files = open_file(path)
    first = next((source for key, source in files.items() if key.endswith(".qzeros")), None)
    if first is not None:
        raise CheckpointError(
            f"{first.origin}: want TinyChat's second packing (int16 qweight, scales, scaled_zeros), found qzeros, "
            "which its first one has; convert the file with tinychat/offline-weight-repacker.py of llm-awq"
        )
    return assemble(files, TinychatPacking(), f"--quantized {path}")


def tinychat_name(key: str) -> str | None:
    """Canonical name of a tensor; llm-awq names them as the original layout does, whichever the checkpoint has."""
    return llava.canonical_name(key) or llava_hf.canonical_name(key)


def _group_size(in_features: int, scales: StoredTensor) -> int:
    rows = {
        size: -(-(in_features // size) // _FILLED_UP[size]) * _FILLED_UP[size]
        for size in GROUP_SIZES
        if in_features % size == 0
    }
    found = scales.shape[0] if len(scales.shape) == 2 else None
    for size, wanted in rows.items():
        if wanted == found:
            return size
    wanted_rows = " or ".join(f"{wanted} rows (groups of {size})" for size, wanted in rows.items())
    raise CheckpointError(
        f"{scales.origin}: want {wanted_rows} for {in_features} input features, found {list(scales.shape)}; "
        "this is no file of TinyChat's second packing, or is damaged"
    )


def _zero_points(scales: np.ndarray, scaled_zeros: np.ndarray, source: StoredTensor) -> np.ndarray:
    """The zero points, uint8 like ``scales``, of which ``scaled_zeros`` are the rounded products."""
    wide = scales.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.rint(-scaled_zeros.astype(np.float32) / wide)
        is_wrong = ~((found >= 0) & (found <= 15)) | ((-(wide * found)).astype(np.float16) != scaled_zeros)
    if is_wrong.any():
        group, column = (int(index[0]) for index in np.nonzero(is_wrong))
        value, scale = float(scaled_zeros[group, column]), float(scales[group, column])
        raise CheckpointError(
            f"{source.origin}: want -(z * scale) with a whole z from 0 to 15, found {value:g} for the scale {scale:g} "
            f"in group {group}, output {column}; the file is damaged"
        )
    return found.astype(np.uint8)


def _unpacked(words: np.ndarray) -> np.ndarray:
    """uint8 ``[N / 4, K, 2]`` to ``[K, N / 2]``, the even output in the low half of each byte."""
    quarter, in_features, size = words.shape
    blocks = in_features // _STRIDE
    # [N / 4, K / 64, pair of outputs, one of the pair, half of the 64 inputs, word, byte]
    split = words.reshape(quarter, blocks, 2, 2, 2, 8, size)
    even, odd = split[:, :, :, 0], split[:, :, :, 1]  # [N / 4, K / 64, pair, half, word, byte]
    data = np.empty((blocks, 2, size, 2, 8, quarter, 2), np.uint8)  # […, half, byte, nibble, word, N / 4, pair]
    order = (1, 3, 5, 4, 0, 2)
    data[:, :, :, 0] = ((even & 15) | (odd << 4)).transpose(order)
    data[:, :, :, 1] = ((even >> 4) | (odd & 0xF0)).transpose(order)
    return data.reshape(in_features, 2 * quarter)
