"""Peak memory of an export; constants fitted to measured peaks (``benchmarks/results/planner_peaks.json``)."""

from __future__ import annotations

import math

from llava_deploy.engines.names import Precision
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import PlannedModel, SourceWeights

_MB = 10**6
_CHUNK = 1 << 21
"""Values that are converted at once; of what they become, so many are there:"""

_CHUNKS = 6.5
_WORKERS = 2
"""Threads that work ahead of the writer, each with a weight; as many results wait, and one is written."""

_ROWS = 64
"""Outputs of a weight that a thread rounds at once, in this many copies of float32:"""

_ROUNDING_COPIES = 4.8
_FLOATS = (91 * _MB, 32 * _MB)
_PROCESS: dict[Precision, tuple[int, int]] = {
    "fp32": _FLOATS,
    "fp16": _FLOATS,
    "int4": (306 * _MB, 112 * _MB),
    "int4-awq": (325 * _MB, 128 * _MB),
}
"""Anonymous and mapped; rounding brings PyTorch along, and AWQ transformers too."""

_LAYER = 170_000
"""Bytes of the graphs' own, for a layer of tower or decoder."""

_AWQ_COPIES = 5
"""Of a decoder layer in float32, while its scales are searched; as ``docs/quantization.md`` says."""


def export_memory(model: PlannedModel) -> Memory:
    """Peak of ``llava-deploy export`` of a checkpoint; nothing of a bundle, which needs none.

    For int4-awq the samples' hidden states come to it, which nobody knows before they are read.
    """
    source = model.source
    if source is None:
        return Memory(())
    anonymous, mapped = _PROCESS[model.precision]
    work = max(_conversion(model, source), _rounding(model, source))
    if model.precision == "int4-awq":
        work = max(work, _AWQ_COPIES * _layer_floats(model))
    return Memory(
        (
            Part("process", "host", anonymous + _LAYER * (model.decoder.layers + model.tower_layers)),
            Part("activations", "host", work),
            Part("process", "mapped", mapped),
            Part("weights", "mapped", source.largest.nbytes),
        )
    )


def _conversion(model: PlannedModel, source: SourceWeights) -> int:
    """Chunks that are being converted or wait to be written; values that are stored as wanted stay in the file."""
    is_converted = source.is_converted or source.largest.bits != 8 * model.itemsize
    return int(_CHUNKS * min(source.largest.values, _CHUNK) * model.itemsize) if is_converted else 0


def _rounding(model: PlannedModel, source: SourceWeights) -> int:
    """Whole weights in few bits, such as follow each other, and of those that are being rounded some rows as floats."""
    stored = {t.name: t.nbytes for t in model.decoder_weights.quantized}
    weights = [stored[t.name] for t in source.rounded]
    there = max((sum(weights[at : at + _WORKERS + 2]) for at in range(len(weights))), default=0)
    columns = max((t.shape[1] for t in source.rounded), default=0)  # of a weight [out_features, in_features]
    return there + int(_WORKERS * _ROUNDING_COPIES * 4 * _ROWS) * columns


def _layer_floats(model: PlannedModel) -> int:
    prefix = "language_model.layers.0."
    return 4 * sum(math.prod(t.shape) for t in model.decoder_weights.quantized if t.name.startswith(prefix))
