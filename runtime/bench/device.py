"""The GPU that a bundle may run on, to ask it for its memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.tensorrt_module import TensorRtBackend
from llava_deploy.runtime.backend_choice import BackendName
from llava_deploy.runtime.bundle import open_bundle
from llava_deploy.runtime.cuda_choice import has_cuda_engine
from llava_deploy.runtime.tensorrt_choice import engine_directories

if TYPE_CHECKING:
    from llava_deploy.runtime.tensorrt.cuda import Device


def open_device(directory: Path, backend: BackendName) -> Device | None:
    """The GPU, where the bundle has an engine for one that may be taken, and there is one.

    Raises:
        BundleError: no bundle.
    """
    bundle = open_bundle(directory)
    kinds = [kind for kind in get_args(TensorRtBackend) if backend in ("auto", kind)]
    on_cuda = backend in ("auto", "onnxruntime-cuda") and has_cuda_engine(bundle)
    if not on_cuda and not any(engine_directories(bundle, kind) for kind in kinds):
        return None
    from llava_deploy.runtime.tensorrt.cuda import Device

    try:
        return Device()
    except BackendError:  # why it cannot be had is said when the bundle is loaded
        return None


def used_bytes(device: Device) -> int:
    """In use on the GPU, by all processes."""
    free, total = device.memory()
    return total - free
