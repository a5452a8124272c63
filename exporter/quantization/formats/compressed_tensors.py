"""compressed-tensors' ``pack-quantized`` format, as llm-compressor writes it.

Source: compressed-tensors, ``compressors/pack_quantized/base.py`` and ``helpers.py`` (``pack_to_int32``),
``quantization/lifecycle/forward.py`` (``_process_quantization``) and ``utils/match.py``. Of a layer with K inputs and
N outputs: ``weight_packed`` int32 ``[N, K / 8]``, 8 inputs in an int32, ``weight_scale`` ``[N, K / group_size]``, where
it is asymmetric ``weight_zero_point`` int32 ``[N / 8, K / group_size]``, 8 outputs in an int32, with activation order
``weight_g_idx`` ``[K]``, and ``weight_shape`` [N, K]. Integers are signed, and stored with 8 added, from the lowest
bits on. A weight is ``(q - z) * s``; one -1 in ``weight_g_idx`` says that the groups are in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.exporter.quantization.formats.compressed_tensors_config import Scheme, Schemes
from llava_deploy.exporter.quantization.formats.packed import (
    PER_INT32,
    SCALE_DTYPES,
    PackedTensor,
    group_sizes,
    order_by_group,
    read_bytes,
    read_scales,
    require_packed,
    require_shape,
)
from llava_deploy.exporter.quantization.weight import QuantizedWeight, WeightFormat
from llava_deploy.exporter.sources.tensors import StoredTensor

_INDICES = ("int32", "int64")


@dataclass(frozen=True)
class CompressedTensor(PackedTensor):
    """A weight in the ``pack-quantized`` format."""

    method: ClassVar[QuantizationMethod] = "compressed-tensors"

    def read_quantized(self) -> QuantizedWeight:
        """The weight in 4 bits."""
        self._require_said_shape()
        data = _transposed(read_bytes(self.parts["weight_packed"]))
        permutation = None
        if self.format.permuted:
            permutation = self._permutation()
            data = data[permutation]
        scales = read_scales(self.parts["weight_scale"])
        zero_points = None
        if "weight_zero_point" in self.parts:
            words = read_bytes(self.parts["weight_zero_point"])  # [N / 8, groups, 4]
            zero_points = words.transpose(1, 0, 2).reshape(words.shape[1], -1)[:, : self.shape[0] // 2]
        return self._weight(data, np.ascontiguousarray(scales.T), zero_points, permutation=permutation)

    def _permutation(self) -> np.ndarray:
        source = self.parts["weight_g_idx"]
        if (source.read_integers() == -1).any():
            return np.arange(self.shape[1], dtype=np.int64)
        return order_by_group(source, self.shape[1] // self.group_size, self.group_size)

    def _require_said_shape(self) -> None:
        source = self.parts.get("weight_shape")
        if source is None:
            return
        said = source.read_integers().tolist()
        if said != list(self.shape):
            raise CheckpointError(
                f"{source.origin}: want {list(self.shape)}, as weight_packed has it, found {said}; "
                "the file is damaged: take it from its source again"
            )


@dataclass(frozen=True)
class CompressedPacking:
    """What the config says of each layer."""

    required: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    optional: ClassVar[tuple[str, ...]] = ("weight_zero_point", "weight_g_idx", "weight_shape")

    schemes: Schemes

    def open(self, module: str, parts: Mapping[str, StoredTensor]) -> CompressedTensor:
        """As :meth:`Packing.open`."""
        packed, scales = (parts[part] for part in self.required)
        scheme = self.schemes.of(module, packed.origin)
        out_features, words = require_packed(packed, "int32")
        in_features = PER_INT32 * words
        size, stored = group_sizes(in_features, scheme.group_size, packed)
        if out_features % 2:
            raise CheckpointError(
                f"{packed.origin}: want an even number of outputs, to store 4 bits each, found {out_features}; "
                "leave this layer out of the quantisation"
            )
        groups = in_features // size
        reason = f"weight_packed and group_size {scheme.group_size} of its config group say"
        require_shape(scales, SCALE_DTYPES, (out_features, groups), reason)
        self._require_zero_point(module, parts, scheme, (-(-out_features // PER_INT32), groups))
        if "weight_g_idx" in parts:
            require_shape(parts["weight_g_idx"], _INDICES, (in_features,), "the shape of weight_packed says")
        elif scheme.is_ordered_by_activation:
            raise _missing(packed, module, "weight_g_idx", "actorder says")
        if "weight_shape" in parts:
            require_shape(parts["weight_shape"], _INDICES, (2,), "a weight's shape is")
        permuted = "weight_g_idx" in parts and groups > 1
        form = WeightFormat(4, stored, scheme.symmetric, permuted)
        shape = (out_features, in_features)
        return CompressedTensor(f"{module}.weight", packed.key, shape, form, size, parts)

    @staticmethod
    def _require_zero_point(
        module: str, parts: Mapping[str, StoredTensor], scheme: Scheme, shape: tuple[int, int]
    ) -> None:
        packed, source = parts["weight_packed"], parts.get("weight_zero_point")
        if scheme.symmetric and source is not None:
            raise CheckpointError(
                f"{source.origin}: want no zero points, as the config says that the weight is symmetric, found some; "
                "correct quantization_config, or take the checkpoint from its source again"
            )
        if scheme.symmetric:
            return
        if source is None:
            raise _missing(packed, module, "weight_zero_point", "the config says that it is asymmetric")
        require_shape(source, ("int32",), shape, "weight_packed and the config say")


def _missing(packed: StoredTensor, module: str, part: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{packed.origin}: want {module}.{part} beside it, as {reason}, found none; "
        "the file is damaged: take it from its source again"
    )


def _transposed(words: np.ndarray) -> np.ndarray:
    """uint8 ``[N, K / 8, 4]``, two inputs in a byte, to ``[K, N / 2]``, two outputs in a byte."""
    rows = words.reshape(len(words), -1)  # [N, K / 2]
    even, odd = rows[0::2].T, rows[1::2].T  # [K / 2, N / 2]
    data = np.empty((2 * rows.shape[1], len(rows) // 2), np.uint8)
    data[0::2] = (even & 15) | (odd << 4)
    data[1::2] = (even >> 4) | (odd & 0xF0)
    return data
