"""A decoder's weights in the forms that a bundle has its own in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.manifest import Manifest
from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import LM_HEAD
from llava_deploy.exporter.quantization.plan import rounded
from llava_deploy.exporter.quantization.weight import QuantizedSource, WeightFormat
from llava_deploy.exporter.sources.tensors import TensorSource

_AWQ: tuple[QuantizationMethod, ...] = ("awq", "autoawq", "tinychat")


def quantized_as(
    checkpoint: Checkpoint, formats: Mapping[str, WeightFormat], manifest: Manifest, bundle: Path
) -> Checkpoint:
    """The checkpoint with every weight that ``formats`` names in that form, as an export makes it.

    A weight that the checkpoint holds quantised stays as it is, value for value: whether its form is the bundle's shows
    in the graph. A float is rounded to the nearest, where the bundle's weights were, or of the output layer.

    Raises:
        InputError: the bundle's weights were quantised by a method that is more than rounding, and these were not.
    """
    recipe = manifest.quantization
    if recipe is None:
        return checkpoint
    tensors: dict[str, TensorSource] = dict(checkpoint.tensors)
    for name, form in formats.items():
        source = tensors[name]
        if isinstance(source, QuantizedSource):
            if manifest.model.precision == "int4-awq" and source.method not in (*_AWQ, "rtn"):
                raise InputError(
                    f"{checkpoint.directory}: want weights by AWQ, as {bundle} has them, found {source.method}; "
                    "export this checkpoint to a bundle of its own with --precision int4"
                )
        elif form.permuted or (recipe.method != "rtn" and name != LM_HEAD):
            raise InputError(_no_rounding(checkpoint, bundle, recipe.method))
        else:
            tensors[name] = rounded(source, form, name)
    return replace(checkpoint, tensors=MappingProxyType(tensors))


def _no_rounding(checkpoint: Checkpoint, bundle: Path, method: QuantizationMethod) -> str:
    if method == "awq":
        step = f"search anew with: llava-deploy export {checkpoint.directory} -o {bundle} --precision int4-awq --force"
    else:
        step = f"quantise the checkpoint in the same way ({method}) and swap that, or export it with --precision int4"
    return (
        f"{checkpoint.directory}: holds its decoder in floats, and the weights of {bundle} were quantised by {method}: "
        f"to round these to the nearest would be another, less exact model; {step}"
    )
