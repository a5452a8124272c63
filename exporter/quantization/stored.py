"""Weights as a bundle holds them, read back: what its quantised decoder is verified against, and what a swap leaves."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.lowering.opening import open_model
from llava_deploy.engines.manifest import DECODER_GRAPH
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import LM_HEAD
from llava_deploy.exporter.quantization.weight import QuantizedWeight, WeightFormat
from llava_deploy.exporter.sources.tensors import TensorSource


@dataclass(frozen=True)
class BundleTensor:
    """A weight of a bundle's graph; a quantised one is what it stands for, float32 ``[out_features, in_features]``."""

    name: str
    path: Path
    shape: tuple[int, ...]
    parts: tuple[ir.TensorProtocol, ...]
    format: WeightFormat | None

    @property
    def key(self) -> str:
        """The initializer's name."""
        return self.name

    @property
    def dtype(self) -> str:
        """Of what ``read`` gives."""
        return "float32" if self.format is not None else str(self.parts[0].dtype.numpy())

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(part.nbytes for part in self.parts)

    @property
    def origin(self) -> str:
        """File and initializer, for messages."""
        return f"{self.path} ({self.name})"

    @property
    def files(self) -> tuple[Path, ...]:
        """The graph; its data is beside it."""
        return (self.path,)

    def read(self) -> np.ndarray:
        """The values."""
        if self.format is None:
            return self.parts[0].numpy()
        return self._quantized(self.format).dequantized()

    def _quantized(self, form: WeightFormat) -> QuantizedWeight:
        data, scales, *rest = self.parts
        zero_points = None if form.symmetric else _bytes(rest.pop(0))
        permutation = rest.pop().numpy() if form.permuted else None
        return QuantizedWeight(form, _bytes(data), np.atleast_2d(scales.numpy()), zero_points, permutation)


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    """uint8 ``[rows, bytes]``, as :class:`QuantizedWeight` has them."""
    return np.frombuffer(tensor.tobytes(), np.uint8).reshape(tensor.shape.numpy()[0], -1)


def with_stored_decoder(checkpoint: Checkpoint, bundle: Path) -> Checkpoint:
    """The checkpoint with the decoder weights of ``bundle``, which was made from it; nothing is read but the graph.

    Raises:
        InputError: a weight has another shape than the checkpoint's.
    """
    tensors: dict[str, TensorSource] = dict(checkpoint.tensors)
    for name, held in stored_tensors(bundle / DECODER_GRAPH, {*tensors, LM_HEAD}).items():
        _require_shape_of(checkpoint, name, held.shape, bundle)
        tensors[name] = held
    tied = checkpoint.config.decoder.tie_word_embeddings and LM_HEAD not in tensors
    config = replace(checkpoint.config, decoder=replace(checkpoint.config.decoder, tie_word_embeddings=tied))
    return replace(checkpoint, config=config, tensors=MappingProxyType(tensors))


def stored_tensors(path: Path, names: Container[str]) -> dict[str, BundleTensor]:
    """Those of the canonical ``names`` that are weights of the graph ``path``; nothing is read but the graph."""
    initializers = open_model(path).graph.initializers
    return {
        name: _bundle_tensor(name, value.const_value, initializers, path)
        for name, value in initializers.items()
        if value.const_value is not None and name in names
    }


def _bundle_tensor(
    name: str, tensor: ir.TensorProtocol, initializers: Mapping[str, ir.Value], path: Path
) -> BundleTensor:
    shape, bits = tuple(tensor.shape.numpy()), tensor.dtype.bitwidth
    if bits > 8:  # a float
        return BundleTensor(name, path, shape, (tensor,), None)
    parts = [tensor]
    for suffix in ("scale", "zero_point", "permutation"):
        part = initializers.get(f"{name}_{suffix}")
        if part is not None and part.const_value is not None:
            parts.append(part.const_value)
    rows, columns = shape
    groups, *one_each = parts[1].shape.numpy()  # without groups there is a scale of each column
    form = WeightFormat(
        bits=4 if bits == 4 else 8,
        group_size=rows // groups if one_each else None,
        symmetric=f"{name}_zero_point" not in initializers,
        permuted=f"{name}_permutation" in initializers,
    )
    return BundleTensor(name, path, (columns, rows), tuple(parts), form)


def _require_shape_of(checkpoint: Checkpoint, name: str, found: tuple[int, ...], bundle: Path) -> None:
    source = checkpoint.tensors.get(name)  # none: the output layer of its own that tied embeddings became
    if source is not None and source.shape != found:
        raise InputError(
            f"{bundle}: made from another model than {checkpoint.directory}, whose {name!r} has shape "
            f"{list(source.shape)}, the bundle's {list(found)}; give the checkpoint that it was exported from"
        )
