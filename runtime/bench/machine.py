"""Where and with what something is measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from llava_deploy.engines.host_memory import host_memory
from llava_deploy.engines.names import Backend
from llava_deploy.engines.processor import CPUINFO, count_physical_cores, processor_name
from llava_deploy.engines.tensorrt_module import TensorRtBackend, import_tensorrt
from llava_deploy.runtime.bench.report import Machine
from llava_deploy.runtime.onnxruntime_backend import onnxruntime_version

_CPUINFO = CPUINFO
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PACKAGES = ("llava-deploy", "numpy", "tokenizers", "pillow")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "": 1}


def this_machine(gpu: str | None) -> Machine:
    """The machine, and the GPU that runs the model, where one does."""
    name = processor_name(_CPUINFO)
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu=platform.processor() or "unknown" if name is None else name,
        logical_cpus=len(os.sched_getaffinity(0)),
        physical_cores=physical_cores(),
        memory=host_memory().total,
        last_level_cache=_last_level_cache(),
        gpu=gpu,
    )


def versions(backend: Backend) -> dict[str, str]:
    """Of Python, of what runs the model, and of what is around it."""
    if backend == "onnxruntime" or backend == "onnxruntime-cuda":
        runs = {"onnxruntime": onnxruntime_version()}
    else:
        module: TensorRtBackend = backend
        runs = {backend: import_tensorrt(module).version}
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **runs, **packages}


def physical_cores() -> int:
    """Cores that ONNX Runtime starts a thread on, where nobody says otherwise; logical ones where nothing is known."""
    return count_physical_cores(_CPUINFO, len(os.sched_getaffinity(0)))


def _last_level_cache() -> int | None:
    """The largest that the first core reaches."""
    found = []
    for path in _CACHES.glob("index*/size"):
        size = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="utf-8").strip())
        if size is not None:
            found.append(int(size[1]) * _UNITS[size[2]])
    return max(found, default=None)
