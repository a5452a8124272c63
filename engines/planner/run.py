"""Memory at the peak of a run, what a decode step reads, and the speed that this allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_deploy.engines.names import Backend, CacheForm
from llava_deploy.engines.planner.boards import Board
from llava_deploy.engines.planner.memory import Memory
from llava_deploy.engines.planner.model import PlannedModel, Sizes
from llava_deploy.engines.planner.onnxruntime_cuda_memory import cuda_decode_bytes, cuda_run_memory
from llava_deploy.engines.planner.onnxruntime_memory import onnxruntime_decode_bytes, onnxruntime_run_memory
from llava_deploy.engines.planner.tensorrt_memory import engine_bytes, tensorrt_run_memory
from llava_deploy.engines.tensorrt.constructs import cache_form, parse_release


def cache_form_of(backend: Backend, board: Board) -> CacheForm:
    """What a decoder does with its cache on a board: by the TensorRT that its system comes with."""
    if backend != "tensorrt" or board.tensorrt is None:
        return "in-place"
    return cache_form(parse_release(board.tensorrt))


def run_memory(model: PlannedModel, backend: Backend, sizes: Sizes, cache: CacheForm, parts: Sequence[int]) -> Memory:
    """Peak of a run on the engine that ``llava-deploy build`` makes; of TensorRT with the decoder in these ``parts``.

    It fills its cache, with as many rows, and pictures at once, as ``sizes`` allows.
    """
    if backend == "onnxruntime":
        return onnxruntime_run_memory(model, sizes)
    if backend == "onnxruntime-cuda":
        return cuda_run_memory(model, sizes)
    return tensorrt_run_memory(model, sizes, cache, parts)


def decode_bytes(model: PlannedModel, backend: Backend, batch: int, slots: int) -> int:
    """Bytes that one decode step of ``batch`` rows has to read: weights once, and ``slots`` of each row's cache."""
    if backend == "onnxruntime":
        return onnxruntime_decode_bytes(model, batch, slots)
    if backend == "onnxruntime-cuda":
        return cuda_decode_bytes(model, batch, slots)
    tied = model.embedding_bytes if model.is_tied else 0
    return engine_bytes(model.decoder_weights) + tied + batch * slots * model.cache_bytes_per_slot


@dataclass(frozen=True)
class DecodeBound:
    """What the memory's bandwidth allows of a decode step.

    Attributes:
        step_bytes: that it has to read.
        tokens_per_second: of all rows together, at most.
    """

    step_bytes: int
    tokens_per_second: float


def decode_bound(model: PlannedModel, backend: Backend, batch: int, slots: int, bandwidth: float) -> DecodeBound:
    """The fastest that ``batch`` rows can decode behind ``slots`` of the cache, at ``bandwidth`` bytes a second."""
    step_bytes = decode_bytes(model, backend, batch, slots)
    return DecodeBound(step_bytes, bandwidth * batch / step_bytes)
