"""Which tensors a model's graphs take, and their way from the checkpoint into external data, a few at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.errors import CheckpointError, LlavaDeployError
from llava_deploy.engines.manifest import FileEntry
from llava_deploy.exporter.ahead import in_order
from llava_deploy.exporter.config import EMBED_TOKENS, LlavaConfig
from llava_deploy.exporter.halves import LanguageModel, VisionEncoder
from llava_deploy.exporter.hashed_file import HashedFile, hashed_file
from llava_deploy.exporter.quantization.weight import QuantizedSource, require_scales

if TYPE_CHECKING:
    from llava_deploy.exporter.sources.tensors import TensorSource

_CHUNK = 1 << 21  # values
_PAGE, _LINE = 4096, 64  # bytes
_INLINE = 1024  # bytes
_QUANTIZED_BITS = 8  # or fewer; the floats have more

Progress = Callable[[int], None]
"""Called with the number of source bytes that were just written."""


@dataclass(frozen=True)
class SharedTable:
    """Where the embedding table's values are, for an output layer tied to it."""

    path: Path
    offset: int


def expected_tensors(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor that the graphs and the embedding table are made from.

    Taken from the graph modules' own parameters: tower layers past the feature layer are not among them.
    """
    shapes: dict[str, tuple[int, ...]] = {EMBED_TOKENS: (config.decoder.vocab_size, config.decoder.hidden_size)}
    for half in (VisionEncoder(config, ir.DataType.FLOAT), LanguageModel(config, ir.DataType.FLOAT)):
        for name, parameter in half.named_parameters():
            shapes[name] = tuple(int(size) for size in parameter.shape)
    return shapes


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a file. The first ones of a parameter name it; they start where its alignment says."""

    data: np.ndarray
    source_bytes: int
    value: ir.Value | None = None


_Job = Callable[[], list[_Piece]]


def _float_jobs(source: TensorSource, dtype: np.dtype, value: ir.Value | None) -> Iterator[_Job]:
    """One tensor's values as ``dtype``, some megabytes at a time.

    Values that are stored so are a view of the mapped file, and the system copies them from there: they are looked
    at, but are never in memory of our own.
    """
    values = np.asarray(source.read()).reshape(-1)
    for start in range(0, max(1, values.size), _CHUNK):
        chunk = values[start : start + _CHUNK]
        done = chunk.size * source.nbytes // max(1, values.size)
        yield partial(_float_piece, source, chunk, dtype, done, value if start == 0 else None)


def _float_piece(
    source: TensorSource, chunk: np.ndarray, dtype: np.dtype, source_bytes: int, value: ir.Value | None
) -> list[_Piece]:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(chunk, dtype=dtype)
    if not _all_finite(converted):
        _refuse(source, chunk, dtype)
    return [_Piece(converted, source_bytes, value)]


def _all_finite(values: np.ndarray) -> bool:
    """``np.isfinite(values).all()`` of float16 or float32, ten times as fast.

    Infinities, and behind them NaNs, are the largest bit patterns: of positive numbers as signed integers, of negative
    ones as unsigned.
    """
    size = values.itemsize
    infinity = int(np.array(np.inf, values.dtype).view(f"u{size}"))
    sign = 1 << (8 * size - 1)
    return bool(
        values.view(f"i{size}").max(initial=0) < infinity and values.view(f"u{size}").max(initial=0) < sign + infinity
    )


def _refuse(source: TensorSource, chunk: np.ndarray, dtype: np.dtype) -> NoReturn:
    wide = chunk.astype(np.float32)
    broken = int((~np.isfinite(wide)).sum())
    if broken:
        raise CheckpointError(
            f"{source.origin}: tensor {source.name!r} holds {broken} or more values that are NaN or infinite; "
            "the checkpoint is damaged, take it from its source again"
        )
    raise CheckpointError(
        f"{source.origin}: tensor {source.name!r} holds {np.abs(wide).max():g}, outside the range of {dtype}; "
        "export with --precision fp32"
    )


def _external(value: ir.Value, path: Path, offset: int) -> ir.ExternalTensor:
    dtype, shape = _type_of(value)
    return ir.ExternalTensor(
        path.name, offset, _length(value), dtype, shape=shape, name=str(value.name), base_dir=path.parent
    )


def _type_of(value: ir.Value) -> tuple[ir.DataType, ir.Shape]:
    if value.dtype is None or value.shape is None:
        raise LlavaDeployError(f"initializer {value.name!r} has no type; this is a bug")
    return value.dtype, value.shape


def _length(value: ir.Value) -> int:
    dtype, shape = _type_of(value)
    return math.prod(shape.numpy()) * dtype.bitwidth // 8


def attach_weights(model: ir.Model, tensors: Mapping[str, TensorSource], path: Path, shared: SharedTable,
                   progress: Progress) -> FileEntry:  # fmt: skip
    """Write the weights of ``model`` to the external data file ``path`` and refer its parameters to it.

    Tensors stand in the order of the graph, each from the next page on, or from the next cache line where it is smaller
    than a page. A parameter named as the embedding table refers to the table's own file. Weights are read, converted
    and rounded some steps ahead of what is written; peak memory is a few chunks, or a few quantised weights, however
    many the model has.

    Returns:
        The data file, for the manifest.

    Raises:
        CheckpointError: a value is NaN or infinite, or is outside the range of its parameter's dtype.
    """
    with hashed_file(path) as file:
        _write(file, _jobs(model.graph.initializers, tensors, shared), progress)
    return file.entry


def _write(file: HashedFile, jobs: Iterator[_Job], progress: Progress) -> None:
    for pieces in in_order(jobs):
        for piece in pieces:
            if piece.value is not None:
                alignment = _PAGE if _length(piece.value) >= _PAGE else _LINE
                file.write(b"\0" * (-file.tell() % alignment))
                piece.value.const_value = _external(piece.value, file.path, file.tell())
            file.write(piece.data)
            progress(piece.source_bytes)


def _jobs(
    initializers: Mapping[str, ir.Value], tensors: Mapping[str, TensorSource], shared: SharedTable
) -> Iterator[_Job]:
    """What is to be written of a graph; a quantised weight comes with what belongs to it."""
    for name, value in initializers.items():
        source = tensors.get(name)
        if isinstance(source, QuantizedSource) and _type_of(value)[0].bitwidth <= _QUANTIZED_BITS:
            yield partial(_quantized_pieces, initializers, name, source)
        elif name == EMBED_TOKENS:
            value.const_value = _external(value, shared.path, shared.offset)
        elif source is not None:
            yield from _float_jobs(source, _type_of(value)[0].numpy(), value)
        elif value.const_value is not None and _length(value) > _INLINE:  # a constant of the graph's own
            yield partial(_constant_pieces, value, value.const_value)


def _constant_pieces(value: ir.Value, constant: ir.TensorProtocol) -> list[_Piece]:
    return [_Piece(np.frombuffer(constant.tobytes(), np.uint8), 0, value)]


def _quantized_pieces(initializers: Mapping[str, ir.Value], name: str, source: QuantizedSource) -> list[_Piece]:
    """The weight and what belongs to it, under the names of :class:`~llava_deploy.exporter.blocks.QuantizedLinear`."""
    weight = source.read_quantized()
    kind = _type_of(initializers[f"{name}_scale"])[0].numpy()
    with np.errstate(over="ignore"):
        scales = weight.scales.astype(kind)
    require_scales(scales, f"{source.origin}, as {kind}")
    parts = {"_scale": scales, "_zero_point": weight.zero_points, "_permutation": weight.permutation}
    return [
        _Piece(np.ascontiguousarray(weight.data), source.nbytes, initializers[name]),
        *(
            _Piece(np.ascontiguousarray(values), 0, initializers[name + suffix])
            for suffix, values in parts.items()
            if values is not None
        ),
    ]


def write_embedding_table(
    path: Path, source: TensorSource, dtype: np.dtype, progress: Progress
) -> tuple[SharedTable, FileEntry]:
    """Write the token-embedding table as a ``.npy`` file, which NumPy can map.

    Returns:
        Where its values are, and the file for the manifest.

    Raises:
        CheckpointError: a value is NaN or infinite, or is outside the range of ``dtype``.
    """
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": source.shape})
    with hashed_file(path) as file:
        file.write(header.getvalue())
        _write(file, _float_jobs(source, dtype, None), progress)
    return SharedTable(path, header.tell()), file.entry
