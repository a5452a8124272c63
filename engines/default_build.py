"""The engine of a backend with the options that it has where nobody says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llava_deploy.engines.names import Backend


def build_default(bundle: Path, backend: Backend, on_warning: Callable[[str], None]) -> Path:
    """Build it and return its directory; as ``llava-deploy build`` does with ``--backend`` alone.

    Raises:
        LlavaDeployError: see :func:`~llava_deploy.engines.onnxruntime_builder.build_onnxruntime` and
            :func:`~llava_deploy.engines.tensorrt.builder.build_tensorrt`.
    """
    if backend == "onnxruntime":
        from llava_deploy.engines.onnxruntime_builder import build_onnxruntime

        return build_onnxruntime(bundle)
    if backend == "onnxruntime-cuda":
        from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda

        return build_onnxruntime_cuda(bundle)
    from llava_deploy.engines.tensorrt.builder import build_tensorrt
    from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions

    return build_tensorrt(bundle, TensorRtBuildOptions(backend), on_warning=on_warning)
