"""The GPU that a bundle may run on, to ask it for its memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.backend_choice import GPU_BACKENDS, BackendName, has_engine
from llava_deploy.runtime.bundle import open_bundle

if TYPE_CHECKING:
    from llava_deploy.runtime.tensorrt.cuda import Device


def open_device(directory: Path, backend: BackendName) -> Device | None:
    """The GPU, where the bundle has an engine for one that may be taken, and there is one.

    Raises:
        BundleError: no bundle.
    """
    bundle = open_bundle(directory)
    kinds = [kind for kind in GPU_BACKENDS if backend in ("auto", kind)]
    if not any(has_engine(bundle, kind) for kind in kinds):
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
