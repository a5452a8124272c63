"""The machine, and the versions of everything that matters to what it computes."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.bench.machine import this_machine, versions
from llava_deploy.runtime.bench.report import Machine
from llava_deploy.runtime.cuda_choice import CudaChoice
from llava_deploy.runtime.loading import Sessions
from llava_deploy.runtime.tensorrt.cuda import Device
from llava_deploy.runtime.tensorrt_choice import TensorRtChoice

_DRIVER = Path("/proc/driver/nvidia/version")


def machine_of(sessions: Sessions | None) -> Machine:
    """Where it ran; with the GPU, where that ran it."""
    device = None if sessions is None else _device(sessions)
    return this_machine(None if device is None else device.name)


def versions_of(sessions: Sessions | None) -> dict[str, str]:
    """Of what ran it, and of what is around it; of little, where nothing was loaded."""
    if sessions is None:
        return {"python": platform.python_version(), "llava-deploy": version("llava-deploy")}
    device = _device(sessions)
    if device is None:
        return versions(sessions.backend)
    cuda = int(device.call("cudaDriverGetVersion"))
    driver = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text(errors="replace")) if _DRIVER.is_file() else None
    known = {} if driver is None else {"driver": driver[0]}
    return {**versions(sessions.backend), **known, "driver's CUDA": f"{cuda // 1000}.{cuda % 1000 // 10}"}


def _device(sessions: Sessions) -> Device | None:
    """The GPU that they run on; ``None``: it is the processor, or cuda-python is missing, which ONNX Runtime spares."""
    if isinstance(sessions.choice, TensorRtChoice):
        return sessions.choice.device
    if not isinstance(sessions.choice, CudaChoice):
        return None
    try:
        return Device()
    except BackendError:
        return None
