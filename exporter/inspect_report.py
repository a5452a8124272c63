"""What a checkpoint is and everything that an export will use of it, as plain values for JSON or a table."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from llava_deploy.exporter.checkpoint import Checkpoint


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint; every value is one that :func:`json.dumps` takes.

    Keys: ``name``, ``directory``, ``layout``, ``config`` (of :class:`~llava_deploy.exporter.config.LlavaConfig`, with
    ``projector.kind`` and ``image_features``), ``tensors`` (count, parameters, bytes, and the number of tensors of each
    dtype), ``files`` (path and bytes of each weight file used), ``image``, ``chat``, ``tokenizer_bytes``, ``left_out``
    (tensor in the file to the rule by which it is not used) and ``unused_keys`` (config keys without effect).
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
            "dtypes": dict(sorted(Counter(source.dtype for source in sources).items())),
        },
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in files],
        "image": dataclasses.asdict(checkpoint.image),
        "chat": dataclasses.asdict(checkpoint.chat),
        "tokenizer_bytes": len(checkpoint.tokenizer_json),
        "left_out": dict(checkpoint.left_out),
        "unused_keys": list(checkpoint.unused_keys),
    }
