"""Puts the tensors of each packed layer together, so that whoever names tensors sees one weight a layer."""

from __future__ import annotations

from collections.abc import Mapping

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.quantization.formats.packed import Packing
from llava_deploy.exporter.sources.tensors import StoredTensor, TensorSource

_MARKS = frozenset("qweight qzeros scaled_zeros weight_packed weight_zero_point".split())
"""Last parts of names that no dense layer has, in any packing that is known here."""


def assemble(files: Mapping[str, StoredTensor], packing: Packing | None, config: str) -> dict[str, TensorSource]:
    """A file's tensors with each set of a packed layer as one ``….weight``; dense ones stay as they are.

    Args:
        files: tensors by the files' own names.
        packing: what the config says they are packed in; ``None``: nothing is.
        config: where that was said, for messages.

    Raises:
        CheckpointError: a part of a layer is missing, of another packing, or does not fit to the others; packed and
            dense values of one layer; a config that says nothing of packed layers, or of some where there are none.
    """
    wanted = () if packing is None else (*packing.required, *packing.optional)
    layers: dict[str, dict[str, StoredTensor]] = {}
    assembled: dict[str, TensorSource] = {}
    for key, source in files.items():
        module, _, part = key.rpartition(".")
        if part in wanted:
            layers.setdefault(module, {})[part] = source
        elif part in _MARKS:
            raise _unknown(source, packing, config)
        else:
            assembled[key] = source
    if packing is None:
        return assembled
    if not layers:
        raise CheckpointError(
            f"{config}: want packed layers ({', '.join(packing.required)}), found none; "
            "if the weights were unpacked, take quantization_config out of config.json"
        )
    for module, parts in layers.items():
        name = f"{module}.weight"
        missing = [part for part in packing.required if part not in parts]
        if missing:
            first = next(parts[part] for part in wanted if part in parts)
            raise CheckpointError(
                f"{first.origin}: want {', '.join(f'{module}.{part}' for part in missing)} beside it, found none; "
                "the file is damaged, or was not written whole: take it from its source again"
            )
        ordered = {part: parts[part] for part in wanted if part in parts}
        source = ordered[packing.required[0]]
        if name in assembled:
            raise CheckpointError(
                f"{source.origin}: holds packed values of {name!r}, and {assembled[name].origin} dense ones; "
                "remove those that are stale"
            )
        assembled[name] = packing.open(module, ordered)
    return assembled


def _unknown(source: StoredTensor, packing: Packing | None, config: str) -> CheckpointError:
    if packing is None:
        return CheckpointError(
            f"{source.origin}: is part of a quantised layer, and {config} has no quantization_config; copy it there "
            "from quant_config.json or quantize_config.json with its quant_method, or take the unquantised checkpoint"
        )
    return CheckpointError(
        f"{source.origin}: is part of a quantised layer, and not of the packing that {config} says, which has "
        f"{', '.join(packing.required)}; do the files belong to this config.json?"
    )
