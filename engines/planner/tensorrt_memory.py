"""Peak memory of TensorRT, as it builds engines and as it runs them.

What a build takes of the host is fitted to measured peaks (``benchmarks/results/planner_peaks.json``), with TensorRT
for RTX 1.7. What either takes of a device is an estimate from the graphs' shapes: it was never measured on a GPU.
"""

from __future__ import annotations

from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import FEATURES_KEPT, GraphWeights, PlannedModel, Sizes
from llava_deploy.engines.tensorrt_module import TensorRtBackend

_MB = 10**6
_BUILD = Part("process", "host", 290 * _MB)
_LIBRARIES = Part("process", "mapped", 116 * _MB)
_COPIES = 1.9
_RUN = Part("process", "host", 400 * _MB)
"""Assumed, for Python, TensorRT's libraries and CUDA's bookkeeping."""

_CONTEXT = 500 * _MB
"""Assumed for a CUDA context with TensorRT's kernels, on the device."""

_SMALLEST_WORKSPACE = 32 * _MB
"""Assumed for layers whose kernels want one."""


def tensorrt_build_memory(model: PlannedModel, backend: TensorRtBackend, sizes: Sizes) -> Memory:
    """Peak of ``llava-deploy build`` for TensorRT: of the larger graph, built after the other one.

    The full TensorRT tries kernels on the GPU, with the graph's weights and the largest activations; TensorRT for RTX
    needs none.
    """
    graphs = (engine_bytes(model.vision_weights), engine_bytes(model.decoder_weights) + _tied(model))
    host = (
        Part("weights", "host", int(_COPIES * max(graphs))),
        _BUILD,
        Part("weights", "mapped", max(graphs)),
        _LIBRARIES,
    )
    if backend == "tensorrt-rtx":
        return Memory(host)
    device = (
        Part("weights", "device", max(graphs)),
        Part("KV cache", "device", _cache(model, sizes)),
        Part("activations", "device", _activations(model, sizes)),
        Part("workspace", "device", _workspace(model)),
        Part("process", "device", _CONTEXT),
    )
    return Memory((*device, *host))


def tensorrt_run_memory(model: PlannedModel, sizes: Sizes, cache: CacheForm) -> Memory:
    """Peak of a run that fills its cache; a growing cache is in two buffers, which take turns."""
    weights = engine_bytes(model.vision_weights) + engine_bytes(model.decoder_weights) + _tied(model)
    device = (
        Part("weights", "device", weights),
        Part("KV cache", "device", _cache(model, sizes) * (2 if cache == "growing" else 1)),
        Part("activations", "device", _activations(model, sizes)),
        Part("workspace", "device", _workspace(model)),
        Part("image features", "device", FEATURES_KEPT * model.features_bytes),
        Part("process", "device", _CONTEXT),
    )
    return Memory((*device, _RUN, Part("weights", "mapped", model.embedding_bytes)))


def engine_bytes(weights: GraphWeights) -> int:
    """Of a graph in an engine: zero points in few bits have become floats, as many as there are scales."""
    scales = {t.name.removesuffix("_scale"): t for t in weights.tensors if t.name.endswith("_scale")}
    zero_points = [t for t in weights.tensors if t.name.endswith("_zero_point")]
    widened = sum(scales[t.name.removesuffix("_zero_point")].nbytes - t.nbytes for t in zero_points)
    return weights.nbytes + widened


def _tied(model: PlannedModel) -> int:
    return model.embedding_bytes if model.is_tied else 0


def _cache(model: PlannedModel, sizes: Sizes) -> int:
    return sizes.max_batch * sizes.max_len * model.cache_bytes_per_slot


def _activations(model: PlannedModel, sizes: Sizes) -> int:
    """Of both engines, which keep theirs: the widest place of a layer, and the mask; attention is fused."""
    d, item = model.decoder, model.itemsize
    tokens = sizes.max_batch * sizes.max_seq
    mlp = 2 * d.hidden_size + 3 * model.intermediate_size  # residual and its norm; gate, up and their product
    attention = 2 * d.hidden_size + 2 * model.query_size
    hidden, inner = model.tower_sizes
    tower = sizes.max_images * (model.vision.patches + 1) * (2 * hidden + 2 * inner) * item
    return tower + tokens * max(mlp, attention) * item + tokens * sizes.max_len


def _workspace(model: PlannedModel) -> int:
    """Room for the largest quantised matrix as floats, which a long prompt is multiplied with."""
    return max((t.values * model.itemsize for t in model.decoder_weights.quantized), default=_SMALLEST_WORKSPACE)
