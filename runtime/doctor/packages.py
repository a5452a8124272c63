"""What is installed beside llava-deploy, and whether it really loads: each in a process of its own.

Sources: the extras of this package's ``pyproject.toml`` for what is wanted; for CUDA's versions NVIDIA, "CUDA
Compatibility", "Minor Version Compatibility".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llava_deploy.engines.onnxruntime_cuda import CUDA_PROVIDER
from llava_deploy.engines.tensorrt_module import TensorRtBackend
from llava_deploy.runtime.doctor.system import System

ONNXRUNTIMES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm"),
    *("onnxruntime-qnn", "onnxruntime-migraphx"),
)
"""Packages that hold the module ``onnxruntime``: they overwrite each other's files."""

LISTED = ("llava-deploy", "numpy", "pillow", "tokenizers", "onnx-ir", "matplotlib", "torch")
LEAST: Mapping[str, tuple[int, int]] = {"onnxruntime": (1, 25), "tensorrt": (10, 3), "tensorrt-rtx": (1, 7)}
"""Versions from which what they are for has been run; the same as in the extras."""

_MODULES: Mapping[TensorRtBackend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_WHEELS: Mapping[TensorRtBackend, tuple[str, ...]] = {
    "tensorrt": ("tensorrt-cu{}", "tensorrt-cu{}-libs"),
    "tensorrt-rtx": ("tensorrt-rtx-cu{}", "tensorrt-rtx-cu{}-libs"),
}
_BUILT_IN = ("CPUExecutionProvider", "AzureExecutionProvider")
_CUDA_MAJORS = (11, 12, 13, 14)


@dataclass(frozen=True)
class Library:
    """Something with libraries of its own.

    Attributes:
        packages: what it was installed by, with versions; none where it is a module that no package owns.
        version: as the module says once it is loaded.
        trouble: why it does not load; empty where it does, and where it is not installed.
        cuda: major version of the CUDA that it was built for, where its packages' names or the module say so.
    """

    packages: Mapping[str, str]
    version: str | None
    trouble: str
    cuda: int | None = None

    @property
    def installed(self) -> bool:
        """Whether there is anything of it."""
        return self.version is not None or bool(self.packages) or bool(self.trouble)

    @property
    def loads(self) -> bool:
        """Whether it can be used."""
        return self.version is not None

    def is_at_least(self, least: tuple[int, int]) -> bool:
        """Whether it is of this version or a later one; also where nobody can tell."""
        found = re.match(r"(\d+)\.(\d+)", self.version or "")
        return found is None or (int(found[1]), int(found[2])) >= least


@dataclass(frozen=True)
class Packages:
    """What is installed.

    Attributes:
        python: version.
        versions: of :data:`LISTED`; ``None`` where a package is not there.
        onnxruntime: and its packages, of which there should be one.
        providers: of ONNX Runtime; why a provider does not load, or an empty text where it does. CUDA's has to have run
            where there is a GPU.
        tensorrt: both kinds.
        cuda_python: cuda-python; ``cuda`` is the runtime's that it holds.
    """

    python: str
    versions: Mapping[str, str | None]
    onnxruntime: Library
    providers: Mapping[str, str]
    tensorrt: Mapping[TensorRtBackend, Library]
    cuda_python: Library

    @property
    def can_build(self) -> bool:
        """Whether graphs can be lowered here, which every build starts with."""
        return self.versions["onnx-ir"] is not None


def look_at_packages(system: System, *, has_gpu: bool) -> Packages:
    """What is installed, and whether it loads; ``has_gpu`` says that CUDA can use one."""
    names = _versions(system, ONNXRUNTIMES)
    said = system.probe("module", "onnxruntime")
    listed = [str(name) for name in said.get("providers", [])]
    providers = {name: "" if name in _BUILT_IN else _provider(system, name, has_gpu) for name in listed}
    cuda_packages = _versions(system, ("cuda-python", "cuda-bindings"))
    cuda = system.probe("cuda-python")
    number = cuda.get("cuda")
    return Packages(
        python=system.python,
        versions={name: system.version(name) for name in LISTED},
        onnxruntime=_library("onnxruntime", names, said, _major(said.get("cuda"))),
        providers=providers,
        tensorrt={backend: _tensorrt(system, backend) for backend in _MODULES},
        cuda_python=Library(
            cuda_packages,
            next(iter(cuda_packages.values()), "") if isinstance(number, int) else None,
            "" if isinstance(number, int) else _trouble("cuda", cuda_packages, cuda),
            number // 1000 if isinstance(number, int) else None,
        ),
    )


def _provider(system: System, name: str, has_gpu: bool) -> str:
    words = ("run",) if has_gpu and name == CUDA_PROVIDER else ()
    return str(system.probe("provider", name, *words).get("error", ""))


def _major(version: object) -> int | None:
    """Of a version as ``13.0``; ONNX Runtime for the CPU has none of CUDA."""
    found = re.match(r"\d+", str(version))
    return int(found[0]) if found else None


def _versions(system: System, names: tuple[str, ...]) -> dict[str, str]:
    found = {name: system.version(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}


def _tensorrt(system: System, backend: TensorRtBackend) -> Library:
    wheels = {name.format(major): major for major in _CUDA_MAJORS for name in _WHEELS[backend]}
    found = _versions(system, (backend, *wheels))
    majors = [wheels[name] for name in found if name in wheels]
    module = _MODULES[backend]
    return _library(module, found, system.probe("module", module), majors[0] if majors else None)


def _library(module: str, packages: dict[str, str], said: Mapping[str, object], cuda: int | None = None) -> Library:
    version = said.get("version")
    if isinstance(version, str):
        return Library(packages, version, "", cuda)
    return Library(packages, None, _trouble(module, packages, said), cuda)


def _trouble(module: str, packages: Mapping[str, str], said: Mapping[str, object]) -> str:
    """Nothing where it is simply not installed."""
    error = str(said.get("error", "it says no version"))
    is_missing = re.fullmatch(rf"ModuleNotFoundError: No module named '{module}(\.\w+)*'", error) is not None
    return "" if is_missing and not packages else error
