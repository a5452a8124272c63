"""What ONNX Runtime's CUDA provider wants of a machine, and what to install for it, in one line.

Sources: the wheels of onnxruntime-gpu for x86-64. Their metadata: the extras ``cuda`` and ``cudnn`` bring CUDA's
libraries, which ``onnxruntime.preload_dlls`` finds. Their provider's library, by ``readelf -d`` and the headers of its
section ``.nv_fatbin``: 1.26.0 is for CUDA 12 and has machine code for compute capabilities 6.0, 7.0, 7.5, 8.0, 8.6 and
9.0, and PTX, which later ones compile; 1.27.0 and 1.28.0 are for CUDA 13 and have 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and
12.0; 1.30.0 and 1.31.1 the same but for 10.0, and no PTX. There are wheels for arm64 since 1.29, for CUDA 13, with code
for 8.9, 9.0, 12.0 and 12.1, so none is for a Jetson's Orin (microsoft/onnxruntime, pull request 31992).
"""

from __future__ import annotations

from collections.abc import Mapping

from llava_deploy.engines.onnxruntime_cuda import CUDA_PROVIDER
from llava_deploy.runtime.doctor.gpu import Graphics
from llava_deploy.runtime.doctor.host import Host
from llava_deploy.runtime.doctor.packages import LEAST, Library, Packages
from llava_deploy.runtime.doctor.verdicts import (
    OLDER_CUDA,
    BackendVerdict,
    anew,
    cuda_major,
    no_gpu,
    number_of,
    older_driver,
    trouble_of,
    update_driver,
)

_LATEST = frozenset({75, 80, 86, 89, 90, 120, 121})
_CUDA_13: Mapping[str, frozenset[int]] = {"": _LATEST, "<1.29": _LATEST | {100}}
"""Which release has machine code for which compute capabilities, where the driver is for CUDA 13; the latest first."""

_CUDA_12 = "<1.27"
_CUDA_OF_ARM = 13
_LEAST_CAPABILITY = 60  # of the releases for CUDA 12; what is later than they are compiles their PTX

_NO_CODE = ("no kernel image", "NoKernelImage")
"""What CUDA says on a GPU for which a program has no code."""

_NO_LIBRARY = ("cannot open shared object file", "cuDNN is unavailable")
"""What the loader says, and ONNX Runtime since 1.28, which loads cuDNN when something wants it."""


def install_cuda(host: Host, graphics: Graphics, library: Library) -> str:
    """The command that installs the provider here, with CUDA's libraries, in the place of the ONNX Runtime there is."""
    has, least = cuda_major(graphics), _least_cuda(host)
    install = f"pip install 'llava-deploy[gpu]' {_package(_release(host, graphics))}"
    if has is not None and has < least:
        install = f"{update_driver(least)}, then {install}"
    elif has == OLDER_CUDA:
        install += f" 'cuda-python=={has}.*'"
    return anew(library, install)


def judge_cuda(host: Host, graphics: Graphics, packages: Packages) -> BackendVerdict:
    """Whether ONNX Runtime runs on the GPU that is here; a probe has tried it, where it could."""
    gpu, library = graphics.first, packages.onnxruntime
    if gpu is None:
        return BackendVerdict("onnxruntime-cuda", False, no_gpu(graphics), (), ("GPU",))
    if gpu.capability is not None and number_of(gpu.capability) < _LEAST_CAPABILITY:
        how = f"ONNX Runtime on CUDA wants sm{_LEAST_CAPABILITY} or later, found {gpu.capability} ({gpu.name})"
        return BackendVerdict("onnxruntime-cuda", False, how, (), ("GPU",))
    trouble = trouble_of("ONNX Runtime", library, LEAST["onnxruntime"])
    if not trouble and CUDA_PROVIDER not in packages.providers:
        trouble = f"ONNX Runtime {library.version} is the one for the CPU, without {CUDA_PROVIDER}"
    if trouble:
        if host.is_jetson:
            how, missing = f"{trouble}; no wheel of onnxruntime-gpu is for a Jetson", ()
            return BackendVerdict("onnxruntime-cuda", False, how, missing, ("package",))
        return BackendVerdict(
            "onnxruntime-cuda", False, trouble, (install_cuda(host, graphics, library),), ("package",)
        )
    if packages.providers[CUDA_PROVIDER]:
        return _that_fails(packages.providers[CUDA_PROVIDER], library, host, graphics)
    cuda = "" if library.cuda is None else f" for CUDA {library.cuda}"
    how = f"ONNX Runtime {library.version}{cuda} on {gpu.name} ({gpu.capability})"
    return BackendVerdict("onnxruntime-cuda", True, how, ())


def _that_fails(trouble: str, library: Library, host: Host, graphics: Graphics) -> BackendVerdict:
    """Of a provider that is there and does not run."""
    has, wants = cuda_major(graphics), library.cuda
    name = f"ONNX Runtime {library.version}"
    if has is not None and wants is not None and wants > has:
        missing = update_driver(wants)
        if has >= _least_cuda(host):
            missing += f", or pip install {_package(_CUDA_12)}"
        how = f"{name}: {older_driver(graphics, has, wants)}"
        return BackendVerdict("onnxruntime-cuda", False, how, (missing,), ("driver",))
    where = " on the GPU" if graphics.first is None else f" on {graphics.first.name} ({graphics.first.capability})"
    if any(words in trouble for words in _NO_CODE):
        how, release = f"{name} has no code to run{where}: {trouble}", _release(host, graphics)
    elif any(words in trouble for words in _NO_LIBRARY):
        how, release = f"{name} finds not all of CUDA's libraries: {trouble}", f"=={library.version}"
    else:
        how, release = f"{name} does not run{where}: {trouble}", ""
    again = (f"pip install {_package(release)}",) if release else ()
    return BackendVerdict("onnxruntime-cuda", False, how, again, ("package",))


def _release(host: Host, graphics: Graphics) -> str:
    """Which release is for the driver and has code for the GPU, as pip wants it said; empty: any."""
    gpu, has = graphics.first, cuda_major(graphics)
    if _least_cuda(host) > OLDER_CUDA:
        return ""
    if has is not None and has <= OLDER_CUDA:
        return _CUDA_12
    if gpu is None or gpu.capability is None:
        return ""
    number = number_of(gpu.capability)
    return next((release for release, known in _CUDA_13.items() if number in known), _CUDA_12)


def _least_cuda(host: Host) -> int:
    """The oldest CUDA that there are wheels for."""
    return OLDER_CUDA if host.architecture == "x86_64" else _CUDA_OF_ARM


def _package(release: str) -> str:
    return f"'onnxruntime-gpu[cuda,cudnn]{release}'"
