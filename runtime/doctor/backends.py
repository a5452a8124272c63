"""Which backends could run anything on a machine, and what each lacks.

Sources: NVIDIA, "CUDA Compatibility", "Minor Version Compatibility", table 1: a program of CUDA 11.x wants a driver of
450 or later, of 12.x 525, of 13.x 580; the TensorRT-RTX support matrix: compute capability 7.5 and later of the RTX
line, on Linux for x86-64; and the TensorRT support matrix: 7.5 and later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from llava_deploy.engines.names import Backend
from llava_deploy.engines.tensorrt_module import RTX_CAPABILITIES, SPOKEN, TensorRtBackend
from llava_deploy.runtime.doctor.gpu import Graphics
from llava_deploy.runtime.doctor.host import Host
from llava_deploy.runtime.doctor.packages import LEAST, Library, Packages

DRIVERS = {11: 450, 12: 525, 13: 580}
"""The least driver for each major version of CUDA."""

_OLDER_CUDA = 12
"""The least that there are wheels for; pip takes cuda-python and TensorRT for a later one where nothing is said."""

INSTALL_CPU = "pip install 'llava-deploy[cpu]'"
_LEAST_TENSORRT = 75  # a compute capability


Lack = Literal["GPU", "package", "driver"]
"""What keeps a backend from running: no GPU that it could use; a package is missing, old or broken; an old driver."""


@dataclass(frozen=True)
class BackendVerdict:
    """Whether a backend can run something here.

    Attributes:
        backend: which.
        runs: it can.
        how: with what and on what, or why not, for people.
        missing: what to do so that it can; none where nothing helps.
        lacks: why not, in a word for each reason.
    """

    backend: Backend
    runs: bool
    how: str
    missing: tuple[str, ...]
    lacks: tuple[Lack, ...] = ()


def judge_backends(host: Host, graphics: Graphics, packages: Packages) -> tuple[BackendVerdict, ...]:
    """One verdict for each backend, in the order of :data:`~llava_deploy.engines.names.Backend`."""
    return tuple(
        _onnxruntime(host, packages) if backend == "onnxruntime" else _tensorrt(backend, host, graphics, packages)
        for backend in get_args(Backend)
    )


def cuda_major(graphics: Graphics) -> int | None:
    """Major version of CUDA that the driver is for; ``None`` without a driver."""
    if graphics.cuda is not None:
        return int(graphics.cuda.partition(".")[0])
    number = re.match(r"\d+", graphics.driver or "")
    return max((cuda for cuda, least in DRIVERS.items() if number and int(number[0]) >= least), default=None)


def install_tensorrt(backend: TensorRtBackend, host: Host, graphics: Graphics) -> str:
    """The command that installs it here; of packages that pip has for several CUDAs, those that the driver is for."""
    if host.is_jetson and backend == "tensorrt":
        return (
            "sudo apt install nvidia-jetpack; a virtual environment sees its TensorRT with "
            "python3 -m venv --system-site-packages"
        )
    major = cuda_major(graphics)
    if backend == "tensorrt":
        if major == _OLDER_CUDA:
            return f"pip install llava-deploy tensorrt-cu{major} 'cuda-python=={major}.*'"
        return "pip install 'llava-deploy[tensorrt]'"
    if major is not None and major < _OLDER_CUDA:
        return f"update the NVIDIA driver to {DRIVERS[_OLDER_CUDA]} or later, then pip install 'llava-deploy[rtx]'"
    return "pip install 'llava-deploy[rtx]'"


def _onnxruntime(host: Host, packages: Packages) -> BackendVerdict:
    library = packages.onnxruntime
    trouble = _lacks("ONNX Runtime", library, LEAST["onnxruntime"])
    if trouble:
        remedy = INSTALL_CPU if not library.installed else _again(library, "pip install --upgrade 'llava-deploy[cpu]'")
        return BackendVerdict("onnxruntime", False, trouble, (remedy,), ("package",))
    cores = f"{host.cores} core{'' if host.cores == 1 else 's'}"
    where = "the CPU" if host.processor is None else host.processor
    return BackendVerdict("onnxruntime", True, f"ONNX Runtime {library.version} on {where}, {cores}", ())


def _tensorrt(backend: TensorRtBackend, host: Host, graphics: Graphics, packages: Packages) -> BackendVerdict:
    gpu, library = graphics.first, packages.tensorrt[backend]
    name = SPOKEN[backend]
    if gpu is None:
        return BackendVerdict(backend, False, _no_gpu(graphics), (), ("GPU",))
    refusal = _refusal(backend, gpu.capability)
    if refusal:
        return BackendVerdict(backend, False, f"{refusal} ({gpu.name})", (), ("GPU",))
    reasons, missing = [], []
    lacks: list[Lack] = []
    trouble = _lacks(name, library, LEAST[backend])
    if trouble:
        reasons.append(trouble)
        lacks.append("package")
        install = install_tensorrt(backend, host, graphics)
        missing.append(install if not library.installed or host.is_jetson else _again(library, install))
    if not packages.cuda_python.loads:
        reasons.append(_lacks("cuda-python", packages.cuda_python, (0, 0)))
        lacks.append("package")
        missing.append(f"pip install 'cuda-python=={cuda_major(graphics) or 12}.*'")
    wants = max((each.cuda for each in (library, packages.cuda_python) if each.cuda is not None), default=0)
    has = cuda_major(graphics)
    if library.installed and has is not None and wants > has:
        reasons.append(
            f"the driver is too old: it is for CUDA {graphics.cuda or has}, and what is installed is for CUDA {wants}"
        )
        lacks.append("driver")
        missing.append(_for_older_driver(backend, has, wants))
    if reasons:
        return BackendVerdict(backend, False, "; ".join(reasons), tuple(missing), tuple(dict.fromkeys(lacks)))
    return BackendVerdict(backend, True, f"{name} {library.version} on {gpu.name} ({gpu.capability})", ())


def _no_gpu(graphics: Graphics) -> str:
    if not graphics.cards and not graphics.nodes and graphics.driver is None:
        return "no NVIDIA GPU"
    return f"no NVIDIA GPU that can be used: {graphics.trouble or 'see the findings'}"


def _refusal(backend: TensorRtBackend, capability: str | None) -> str:
    if capability is None:
        return ""
    if backend == "tensorrt-rtx":
        return "" if capability in RTX_CAPABILITIES else f"TensorRT for RTX 1.7 knows no {capability}"
    is_old = int(capability.removeprefix("sm")) < _LEAST_TENSORRT
    return f"TensorRT wants sm{_LEAST_TENSORRT} or later, found {capability}" if is_old else ""


def _lacks(name: str, library: Library, least: tuple[int, int]) -> str:
    if library.loads and library.is_at_least(least):
        return ""
    if library.loads:
        return f"{name} {library.version} is older than {least[0]}.{least[1]}"
    if not library.installed:
        return f"{name} is not installed"
    return f"{name} is installed, but cannot be loaded: {library.trouble}"


def _again(library: Library, install: str) -> str:
    remove = " ".join(library.packages)
    return f"pip uninstall {remove}, then {install}" if remove and not library.loads else install


def _for_older_driver(backend: TensorRtBackend, has: int, wants: int) -> str:
    update = f"update the NVIDIA driver to {DRIVERS.get(wants, DRIVERS[13])} or later"
    if has < _OLDER_CUDA:
        return update
    package = "tensorrt-rtx-cu" if backend == "tensorrt-rtx" else "tensorrt-cu"
    return f"{update}, or pip install {package}{has} 'cuda-python=={has}.*'"
