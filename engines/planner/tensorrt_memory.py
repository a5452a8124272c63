"""Peak memory of TensorRT, as it builds engines and as it runs them.

What a build takes of the host is fitted to measured peaks (``benchmarks/results/planner_peaks.json``), with TensorRT
for RTX 1.7. What either takes of a device is an estimate from the graphs' shapes: it was never measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_deploy.engines.decoder_parts import layer_ranges
from llava_deploy.engines.names import FEATURES_KEPT, CacheForm
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import GraphWeights, PlannedModel, Sizes
from llava_deploy.engines.planner.parts import part_weights
from llava_deploy.engines.tensorrt_module import TensorRtBackend

_MB = 10**6
_BUILD = 225 * _MB
_INT4_LAYER = 14 * _MB
"""What compiling an int4 layer's kernels leaves until the build is over; of layers of floats nothing was seen."""

_COPIES = 1.67
"""How often a decoder's layers of floats have their weights at the peak, in anonymous memory; the file that they come
from is mapped.

This and the next ones with what is freed given back to the system: see ``engines/tensorrt/heap.py``.
"""

_TOWER_COPIES = 1.2
"""Likewise of the tower."""

_QUANTIZED_COPIES = 2.0
"""Of quantised matrices, whose zero points are of four bytes each then."""

_FLOATS_BESIDE = 0.7
"""Of a decoder's floats that are in no layer, and of all where its layers are quantised: mostly the output layer, once
the layers are done."""

_ZERO_POINT = 4  # bytes, of a float32

_LIBRARIES = Part("process", "mapped", 116 * _MB)
_RUN = Part("process", "host", 400 * _MB)
"""Assumed, for Python, TensorRT's libraries and CUDA's bookkeeping."""

_CONTEXT = 500 * _MB
"""Assumed for a CUDA context with TensorRT's kernels, on the device."""

_SMALLEST_WORKSPACE = 32 * _MB
"""Assumed for layers whose kernels want one."""


def tensorrt_build_memory(
    model: PlannedModel, backend: TensorRtBackend, sizes: Sizes, cache: CacheForm, parts: Sequence[int]
) -> Memory:
    """Peak of ``llava-deploy build`` for TensorRT: of the largest part of the decoder, or the tower.

    They are built one after the other. The full TensorRT tries kernels on the GPU, layer by layer: with the graph's
    weights and the largest activations, but no cache. TensorRT for RTX needs no GPU. What is mapped is the largest
    graph's weights.
    """
    graphs, held = [engine_bytes(model.vision_weights)], [(int(_TOWER_COPIES * model.vision_weights.nbytes), 0)]
    for layers in layer_ranges(parts):
        part, tied = part_weights(model, layers), _tied(model) if layers.stop == model.decoder.layers else 0
        graphs.append(engine_bytes(part) + tied)
        held.append((_held_in_build(part, tied), _INT4_LAYER * len(layers) if part.quantized else 0))
    weights, kernels = max(held, key=sum)
    host = (
        Part("weights", "host", weights),
        Part("process", "host", _BUILD + kernels),
        Part("weights", "mapped", max(graphs)),
        _LIBRARIES,
    )
    if backend == "tensorrt-rtx":
        return Memory(host)
    device = (
        Part("weights", "device", max(graphs)),
        Part("activations", "device", _activations(model, sizes, cache)),
        Part("workspace", "device", _workspace(model)),
        Part("process", "device", _CONTEXT),
    )
    return Memory((*device, *host))


