"""Lowered models on disk: passes over a model file, the result and its external data written to a new directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.lowering.nibbles import byte_chunks
from llava_deploy.engines.lowering.opening import open_model

_PAGE = 4096  # bytes: where each tensor begins, so that it can be mapped
_INLINE = 1024  # bytes; constants up to this size stay inside the graph


@dataclass(frozen=True)
class LoweredModel:
    """A lowered model on disk.

    Attributes:
        path: the ONNX file; its external data is beside it, or linked from there.
        operators: how many nodes of each operator it has, subgraphs left out.
    """

    path: Path
    operators: Counter[str]


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
    _write_external_data(model.graph.initializers.values(), path.with_name(f"{path.name}.data"))
    ir.save(model, path)
    return path


def lower_beside(source: Path, directory: Path, passes: Sequence[ir.passes.InPlacePass]) -> LoweredModel:
    """As :func:`lower_file`, but weights that no pass computes stay where they are: ``directory`` links to their files.

    For a reader of the result on this machine, while ``source`` and its external data are there.

    Raises:
        BundleError: the file is no model, or a pass meets what it does not cover.
        OSError: the directory cannot be written to, its disk is full, or the files are there already.
    """
    model = _lowered(source, passes)
    path = directory / source.name
    computed = []
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            _link(value.const_value, directory)
        else:
            computed.append(value)
    _write_external_data(computed, path.with_name(f"{path.name}.computed"))
    ir.save(model, path)
    return LoweredModel(path, Counter(node.op_type for node in model.graph))


def lower_in_memory(source: Path, passes: Sequence[ir.passes.InPlacePass], computed: Path | None = None) -> bytes:
    """Run ``passes`` over the model ``source`` and give the result as ONNX's bytes, weights not in them.

    External data is where it was, named relative to the directory of ``source``.

    Args:
        source: an ONNX file, its external data beside it.
        passes: applied in turn.
        computed: a new file below the directory of ``source``, for the weights that passes compute, as
            :func:`lower_file` writes them. ``None`` for passes that compute none: one that does would have it in
            memory, and in the result.

    Raises:
        BundleError: the file is no model, or a pass meets what it does not cover.
        OSError: ``computed`` cannot be written, its disk is full, or it is there already.
    """
    model = _lowered(source, passes)
    if computed is not None:
        values = [v for v in model.graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
        _write_external_data(values, computed, computed.absolute().relative_to(source.parent.absolute()))
    return ir.to_proto(model).SerializeToString()


def external_files(source: Path) -> list[str]:
    """Names of the files beside the model ``source`` that hold its weights, sorted.

    With tied embeddings, the table of the embeddings is one.

    Raises:
        BundleError: the file is no model, or a weight's file is not beside it.
    """
    values = open_model(source).graph.initializers.values()
    return sorted({_name_beside(v.const_value) for v in values if isinstance(v.const_value, ir.ExternalTensor)})


def _lowered(source: Path, passes: Sequence[ir.passes.InPlacePass]) -> ir.Model:
    model = open_model(source)
    try:
        for each in passes:
            each(model)
    except ir.passes.InvariantError as error:
        raise BundleError(f"{source}: {error}; export the bundle again with this version") from error
    return model


def _link(tensor: ir.ExternalTensor, directory: Path) -> None:
    """Have the name that ``tensor`` gives to its file lead to it from ``directory`` too."""
    link = directory / _name_beside(tensor)
    if not link.is_symlink():
        link.symlink_to(Path(tensor.path).resolve())


def _name_beside(tensor: ir.ExternalTensor) -> str:
    name = Path(tensor.location).name
    if name != str(tensor.location):
        raise BundleError(f"weight {tensor.name!r}: its file {name!r} is not beside the graph; export the bundle again")
    return name


def _write_external_data(values: Iterable[ir.Value], path: Path, location: Path | None = None) -> None:
    """Write all but the small constants of the graph's own, such as shapes, and refer the model to it.

    ``location`` is the name by which the model has it, relative to the directory that it is read from.
    """
    name = path.name if location is None else location.as_posix()
    with path.open("xb") as file:
        for value in values:
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
                name, offset, file.tell() - offset, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name), base_dir=path.parents[name.count("/")],
            )  # fmt: skip
