"""Memory at the peak of a run, and what a decode step reads."""

from __future__ import annotations

from llava_deploy.engines.names import Backend, CacheForm
from llava_deploy.engines.planner.boards import Board
from llava_deploy.engines.planner.memory import Memory, Part
from llava_deploy.engines.planner.model import GraphWeights, PlannedModel, Sizes
from llava_deploy.engines.tensorrt.constructs import cache_form, parse_release

_MB = 10**6
FEATURES_KEPT = 16
"""Pictures whose features the runtime keeps."""

_CONTEXT = 500 * _MB
"""Assumed for a CUDA context with TensorRT's kernels, on the device."""

_SMALLEST_WORKSPACE = 32 * _MB
"""Assumed for layers whose kernels want one."""


def cache_form_of(backend: Backend, board: Board) -> CacheForm:
    """What a decoder does with its cache on a board: by the TensorRT that its system comes with."""
    if backend != "tensorrt" or board.tensorrt is None:
        return "in-place"
    return cache_form(parse_release(board.tensorrt))


def run_memory(model: PlannedModel, backend: Backend, sizes: Sizes, cache: CacheForm) -> Memory:
    """Peak of a run that fills its cache, with as many rows, and pictures at once, as ``sizes`` allows.

    Of ONNX Runtime with the engine that ``llava-deploy build`` makes; of TensorRT an estimate from the graphs' shapes,
    which nothing was measured for.
    """
    if backend == "onnxruntime":
        return _onnxruntime(model, sizes)
    return _tensorrt(model, sizes, cache)


def decode_bytes(model: PlannedModel, batch: int, slots: int) -> int:
    """Bytes that one decode step of ``batch`` rows reads of a device's memory: weights once, and each row's cache."""
    return engine_bytes(model.decoder_weights) + _tied(model) + batch * slots * model.cache_bytes_per_slot


def engine_bytes(weights: GraphWeights) -> int:
    """Of a graph in a TensorRT engine: 4-bit zero points have become floats, as many as there are scales."""
    zero_points = [t for t in weights.tensors if t.name.endswith("_zero_point")]
    scales = {t.name: t for t in weights.tensors if t.name.endswith("_scale")}
    widened = sum(scales[f"{t.name.removesuffix('_zero_point')}_scale"].nbytes - t.nbytes for t in zero_points)
    return weights.nbytes + widened


def _tied(model: PlannedModel) -> int:
    return model.embedding_bytes if model.is_tied else 0


def _features(model: PlannedModel) -> int:
    return FEATURES_KEPT * model.vision.patches * model.vision.hidden_size * model.itemsize


def _cache(model: PlannedModel, sizes: Sizes) -> int:
    return sizes.max_batch * sizes.max_len * model.cache_bytes_per_slot


def _tensorrt(model: PlannedModel, sizes: Sizes, cache: CacheForm) -> Memory:
    """Weights are those of the graphs; a growing cache is in two buffers, which take turns."""
    item, d = model.itemsize, model.decoder
    tokens = sizes.max_batch * sizes.max_seq
    wide = 2 * d.hidden_size + 3 * model.intermediate_size  # residual, its norm; gate, up and their product
    mask = tokens * sizes.max_len
    hidden, inner = model.tower_sizes
    tower = sizes.max_images * (model.vision.patches + 1) * (2 * hidden + 2 * inner) * item
    steps = tokens * max(wide, 2 * d.hidden_size + 2 * model.query_size) * item + mask
    matrices = (*model.decoder_weights.quantized, *model.vision_weights.quantized)
    opened = max((t.values * item for t in matrices), default=0)  # a long prompt reads weights as floats
    weights = engine_bytes(model.vision_weights) + engine_bytes(model.decoder_weights) + _tied(model)
    device = (
        Part("weights", "device", weights),
        Part("KV cache", "device", _cache(model, sizes) * (2 if cache == "growing" else 1)),
        Part("activations", "device", tower + steps),
        Part("workspace", "device", max(opened, _SMALLEST_WORKSPACE)),
        Part("image features", "device", _features(model)),
        Part("process", "device", _CONTEXT),
    )
    return Memory((*device, Part("process", "host", 400 * _MB), Part("weights", "mapped", model.embedding_bytes)))


def _onnxruntime(model: PlannedModel, sizes: Sizes) -> Memory:
    return Memory((Part("KV cache", "host", _cache(model, sizes)),))
