"""Memory at the peak of a build, and what it leaves on the disk."""

from __future__ import annotations

from collections.abc import Sequence

from llava_deploy.engines.names import Backend, CacheForm
from llava_deploy.engines.planner.memory import Memory
from llava_deploy.engines.planner.model import PlannedModel, Sizes
from llava_deploy.engines.planner.onnxruntime_cuda_memory import cuda_build_memory, cuda_engine_bytes
from llava_deploy.engines.planner.onnxruntime_memory import onnxruntime_build_memory, onnxruntime_engine_bytes
from llava_deploy.engines.planner.tensorrt_memory import engine_bytes, tensorrt_build_memory


def build_memory(model: PlannedModel, backend: Backend, sizes: Sizes, cache: CacheForm, parts: Sequence[int]) -> Memory:
    """Peak of ``llava-deploy build``.

    Args:
        model: see :func:`~llava_deploy.engines.planner.model.planned_bundle`.
        backend: what is built for.
        sizes: see :meth:`Sizes.of`; they matter to TensorRT, which runs kernels as it builds.
        cache: what the decoder does with its cache.
        parts: layers of the decoder in each plan of TensorRT's; see
            :func:`~llava_deploy.engines.planner.parts.decoder_parts`.
    """
    if backend == "onnxruntime":
        return onnxruntime_build_memory(model)
    if backend == "onnxruntime-cuda":
        return cuda_build_memory(model)
    return tensorrt_build_memory(model, backend, sizes, cache, parts)


def engine_disk(model: PlannedModel, backend: Backend) -> int:
    """Bytes of weights that an engine takes on the disk beside the bundle's, where the file system has hard links."""
    if backend == "onnxruntime":
        return onnxruntime_engine_bytes(model)
    if backend == "onnxruntime-cuda":
        return cuda_engine_bytes(model)
    tied = model.embedding_bytes if model.is_tied else 0
    return engine_bytes(model.vision_weights) + engine_bytes(model.decoder_weights) + tied
