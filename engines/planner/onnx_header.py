"""Names, types and shapes of an ONNX file's initializers, read off its bytes.

A planner has to work where nothing but the runtime is installed, and a graph whose weights are in external data is
short. Format: Protocol Buffers' encoding, and the field numbers of ``onnx.proto`` (ONNX 1.20). Standard library only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 1, 2, 8, 9
_INT64 = 7
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
"""Width of the element types of ``TensorProto.DataType``."""


@dataclass(frozen=True)
class TensorSize:
    """A tensor's name and what decides its bytes.

    Attributes:
        name: of the initializer.
        shape: outermost first.
        bits: of one value.
        integers: the values of a short vector of int64, such as the shape that a Reshape takes; else empty.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    integers: tuple[int, ...] = ()

    @property
    def values(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values, packed."""
        return (self.values * self.bits + 7) // 8


def read_initializers(path: Path) -> tuple[TensorSize, ...]:
    """The initializers of a model file, in the order of the file; external data is not touched.

    Raises:
        BundleError: no file, or not an ONNX model.
    """
    try:
        model = memoryview(path.read_bytes())
        graphs = [value for number, value in _fields(model) if number == _MODEL_GRAPH]
        if not graphs:
            raise ValueError("it holds no graph")
        return tuple(_tensor(value) for number, value in _fields(_bytes(graphs[0])) if number == _GRAPH_INITIALIZER)
    except (OSError, ValueError, TypeError, KeyError, IndexError, struct.error) as error:
        raise BundleError(f"{path}: cannot be read as ONNX ({error}); export the bundle again") from error


def _tensor(value: int | memoryview) -> TensorSize:
    shape: list[int] = []
    kind, name, raw = 0, "", b""
    for number, field in _fields(_bytes(value)):
        if number == _DIMS:
            shape += [field] if isinstance(field, int) else _varints(field)
        elif number == _DATA_TYPE and isinstance(field, int):
            kind = field
        elif number == _NAME:
            name = str(_bytes(field), "utf-8")
        elif number == _RAW_DATA:
            raw = bytes(_bytes(field)[:64])
    integers = struct.unpack(f"<{len(raw) // 8}q", raw) if kind == _INT64 and len(raw) % 8 == 0 else ()
    return TensorSize(name, tuple(shape), _BITS[kind], integers if math.prod(shape) == len(integers) else ())


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise TypeError(f"want a message, found the number {value}")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of a message; numbers of fixed width are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif wire == _BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("it is cut short")
            yield number, data[at : at + length]
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"byte {at} is of no message")


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"byte {at} is of no number")
