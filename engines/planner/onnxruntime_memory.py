"""Peak memory of ONNX Runtime on the CPU, as it builds an engine and as it runs one.

The formulas follow what it does; their constants are fitted to peaks that were measured with ONNX Runtime 1.32 on
x86-64 (``benchmarks/results/planner_peaks.json``): within a tenth there.

On x86 it has no products of float16: weights of that type become float32 as they are loaded, and so do activations. A
product's weights are packed anew in anonymous memory, and the file is read tensor by tensor. 4-bit weights at accuracy
level 4 are packed with a float32 scale and a float32 sum for each group.
"""

from __future__ import annotations

from llava_deploy.engines.names import FEATURES_KEPT
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import GraphWeights, PlannedModel, Sizes

_MB = 10**6
_FLOAT = 4  # bytes of a float32
_BUILD = Part("process", "host", 78 * _MB)
_LIBRARIES = Part("process", "mapped", 45 * _MB)
_COPIES = {2: 1.25, 4: 2.08}
"""By the bytes of a float: how often a build holds a graph's weights. float32 is there transposed, and packed."""

_QUANTIZED_COPIES = 2.35
_RUN = {2: 55 * _MB, 4: 37 * _MB}
"""Of the process, with tokenizer and picture library, by the bytes of a float."""

_WIDTHS = {2: 2.1, 4: 1.8}
"""Activations of a piece of a prompt, in multiples of two hidden and three intermediate rows of float32 a token."""

_SCORES = {2: 1.3, 4: 0.0}
"""Attention's scores are all in memory at once where the cache is float16: a buffer of float32 and its remains."""

_LATER_PIECES = 1.6
"""Scores grow from piece to piece, and the buffers of shorter ones stay; relative to the last piece's."""

_TOWER = 1.6
"""Activations of the tower, in multiples of two hidden and two intermediate rows of float32 a token."""


def onnxruntime_build_memory(model: PlannedModel) -> Memory:
    """Peak of ``llava-deploy build --backend onnxruntime``: of the larger graph, built after the other one."""
    graphs = [(model.vision_weights, 0), (model.decoder_weights, model.embedding_bytes if model.is_tied else 0)]
    weights = max(_held_in_build(graph, tied, model.itemsize) for graph, tied in graphs)
    mapped = max(_largest_float(graph, tied) for graph, tied in graphs)
    return Memory((Part("weights", "host", weights), _BUILD, Part("weights", "mapped", mapped), _LIBRARIES))


def _held_in_build(graph: GraphWeights, tied: int, itemsize: int) -> int:
    floats = graph.nbytes - graph.quantized_bytes + tied
    return int(_COPIES[itemsize] * floats + _QUANTIZED_COPIES * graph.quantized_bytes + _largest_float(graph, tied))


def _largest_float(graph: GraphWeights, tied: int) -> int:
    return max(tied, *(t.nbytes for t in graph.dense), 0)


def onnxruntime_run_memory(model: PlannedModel, sizes: Sizes) -> Memory:
    """Peak of a run on the engine, which fills the cache; the first call has it, and later ones keep it."""
    tied = model.embedding_bytes if model.is_tied else 0
    weights = _loaded(model.vision_weights, 0, model.itemsize) + _loaded(model.decoder_weights, tied, model.itemsize)
    cache = sizes.max_batch * sizes.max_len * model.cache_bytes_per_slot
    activations = _tower(model, sizes) + _prefill(model, sizes)
    # While the largest of the decoder's weights is loaded there are two of it, and no activations yet.
    largest = _largest_float(model.decoder_weights, tied) * _FLOAT // model.itemsize
    parts = (
        Part("weights", "host", weights),
        Part("KV cache", "host", cache),
        Part("activations", "host", max(activations, largest - cache)),
        Part("image features", "host", FEATURES_KEPT * model.features_bytes),
        Part("process", "host", _RUN[model.itemsize]),
        Part("weights", "mapped", max(model.vision_weights.largest, model.decoder_weights.largest, tied)),
        _LIBRARIES,
    )
    return Memory(parts)


def _loaded(graph: GraphWeights, tied: int, itemsize: int) -> int:
    """Floats as float32; of quantised matrices, the values as they are, and eight bytes a scale beside it."""
    floats = (graph.nbytes - graph.quantized_bytes + tied) * _FLOAT // itemsize
    scales = sum(t.values for t in graph.tensors if t.name.endswith("_scale"))
    return floats + graph.quantized_bytes + 2 * _FLOAT * scales


def _prefill(model: PlannedModel, sizes: Sizes) -> int:
    """Of the last piece of a prompt that fills the cache."""
    d, tokens = model.decoder, sizes.max_batch * sizes.max_seq
    rows = _FLOAT * tokens * (2 * d.hidden_size + 3 * model.intermediate_size)
    heads = model.query_size // d.head_dim
    scores = _FLOAT * tokens * heads * sizes.max_len * (1.0 if sizes.max_len == sizes.max_seq else _LATER_PIECES)
    return int(_WIDTHS[model.itemsize] * rows + _SCORES[model.itemsize] * scores)


def _tower(model: PlannedModel, sizes: Sizes) -> int:
    tokens = model.vision.patches + 1
    hidden, inner = model.tower_sizes
    rows = _FLOAT * tokens * 2 * (hidden + inner)
    scores = _FLOAT * model.tower_heads * tokens * tokens
    return int(sizes.max_images * (_TOWER * rows + scores))
