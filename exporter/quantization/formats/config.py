"""Reads ``quantization_config`` of a ``config.json``: which packing a checkpoint has, or why it cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.quantization.formats import awq, compressed_tensors_config, gptq
from llava_deploy.exporter.quantization.formats.compressed_tensors import CompressedPacking
from llava_deploy.exporter.quantization.formats.packed import Packing

KEY = "quantization_config"
_TEXT = "text_config"
_BITSANDBYTES = "bitsandbytes"
_UNQUANTISED = "take the unquantised checkpoint and export it with --precision int4 or int4-awq"

_INSTEAD = {
    _BITSANDBYTES: "its values fit no grid of integers: take the unquantised checkpoint, or load this one with "
    "transformers, call dequantize() and save_pretrained(), and export that with --precision int4 or int4-awq",
    "auto-round": "write it again with auto-round in its auto_gptq or auto_awq format, or " + _UNQUANTISED,
    "gguf": "GGUF is not read: " + _UNQUANTISED,
}
"""What to do about a method that is not read, where there is more to say than about all the others."""


@dataclass(frozen=True)
class Taken:
    """The packing that a config says, the rest of the config, and the keys of the first that nothing knows of."""

    packing: Packing | None
    fields: Fields
    unused: tuple[str, ...]


def take_packing(fields: Fields) -> Taken:
    """Part a model's config and its ``quantization_config``, which may stand beside or in ``text_config``.

    Raises:
        CheckpointError: a method, packing or value that is not read, by name.
    """
    values = dict(fields.values)
    found = fields.child(KEY) if fields.has(KEY) else None
    values.pop(KEY, None)
    text = values.get(_TEXT)
    if isinstance(text, dict) and text.get(KEY) is not None:
        inner = fields.child(_TEXT)
        below = inner.child(KEY)
        if found is not None and found.values != below.values:
            raise inner.error(KEY, f"want it absent, or equal to {KEY} at the top", "correct the file")
        found = below
        values[_TEXT] = {key: value for key, value in text.items() if key != KEY}
    rest = Fields(values, fields.where, fields.prefix)
    if found is None:
        return Taken(None, rest, ())
    packing = _packing(found)
    return Taken(packing, rest, found.unused(()))


def _packing(fields: Fields) -> Packing:
    method = _method(fields)
    if method == awq.METHOD:
        return awq.parse(fields)
    if method == gptq.METHOD:
        return gptq.parse(fields)
    if method == compressed_tensors_config.METHOD:
        return CompressedPacking(compressed_tensors_config.parse(fields))
    raise _refused(fields, method)


def _method(fields: Fields) -> str:
    if any(fields.peek(key) for key in ("load_in_4bit", "load_in_8bit")):
        return _BITSANDBYTES
    return fields.require("quant_method", str).lower()


def _refused(fields: Fields, method: str) -> CheckpointError:
    known = ", ".join(map(repr, (awq.METHOD, gptq.METHOD, compressed_tensors_config.METHOD)))
    key = "quant_method" if fields.has("quant_method") else "load_in_4bit"
    return fields.error(
        key, f"want {known}", f"{method} checkpoints are not read: {_INSTEAD.get(method, _UNQUANTISED)}"
    )
