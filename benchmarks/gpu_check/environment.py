"""What the machine has: GPU, driver, memory, versions, and how fast the GPU copies within its memory."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.onnxruntime_module import import_onnxruntime
from llava_deploy.engines.tensorrt_module import import_tensorrt, rtx_runs_on
from llava_deploy.runtime.tensorrt.cuda import Device

PACKAGES = (
    *("llava-deploy", "torch", "transformers", "numpy", "polygraphy", "cuda-python", "cuda-bindings", "onnx"),
    *("onnx-ir", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu12-libs"),
    *("tensorrt-rtx-cu13-libs", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
MODULES = ("tensorrt", "tensorrt_rtx", "onnxruntime")
COPIED = 1 << 30  # bytes
COPIES = 20
QUERY = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.memory", "compute_mode")


def look() -> dict[str, Any]:
    """A part: everything above; what is not there is ``None`` or says why."""
    device, no_gpu = None, None
    try:
        device = Device()
    except BackendError as error:
        no_gpu = str(error)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "onnxruntime_providers": _providers(),
        "packages": {name: _version(name) for name in PACKAGES},
        "modules": {name: _module(name) for name in MODULES},
        "tensorrt_rtx_refusal": None if device is None else _rtx_refusal(device.capability),
        "nvidia_smi": _nvidia_smi(),
        "gpu": None if device is None else _described(device),
        "no_gpu": no_gpu,
        "torch_cuda": _torch_cuda(),
        "copy_gb_per_s": None if device is None else _copy_speed(device),
    }


def _described(device: Device) -> dict[str, Any]:
    return {"name": device.name, "capability": device.capability, "memory_bytes": device.memory()[1]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _module(name: str) -> str:
    """Its version, or ``cannot be imported: …``."""
    try:
        return str(importlib.import_module(name).__version__)
    except Exception as error:  # noqa: BLE001 (its loader raises what it likes)
        return f"cannot be imported: {' '.join(str(error).split())[:200]}"


def _providers() -> list[str]:
    """Before anything else imports ONNX Runtime: this way it reports nothing to its maker."""
    try:
        found: list[str] = import_onnxruntime().get_available_providers()
    except BackendError:
        return []
    return found


def _rtx_refusal(capability: str) -> str | None:
    """Why TensorRT for RTX does not run on such a GPU; ``None`` where it does, or is not installed."""
    try:
        module = import_tensorrt("tensorrt-rtx")
    except BackendError:
        return None
    names = [name.lower() for name in module.api.ComputeCapability.__members__ if name.startswith("SM")]
    targets = sorted(names, key=lambda name: int(name[2:]))
    if capability in targets or rtx_runs_on(capability):
        return None
    return f"TensorRT for RTX {module.version} builds for {', '.join(targets)}, and this GPU is {capability}"


def _torch_cuda() -> str | None:
    """CUDA's version that PyTorch was built with, where it can use the GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda if torch.cuda.is_available() else None


def _copy_speed(device: Device) -> float:
    """10**9 bytes read and written a second by a copy on the GPU, the median of some: what decode is held against."""
    size = min(COPIED, device.memory()[0] // 4)
    source, target = (device.allocate(size, "a copy within the GPU's memory") for _ in range(2))
    device.clear(source.address, size)
    rates = []
    for _ in range(COPIES):
        begun = device.mark()
        device.copy(target.address, source.address, size)
        rates.append(2 * size / device.mark().since(begun) / 1e9)
    return round(statistics.median(rates), 1)


def _nvidia_smi() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or done.stderr.strip()
