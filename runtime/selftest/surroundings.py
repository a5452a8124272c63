"""The machine, and the versions of everything that matters to what it computes."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

from llava_deploy.runtime.bench.machine import this_machine, versions
from llava_deploy.runtime.bench.report import Machine
from llava_deploy.runtime.loading import Sessions
from llava_deploy.runtime.tensorrt_choice import TensorRtChoice

_DRIVER = Path("/proc/driver/nvidia/version")


def machine_of(sessions: Sessions | None) -> Machine:
    """Where it ran; with the GPU, where that ran it."""
    choice = None if sessions is None else sessions.choice
    return this_machine(choice.device.name if isinstance(choice, TensorRtChoice) else None)


def versions_of(sessions: Sessions | None) -> dict[str, str]:
    """Of what ran it, and of what is around it; of little, where nothing was loaded."""
    if sessions is None:
        return {"python": platform.python_version(), "llava-deploy": version("llava-deploy")}
    choice = sessions.choice
    if not isinstance(choice, TensorRtChoice):
        return versions(sessions.backend)
    cuda = int(choice.device.call("cudaDriverGetVersion"))
    driver = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text(errors="replace")) if _DRIVER.is_file() else None
    known = {} if driver is None else {"driver": driver[0]}
    return {**versions(sessions.backend), **known, "driver's CUDA": f"{cuda // 1000}.{cuda % 1000 // 10}"}
