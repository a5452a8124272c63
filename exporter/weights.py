"""Which tensors a model's graphs take, and their way from the checkpoint into external data, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.errors import CheckpointError, LlavaDeployError
from llava_deploy.exporter.config import EMBED_TOKENS, LlavaConfig
from llava_deploy.exporter.halves import LanguageModel, VisionEncoder

if TYPE_CHECKING:
    from llava_deploy.exporter.sources.tensors import TensorSource

_CHUNK = 1 << 22  # values
_PAGE, _LINE = 4096, 64  # bytes
_INLINE = 1024  # bytes

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


def attach_weights(model: ir.Model, tensors: Mapping[str, TensorSource], path: Path, shared: SharedTable,
                   progress: Progress) -> None:  # fmt: skip
    """Write the weights of ``model`` to the external data file ``path`` and refer its parameters to it.

    Tensors stand in the order of the graph, each from the next page on, or from the next cache line where it is smaller
    than a page. A parameter named as the embedding table refers to the table's own file. Peak memory is one chunk.
    """
    with path.open("wb") as file:
        for name, value in model.graph.initializers.items():
            dtype, shape, constant = value.dtype, value.shape, value.const_value
            if dtype is None or shape is None:
                raise LlavaDeployError(f"graph {model.graph.name!r}: initializer {name!r} has no type; this is a bug")
            length = math.prod(shape.numpy()) * dtype.numpy().itemsize
            location, offset = path.name, _padded(file.tell(), length)
            if name == EMBED_TOKENS:
                location, offset = shared.path.name, shared.offset
            elif name in tensors:
                file.write(b"\0" * (offset - file.tell()))
                write_tensor(file, tensors[name], dtype.numpy(), progress)
            elif constant is None or length <= _INLINE:  # a constant of the graph's own
                continue
            else:
                file.write(b"\0" * (offset - file.tell()))
                file.write(constant.tobytes())
            value.const_value = ir.ExternalTensor(
                location, offset, length, dtype, shape=shape, name=name, base_dir=path.parent
            )


def _padded(position: int, length: int) -> int:
    alignment = _PAGE if length >= _PAGE else _LINE
    return position + -position % alignment


def write_embedding_table(path: Path, source: TensorSource, dtype: np.dtype, progress: Progress) -> SharedTable:
    """Write the token-embedding table as a ``.npy`` file, which NumPy can map."""
    with path.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": source.shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        write_tensor(file, source, dtype, progress)
    return SharedTable(path, offset)
