"""Models opened for reading: weights stay on the disk, in files that may have other names as well."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from llava_deploy.engines.errors import BundleError


def open_model(path: Path) -> ir.Model:
    """A model whose external data is read when its values are wanted.

    onnx-ir refuses external data that has more than one hard link, lest a link lead out of the model's directory.
    Bundles have such files for good reasons: what a new version of a bundle takes over of the old one is not copied,
    and backups do the same. A manifest says what is in them, by sha256. Symbolic links that lead out are refused here
    too.

    Raises:
        BundleError: the file is no model; or, when values are read, a weight's file is outside its directory.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # damaged files raise anything
        cause = " ".join(str(error).split())
        raise BundleError(f"{path}: cannot be read as ONNX ({cause}); export the bundle again") from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _stored(value.const_value)
    return model


class _StoredTensor(ir.ExternalTensor):
    """With a check of its own in the place of onnx-ir's, which it calls before it opens the file."""

    def _check_path_containment(self) -> None:
        home, path = Path(self.base_dir).resolve(), Path(self.path).resolve()
        if not path.is_relative_to(home):
            raise BundleError(f"weight {self.name!r}: leads out of {home} to {path}; export the bundle again")


def _stored(tensor: ir.ExternalTensor) -> _StoredTensor:
    return _StoredTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(tensor.name),
        base_dir=tensor.base_dir,
    )
