"""The backends that the check knows: the product's four, and a yardstick."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from names import BackendUnderTest
from outcome import NotRunError

from llava_deploy.engines.engine_manifest import read_engine_manifest
from llava_deploy.runtime import Llava


def load(bundle: Path, backend: BackendUnderTest, max_len: int | None) -> Llava:
    """The bundle, loaded; ``max_len`` of a TensorRT engine is what it was built with."""
    if backend == "onnxruntime-cuda-canonical":
        from onnxruntime_on import load as load_yardstick

        return load_yardstick(bundle, max_len, "cuda")
    is_bounded_here = backend == "onnxruntime" or backend == "onnxruntime-cuda"
    return Llava.load(bundle, backend=backend, max_len=max_len if is_bounded_here else None)


def build(bundle: str, backend: BackendUnderTest, limits: dict[str, int], capability: str | None) -> dict[str, Any]:
    """A part: build the bundle's engine.

    Args:
        bundle: directory.
        backend: one of :data:`names.BUILT`.
        limits: of a TensorRT engine: ``max_batch``, ``max_len`` and ``max_images``.
        capability: to build for, as ``sm89``; ``None``: this machine's GPU.
    """
    began = time.perf_counter()
    if backend == "onnxruntime":
        from llava_deploy.engines.onnxruntime_builder import build_onnxruntime

        engine = build_onnxruntime(Path(bundle), replace=True)
    elif backend == "onnxruntime-cuda":
        from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda

        engine = build_onnxruntime_cuda(Path(bundle), replace=True)
    elif backend == "tensorrt" or backend == "tensorrt-rtx":
        from llava_deploy.engines.tensorrt.builder import build_tensorrt
        from llava_deploy.engines.tensorrt.memory import BuildMemoryError
        from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions

        capabilities = () if capability is None or backend == "tensorrt" else (capability,)
        options = TensorRtBuildOptions(
            backend=backend,
            max_batch=limits["max_batch"],
            max_len=limits["max_len"],
            max_images=limits["max_images"],
            capabilities=capabilities,
        )
        try:
            engine = build_tensorrt(Path(bundle), options, replace=True)
        except BuildMemoryError as error:
            raise NotRunError(str(error)) from error
    else:
        raise NotRunError(f"{backend} runs the bundle's graphs, and needs no engine")
    built = read_engine_manifest(engine)
    return {
        "build_s": round(time.perf_counter() - began, 1),
        "engine": engine.name,
        "engine_bytes": sum(entry.size for entry in built.files),
    }
