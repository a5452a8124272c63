"""Memory at the peak of a run, and what a decode step reads."""

from __future__ import annotations

from llava_deploy.engines.names import Backend, CacheForm
from llava_deploy.engines.planner.boards import Board
from llava_deploy.engines.planner.memory import Memory
from llava_deploy.engines.planner.model import PlannedModel, Sizes
from llava_deploy.engines.planner.onnxruntime_memory import onnxruntime_run_memory
from llava_deploy.engines.planner.tensorrt_memory import engine_bytes, tensorrt_run_memory
from llava_deploy.engines.tensorrt.constructs import cache_form, parse_release


def cache_form_of(backend: Backend, board: Board) -> CacheForm:
    """What a decoder does with its cache on a board: by the TensorRT that its system comes with."""
    if backend != "tensorrt" or board.tensorrt is None:
        return "in-place"
    return cache_form(parse_release(board.tensorrt))


def run_memory(model: PlannedModel, backend: Backend, sizes: Sizes, cache: CacheForm) -> Memory:
    """Peak of a run on the engine that ``llava-deploy build`` makes.

    It fills its cache, with as many rows, and pictures at once, as ``sizes`` allows.
    """
    if backend == "onnxruntime":
        return onnxruntime_run_memory(model, sizes)
    return tensorrt_run_memory(model, sizes, cache)


def decode_bytes(model: PlannedModel, batch: int, slots: int) -> int:
    """Bytes that one decode step of ``batch`` rows reads of a device's memory: weights once, and each row's cache."""
    tied = model.embedding_bytes if model.is_tied else 0
    return engine_bytes(model.decoder_weights) + tied + batch * slots * model.cache_bytes_per_slot
