"""Peak memory of ONNX Runtime on the CPU, as it builds an engine and as it runs one.

The formulas follow what it does; their constants are fitted to peaks that were measured with ONNX Runtime 1.32 on
x86-64 (``benchmarks/results/planner_peaks.json``).

An engine is float32 throughout, whatever the bundle's floats are: weights, activations and the cache. A build has each
float once, transposed; a product's weights are packed when a session is opened for a run, in anonymous memory, and the
file is read tensor by tensor. 4-bit weights at accuracy level 4 are packed with a float32 scale and a float32 sum for
each group.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_deploy.engines.names import FEATURES_KEPT
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import TABLES, GraphWeights, PlannedModel, Sizes

_MB = 10**6
_FLOAT = 4  # bytes of a float32
_BUILD = Part("process", "host", 78 * _MB)
_BUILD_LIBRARIES = Part("process", "mapped", 45 * _MB)
_COPIES = 1.15
"""How often a build holds a graph's floats: once, and what lies between blocks of other sizes."""

_QUANTIZED_COPIES = 1.1
_RUN = Part("process", "host", 37 * _MB)
"""With tokenizer and picture library."""

_RUN_LIBRARIES = Part("process", "mapped", 50 * _MB)

_WIDTHS = {"int4": 2.7, "floats": 1.8}
"""Activations of a piece of a prompt, in multiples of two hidden and three intermediate rows of float32 a token.

Of quantised layers, projections that read the same values come as one product, which is split, and beside it is what
they read, in 8 bits.
"""

_TOWER = 1.6
"""Activations of the tower, in multiples of two hidden and two intermediate rows of float32 a token."""


def onnxruntime_build_memory(model: PlannedModel) -> Memory:
    """Peak of ``llava-deploy build --backend onnxruntime``: of the larger graph, built after the other one."""
    graphs = _graphs(model)
    weights = max(graph.built for graph in graphs)
    mapped = max(graph.largest for graph in graphs)
    return Memory((Part("weights", "host", weights), _BUILD, Part("weights", "mapped", mapped), _BUILD_LIBRARIES))


def onnxruntime_run_memory(model: PlannedModel, sizes: Sizes) -> Memory:
    """Peak of a run on the engine, which fills the cache; the first call has it, and later ones keep it."""
    graphs = _graphs(model)
    cache = sizes.max_batch * sizes.max_len * _widened(model, model.cache_bytes_per_slot)
    activations = _tower(model, sizes) + _prefill(model, sizes)
    # While the largest of the decoder's weights is loaded there are two of it, and no activations yet.
    largest = graphs[-1].largest
    parts = (
        Part("weights", "host", sum(graph.loaded for graph in graphs)),
        Part("KV cache", "host", cache),
        Part("activations", "host", max(activations, largest - cache)),
        Part("image features", "host", FEATURES_KEPT * model.features_bytes),
        _RUN,
        Part("weights", "mapped", max(graph.largest for graph in graphs)),
        _RUN_LIBRARIES,
    )
    return Memory(parts)


def onnxruntime_decode_bytes(model: PlannedModel, batch: int, slots: int) -> int:
    """Bytes that a decode step has to read: the decoder's weights once, and ``slots`` of each of ``batch`` rows.

    Floats as the engine has them, float32; quantised matrices with their scales and zero points as the bundle has them,
    which is the least that any form of them takes: what ONNX Runtime reads beside is no part of the bound. Of the
    tables of rotary positions a step reads a row.
    """
    decoder = _graphs(model)[-1]
    tables = sum(t.nbytes for t in model.decoder_weights.tensors if t.name.endswith(TABLES))
    cache = batch * slots * _widened(model, model.cache_bytes_per_slot)
    return decoder.floats - _widened(model, tables) + decoder.quantized + cache


def onnxruntime_engine_bytes(model: PlannedModel) -> int:
    """Of an engine on the disk, which has all weights once more, floats as float32."""
    return sum(graph.floats + graph.quantized for graph in _graphs(model))


def int8_prefill_bytes(model: PlannedModel) -> int:
    """What ``build --int8 prefill`` adds to an engine, on the disk and in a run's memory: a byte for each weight.

    Measured of 1.03 thousand million weights (ONNX Runtime 1.32, int4 beside it): 1.04 GB on the disk, 0.99 GB in
    memory. The build has its peak elsewhere: 0.13 GB more.
    """
    weights = model.decoder_weights
    tied = model.decoder.vocab_size * model.decoder.hidden_size if model.is_tied else 0
    return sum(tensor.values for tensor in (*weights.dense, *weights.quantized)) + tied


@dataclass(frozen=True)
class _EngineGraph:
    """Bytes of a graph's weights in an engine.

    Attributes:
        floats: everything that is not quantised.
        quantized: quantised matrices as the bundle has them, with their scales and zero points.
        scales: how many of these there are.
        largest: the largest tensor.
    """

    floats: int
    quantized: int
    scales: int
    largest: int

    @property
    def built(self) -> int:
        """At the peak of the build."""
        return int(_COPIES * self.floats + _QUANTIZED_COPIES * self.quantized + self.largest)

    @property
    def loaded(self) -> int:
        """In a session: of quantised matrices, the values as they are, and eight bytes a scale beside them."""
        return self.floats + self.quantized + 2 * _FLOAT * self.scales


def _graphs(model: PlannedModel) -> tuple[_EngineGraph, _EngineGraph]:
    """The vision graph and the decoder."""
    tied = model.embedding_bytes if model.is_tied else 0
    return _engine_graph(model, model.vision_weights, 0), _engine_graph(model, model.decoder_weights, tied)


def _engine_graph(model: PlannedModel, graph: GraphWeights, tied: int) -> _EngineGraph:
    dense = _widened(model, max(tied, *(t.nbytes for t in graph.dense), 0))
    return _EngineGraph(
        floats=_widened(model, graph.nbytes - graph.quantized_bytes + tied),
        quantized=graph.quantized_bytes,
        scales=sum(t.values for t in graph.tensors if t.name.endswith("_scale")),
        largest=max(dense, *(t.nbytes for t in graph.quantized), 0),
    )


def _widened(model: PlannedModel, nbytes: int) -> int:
    """Floats of the bundle as float32."""
    return nbytes * _FLOAT // model.itemsize


def _prefill(model: PlannedModel, sizes: Sizes) -> int:
    """Of the last piece of a prompt that fills the cache, with an engine of ONNX Runtime 1.32 or later.

    With an older one several rows with several tokens each behind a past take the canonical Attention (see
    ``LowerGroupQueryAttention`` in ``engines/lowering``), which has all scores in memory at once, float32
    ``[batch, heads, seq, total]``, beside what is counted here; GroupQueryAttention has them by blocks.
    """
    tokens = sizes.max_batch * sizes.max_seq
    form = "int4" if model.decoder_weights.quantized else "floats"
    rows = _FLOAT * tokens * (2 * model.decoder.hidden_size + 3 * model.intermediate_size)
    return int(_WIDTHS[form] * rows)


def _tower(model: PlannedModel, sizes: Sizes) -> int:
    tokens = model.vision.patches + 1
    hidden, inner = model.tower_sizes
    rows = _FLOAT * tokens * 2 * (hidden + inner)
    scores = _FLOAT * model.tower_heads * tokens * tokens
    return int(sizes.max_images * (_TOWER * rows + scores))
