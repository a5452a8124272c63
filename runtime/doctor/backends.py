"""Which backends could run anything on a machine, what each lacks, and which a GPU is best served by.

Sources: the TensorRT-RTX support matrix: GPUs of the RTX line, on Linux for x86-64; and the TensorRT support matrix:
7.5 and later.
"""

from __future__ import annotations

from typing import get_args

from llava_deploy.engines.names import Backend
from llava_deploy.engines.tensorrt_module import SPOKEN, TensorRtBackend, rtx_builds_for, rtx_runs_on
from llava_deploy.runtime.backend_choice import GpuBackend
from llava_deploy.runtime.doctor.cuda_provider import install_cuda, judge_cuda
from llava_deploy.runtime.doctor.gpu import Gpu, Graphics
from llava_deploy.runtime.doctor.host import Host
from llava_deploy.runtime.doctor.packages import LEAST, Library, Packages
from llava_deploy.runtime.doctor.verdicts import (
    OLDER_CUDA,
    BackendVerdict,
    Lack,
    anew,
    cuda_major,
    no_gpu,
    number_of,
    older_driver,
    trouble_of,
    update_driver,
)

INSTALL_CPU = "pip install 'llava-deploy[cpu]'"
INSTALL_GPU = "pip install 'llava-deploy[gpu]'"
_LEAST_TENSORRT = 75  # a compute capability


def judge_backends(host: Host, graphics: Graphics, packages: Packages) -> tuple[BackendVerdict, ...]:
    """One verdict for each backend, in the order of :data:`~llava_deploy.engines.names.Backend`."""
    return tuple(_judge(backend, host, graphics, packages) for backend in get_args(Backend))


def _judge(backend: Backend, host: Host, graphics: Graphics, packages: Packages) -> BackendVerdict:
    if backend == "onnxruntime":
        return _onnxruntime(host, packages)
    if backend == "onnxruntime-cuda":
        return judge_cuda(host, graphics, packages)
    return _tensorrt(backend, host, graphics, packages)


def recommended(host: Host, gpu: Gpu) -> GpuBackend:
    """What is named for a GPU, installed or not: TensorRT for RTX where there is a wheel and an engine runs untold.

    JetPack brings the full TensorRT to a Jetson. All others get ONNX Runtime, whose engine needs no GPU to be built and
    is for any.
    """
    if host.is_jetson:
        return "tensorrt"
    if host.architecture == "x86_64" and gpu.capability is not None and rtx_builds_for(gpu.capability):
        return "tensorrt-rtx"
    return "onnxruntime-cuda"


def install_gpu_backend(backend: GpuBackend, host: Host, graphics: Graphics, packages: Packages) -> str:
    """The command that installs it here."""
    if backend == "onnxruntime-cuda":
        return install_cuda(host, graphics, packages.onnxruntime)
    return install_tensorrt(backend, host, graphics)


def install_tensorrt(backend: TensorRtBackend, host: Host, graphics: Graphics) -> str:
    """The command that installs it here; of packages that pip has for several CUDAs, those that the driver is for."""
    if host.is_jetson and backend == "tensorrt":
        return (
            "sudo apt install nvidia-jetpack; a virtual environment sees its TensorRT with "
            "python3 -m venv --system-site-packages"
        )
    major = cuda_major(graphics)
    if backend == "tensorrt":
        if major == OLDER_CUDA:
            return f"pip install llava-deploy tensorrt-cu{major} 'cuda-python=={major}.*'"
        return "pip install 'llava-deploy[tensorrt]'"
    if major is not None and major < OLDER_CUDA:
        return f"{update_driver(OLDER_CUDA)}, then pip install 'llava-deploy[rtx]'"
    return "pip install 'llava-deploy[rtx]'"


def _onnxruntime(host: Host, packages: Packages) -> BackendVerdict:
    library = packages.onnxruntime
    trouble = trouble_of("ONNX Runtime", library, LEAST["onnxruntime"])
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
        return BackendVerdict(backend, False, no_gpu(graphics), (), ("GPU",))
    refusal = _refusal(backend, gpu.capability)
    if refusal:
        return BackendVerdict(backend, False, f"{refusal} ({gpu.name})", (), ("GPU",))
    reasons, missing = [], []
    lacks: list[Lack] = []
    trouble = trouble_of(name, library, LEAST[backend])
    if trouble:
        reasons.append(trouble)
        lacks.append("package")
        install = install_tensorrt(backend, host, graphics)
        missing.append(install if not library.installed or host.is_jetson else _again(library, install))
    if not packages.cuda_python.loads:
        reasons.append(trouble_of("cuda-python", packages.cuda_python, (0, 0)))
        lacks.append("package")
        missing.append(f"pip install 'cuda-python=={cuda_major(graphics) or 12}.*'")
    wants = max((each.cuda for each in (library, packages.cuda_python) if each.cuda is not None), default=0)
    has = cuda_major(graphics)
    if library.installed and has is not None and wants > has:
        reasons.append(older_driver(graphics, has, wants))
        lacks.append("driver")
        missing.append(_for_older_driver(backend, has, wants))
    if reasons:
        return BackendVerdict(backend, False, "; ".join(reasons), tuple(missing), tuple(dict.fromkeys(lacks)))
    return BackendVerdict(backend, True, f"{name} {library.version} on {gpu.name} ({gpu.capability})", ())


def _refusal(backend: TensorRtBackend, capability: str | None) -> str:
    if capability is None:
        return ""
    if backend == "tensorrt-rtx":
        return "" if rtx_runs_on(capability) else f"TensorRT for RTX 1.7 does not run on {capability}"
    is_old = number_of(capability) < _LEAST_TENSORRT
    return f"TensorRT wants sm{_LEAST_TENSORRT} or later, found {capability}" if is_old else ""


def _again(library: Library, install: str) -> str:
    return install if library.loads else anew(library, install)


def _for_older_driver(backend: TensorRtBackend, has: int, wants: int) -> str:
    update = update_driver(wants)
    if has < OLDER_CUDA:
        return update
    package = "tensorrt-rtx-cu" if backend == "tensorrt-rtx" else "tensorrt-cu"
    return f"{update}, or pip install {package}{has} 'cuda-python=={has}.*'"