def tensorrt_run_memory(model: PlannedModel, sizes: Sizes, cache: CacheForm, parts: Sequence[int]) -> Memory:
    """Peak of a run that fills its cache; parts of a decoder have hidden states between them, in two buffers."""
    weights = engine_bytes(model.vision_weights) + engine_bytes(model.decoder_weights) + _tied(model)
    inputs = _step_inputs(model, sizes)
    hidden = min(2, len(parts) - 1) * sizes.max_batch * sizes.max_seq * model.decoder.hidden_size * model.itemsize
    taken = (
        Part("weights", "device", weights),
        Part("KV cache", "device", _cache(model, sizes, cache)),
        Part("activations", "device", _activations(model, sizes, cache) + inputs + hidden),
        Part("workspace", "device", _workspace(model)),
        Part("image features", "device", FEATURES_KEPT * model.features_bytes),
        Part("process", "device", _CONTEXT),
        _RUN,
        Part("activations", "host", inputs),  # pinned, of the same layout
        Part("weights", "mapped", model.embedding_bytes),
    )
    return Memory(taken)


def engine_bytes(weights: GraphWeights) -> int:
    """Of a graph in an engine: zero points in few bits have become floats, as many as there are scales."""
    scales = {t.name.removesuffix("_scale"): t for t in weights.tensors if t.name.endswith("_scale")}
    zero_points = [t for t in weights.tensors if t.name.endswith("_zero_point")]
    widened = sum(scales[t.name.removesuffix("_zero_point")].nbytes - t.nbytes for t in zero_points)
    return weights.nbytes + widened


def _held_in_build(weights: GraphWeights, tied: int) -> int:
    if not weights.quantized:
        layers = sum(t.nbytes for t in weights.tensors if t.name.startswith("language_model.layers."))
        return int(_COPIES * layers + _FLOATS_BESIDE * (weights.nbytes - layers + tied))
    zero_points = [t for t in weights.tensors if t.name.endswith("_zero_point")]
    quantized = weights.quantized_bytes + sum(_ZERO_POINT * t.values - t.nbytes for t in zero_points)
    return int(_QUANTIZED_COPIES * quantized + _FLOATS_BESIDE * (weights.nbytes - weights.quantized_bytes + tied))


def _tied(model: PlannedModel) -> int:
    return model.embedding_bytes if model.is_tied else 0


def _cache(model: PlannedModel, sizes: Sizes, cache: CacheForm) -> int:
    """A cache that grows is in two buffers, which take turns, and has a slot more."""
    slots = sizes.max_len if cache == "in-place" else 2 * (sizes.max_len + 1)
    return sizes.max_batch * slots * model.cache_bytes_per_slot


def _activations(model: PlannedModel, sizes: Sizes, cache: CacheForm) -> int:
    """Of the hungrier engine, as both share one block: the widest place of a layer.

    Releases whose caches grow have no operator for attention either: its scores are counted once, as float32.
    """
    d, item = model.decoder, model.itemsize
    tokens = sizes.max_batch * sizes.max_seq
    mlp = 2 * d.hidden_size + 3 * model.intermediate_size  # residual and its norm; gate, up and their product
    attention = 2 * d.hidden_size + 2 * model.query_size
    decoder = tokens * max(mlp, attention) * item
    hidden, inner = model.tower_sizes
    seen = model.vision.patches + 1
    tower = sizes.max_images * seen * (2 * hidden + 2 * inner) * item
    if cache == "growing":
        decoder += 4 * tokens * (model.query_size // d.head_dim) * sizes.max_len
        tower += 4 * sizes.max_images * model.tower_heads * seen * seen
    return max(decoder, tower)


def _step_inputs(model: PlannedModel, sizes: Sizes) -> int:
    """Embeddings and mask of the longest piece of a prompt, and logits."""
    d = model.decoder
    tokens = sizes.max_batch * sizes.max_seq
    return tokens * (d.hidden_size * model.itemsize + sizes.max_len) + 4 * sizes.max_batch * d.vocab_size


def _workspace(model: PlannedModel) -> int:
    """Room for the largest quantised matrix as floats, which a long prompt is multiplied with."""
    return max((t.values * model.itemsize for t in model.decoder_weights.quantized), default=_SMALLEST_WORKSPACE)
