"""Lowered models on disk: passes over a model file, the result and its external data written to a new directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.lowering.nibbles import byte_chunks

_PAGE = 4096  # bytes: where each tensor begins, so that it can be mapped
_INLINE = 1024  # bytes; constants up to this size stay inside the graph


def lower_file(source: Path, directory: Path, passes: Sequence[ir.passes.InPlacePass]) -> Path:
    """Run ``passes`` over the model ``source`` and write the result, under the same name, into ``directory``.

    External data goes into one file beside it, some megabytes at a time: what is in memory of a weight beyond that is
    what a pass computes of it, at a time of one weight. Files that are there after an error are not whole.

    Args:
        source: an ONNX file, its external data beside it.
        directory: exists, and holds no file by these names.
        passes: applied in turn.

    Returns:
        The new ONNX file.

    Raises:
        BundleError: the file is no model, or a pass meets what it does not cover.
        OSError: the directory cannot be written to, its disk is full, or the files are there already.
    """
    model = _lowered(source, passes)
    path = directory / source.name
    _write_external_data(model, path.with_name(f"{path.name}.data"))
    ir.save(model, path)
    return path


def lower_in_memory(source: Path, passes: Sequence[ir.passes.InPlacePass]) -> bytes:
    """Run ``passes`` over the model ``source`` and give the result as ONNX's bytes, weights not in them.

    External data is where it was, named relative to the directory of ``source``. For passes that compute no weight:
    one that does would have it in memory, and in the result.

    Raises:
        BundleError: the file is no model, or a pass meets what it does not cover.
    """
    return ir.to_proto(_lowered(source, passes)).SerializeToString()


def _lowered(source: Path, passes: Sequence[ir.passes.InPlacePass]) -> ir.Model:
    try:
        model = ir.load(source)
    except Exception as error:
        cause = " ".join(str(error).split())
        raise BundleError(f"{source}: cannot be read as ONNX ({cause}); export the bundle again") from error
    try:
        for each in passes:
            each(model)
    except ir.passes.InvariantError as error:
        raise BundleError(f"{source}: {error}; export the bundle again with this version") from error
    return model


def _write_external_data(model: ir.Model, path: Path) -> None:
    """Write all but the small constants of the graph's own, such as shapes, and refer the model to it."""
    with path.open("xb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or (
                not isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) and tensor.nbytes <= _INLINE
            ):
                continue
            file.write(b"\0" * (-file.tell() % _PAGE))
            offset = file.tell()
            for chunk in byte_chunks(tensor):
                file.write(chunk.data)
            value.const_value = ir.ExternalTensor(
                path.name, offset, file.tell() - offset, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name), base_dir=path.parent,
            )  # fmt: skip
