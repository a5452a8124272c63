"""Which tensors a model's graphs take, and their way from the checkpoint into external data, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.errors import CheckpointError, LlavaDeployError
from llava_deploy.exporter.config import EMBED_TOKENS, LlavaConfig
from llava_deploy.exporter.halves import LanguageModel, VisionEncoder
from llava_deploy.exporter.quantization.weight import QuantizedSource, require_scales

if TYPE_CHECKING:
    from llava_deploy.exporter.sources.tensors import TensorSource

_CHUNK = 1 << 22  # values
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


def write_tensor(file: BinaryIO, source: TensorSource, dtype: np.dtype, progress: Progress) -> None:
    """Append one tensor's values to ``file`` as ``dtype``, some megabytes at a time.

    Raises:
        CheckpointError: a value is NaN or infinite, or is outside the range of ``dtype``.
    """
    values = source.read().reshape(-1)
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK]
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(chunk, dtype=dtype)
        if not np.isfinite(converted).all():
            _refuse(source, chunk, dtype)
        file.write(converted.data.cast("B"))
        progress(chunk.size * source.nbytes // max(1, values.size))


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


@dataclass
class _DataFile:
    """An external data file that is being written; its tensors come one after the other."""

    file: BinaryIO
    path: Path

    @contextmanager
    def place(self, value: ir.Value) -> Iterator[None]:
        """Have ``value`` take its data from here on, on the next page, or the next cache line if it fills no page.

        The block writes it.
        """
        alignment = _PAGE if _length(value) >= _PAGE else _LINE
        self.file.write(b"\0" * (-self.file.tell() % alignment))
        offset = self.file.tell()
        yield
        value.const_value = _external(value, self.path, offset)


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
                   progress: Progress) -> None:  # fmt: skip
    """Write the weights of ``model`` to the external data file ``path`` and refer its parameters to it.

    Tensors stand in the order of the graph, each from the next page on, or from the next cache line where it is smaller
    than a page. A parameter named as the embedding table refers to the table's own file. Peak memory is one chunk, or
    one quantised weight.
    """
    with path.open("wb") as file:
        data = _DataFile(file, path)
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):  # written with the weight that it belongs to
                continue
            source = tensors.get(name)
            if isinstance(source, QuantizedSource) and _type_of(value)[0].bitwidth <= _QUANTIZED_BITS:
                _attach_quantized(model.graph.initializers, name, source, data)
                progress(source.nbytes)
            elif name == EMBED_TOKENS:
                value.const_value = _external(value, shared.path, shared.offset)
            elif source is not None:
                with data.place(value):
                    write_tensor(file, source, _type_of(value)[0].numpy(), progress)
            elif value.const_value is not None and _length(value) > _INLINE:  # a constant of the graph's own
                with data.place(value):
                    file.write(value.const_value.tobytes())


def _attach_quantized(
    initializers: Mapping[str, ir.Value], name: str, source: QuantizedSource, data: _DataFile
) -> None:
    """The weight and what belongs to it, under the names of :class:`~llava_deploy.exporter.blocks.QuantizedLinear`."""
    weight = source.read_quantized()
    scale = initializers[f"{name}_scale"]
    kind = _type_of(scale)[0].numpy()
    with np.errstate(over="ignore"):
        scales = weight.scales.astype(kind)
    require_scales(scales, f"{source.origin}, as {kind}")
    parts = {"": weight.data, "_scale": scales, "_zero_point": weight.zero_points,
             "_permutation": weight.permutation}  # fmt: skip
    for suffix, values in parts.items():
        if values is not None:
            with data.place(initializers[name + suffix]):
                data.file.write(np.ascontiguousarray(values).data.cast("B"))


def write_embedding_table(path: Path, source: TensorSource, dtype: np.dtype, progress: Progress) -> SharedTable:
    """Write the token-embedding table as a ``.npy`` file, which NumPy can map."""
    with path.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": source.shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        write_tensor(file, source, dtype, progress)
    return SharedTable(path, offset)
