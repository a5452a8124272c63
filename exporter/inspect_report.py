"""What a checkpoint is and everything that an export will use of it, as plain values for JSON or a table."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.weight import QuantizedSource
from llava_deploy.exporter.sources.tensors import TensorSource


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint; every value is one that :func:`json.dumps` takes.

    Keys: ``name``, ``directory``, ``layout``, ``config`` (of :class:`~llava_deploy.exporter.config.LlavaConfig`, with
    ``projector.kind`` and ``image_features``), ``tensors`` (count, parameters, bytes, and the number of tensors of each
    dtype), ``quantized`` (``weights``: name to how it is stored; ``dense``: linear layers of the decoder that are not,
    where some are), ``files`` (path and bytes of each weight file used), ``image``, ``chat``, ``tokenizer_bytes``,
    ``left_out`` (tensor in the file to the rule by which it is not used) and ``unused_keys`` (config keys without
    effect).
    """
    config, sources = checkpoint.config, checkpoint.tensors.values()
    fields = dataclasses.asdict(config)
    fields["projector"]["kind"] = config.projector.kind
    fields["image_features"] = config.image_features
    files = sorted({path for source in sources for path in source.files})
    return {
        "name": checkpoint.name,
        "directory": str(checkpoint.directory),
        "layout": config.layout,
        "config": fields,
        "tensors": {
            "count": len(checkpoint.tensors),
            "parameters": sum(math.prod(source.shape) for source in sources),
            "bytes": sum(source.nbytes for source in sources),
            "dtypes": dict(sorted(Counter(map(_dtype, sources)).items())),
        },
        "quantized": _quantized(checkpoint),
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in files],
        "image": dataclasses.asdict(checkpoint.image),
        "chat": dataclasses.asdict(checkpoint.chat),
        "tokenizer_bytes": len(checkpoint.tokenizer_json),
        "left_out": dict(checkpoint.left_out),
        "unused_keys": list(checkpoint.unused_keys),
    }


def _quantized(checkpoint: Checkpoint) -> dict[str, Any]:
    weights = {
        name: _form(source) for name, source in checkpoint.tensors.items() if isinstance(source, QuantizedSource)
    }
    linears = decoder_linears(checkpoint.config) if weights else ()
    return {"weights": weights, "dense": [name for name in linears if name not in weights]}


def _form(source: QuantizedSource) -> str:
    form = source.format
    groups = "one scale an output" if form.group_size is None else f"groups of {form.group_size}"
    order = ", input features permuted" if form.permuted else ""
    return f"{source.method}, {_dtype(source)}, {groups}{order}"


def _dtype(source: TensorSource) -> str:
    """As it is stored: with zero points the integers are unsigned."""
    if not isinstance(source, QuantizedSource):
        return source.dtype
    return f"{'' if source.format.symmetric else 'u'}int{source.format.bits}"
