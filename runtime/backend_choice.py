"""What runs a bundle: the best backend that it holds an engine for and that runs on this machine, and why no better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from llava_deploy.engines.engine_manifest import (
    INT8_DECODER_GRAPH,
    EngineKey,
    loaded_files,
    read_engine_manifest,
    resolved_accuracy_level,
    source_digest,
)
from llava_deploy.engines.errors import BackendError, BundleError, OptionError
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.engines.names import AccuracyLevel, Backend, Int8Part
from llava_deploy.engines.onnxruntime_cuda import cuda_refusal
from llava_deploy.engines.processor import has_int8_products
from llava_deploy.engines.tensorrt_module import SPOKEN, TensorRtBackend
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.cuda_choice import CudaChoice, choose_cuda, has_cuda_engine
from llava_deploy.runtime.onnxruntime_backend import onnxruntime_version
from llava_deploy.runtime.tensorrt_choice import TensorRtChoice, choose_tensorrt, engine_directories

BackendName: TypeAlias = "Backend | Literal['auto']"
"""What may be asked for; ``auto`` takes the best that there is."""

GpuBackend: TypeAlias = "TensorRtBackend | Literal['onnxruntime-cuda']"

GPU_BACKENDS: tuple[GpuBackend, ...] = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
"""Best first: what ``auto`` takes."""

SPOKEN_BACKENDS: Mapping[Backend, str] = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-cuda": "ONNX Runtime on CUDA",
    "tensorrt": SPOKEN["tensorrt"],
    "tensorrt-rtx": SPOKEN["tensorrt-rtx"],
}
"""What people call them."""

_GPU_FILES = tuple(map(Path, ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu")))
"""What NVIDIA's driver makes on Linux, on PCs and on Jetson boards."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of the backend; ``None`` leaves it to the bundle, the engine or the machine.

    Attributes:
        backend: which one.
        max_len: slots of the cache.
        threads: of one operator of ONNX Runtime.
        accuracy_level: what ONNX Runtime multiplies quantised weights in.
    """

    backend: BackendName = "auto"
    max_len: int | None = None
    threads: int | None = None
    accuracy_level: AccuracyLevel | None = None

    def __post_init__(self) -> None:
        known = ("auto", *get_args(Backend))
        if self.backend not in known:
            raise OptionError("backend", f"want one of {', '.join(known)}, got {self.backend!r}")


@dataclass(frozen=True)
class OnnxRuntimeChoice:
    """The graphs to load, what they multiply quantised weights in, and a sentence on the choice for people.

    ``int8_decoder`` is for steps of many tokens; ``None`` where ``decoder`` is for all of them. ``int8`` says what is
    computed in 8-bit integers.
    """

    vision: Path
    decoder: Path
    int8_decoder: Path | None
    int8: tuple[Int8Part, ...]
    accuracy_level: AccuracyLevel | None
    reason: str

    @property
    def backend(self) -> Backend:
        """What loads them."""
        return "onnxruntime"


GpuChoice: TypeAlias = "TensorRtChoice | CudaChoice"


def choose(bundle: Bundle, wanted: Wanted, integrity: Integrity) -> OnnxRuntimeChoice | GpuChoice:
    """Choose the backend, and the files that it loads.

    ``auto`` tries TensorRT, then TensorRT for RTX, then ONNX Runtime on CUDA, each only where the bundle has an engine
    of it, then ONNX Runtime on the CPU.

    Raises:
        BundleError: an engine is damaged.
        BackendError: the backend that was asked for does not run here, or none does.
        OptionError: an option that the backend does not have, or beyond what the engine was built for.
    """
    if wanted.backend == "onnxruntime":
        return choose_onnxruntime(bundle, onnxruntime_version(), wanted.accuracy_level, integrity)
    if wanted.backend != "auto":
        return _choose_gpu(bundle, wanted.backend, wanted, integrity)
    refusals = []
    for backend in GPU_BACKENDS:
        if not has_engine(bundle, backend):
            continue
        try:
            return _choose_gpu(bundle, backend, wanted, integrity)
        except (BackendError, OptionError) as error:
            refusals.append(f"not {SPOKEN_BACKENDS[backend]}: {error}")
    return fall_back(bundle, wanted, integrity, refusals)


def has_engine(bundle: Bundle, backend: GpuBackend) -> bool:
    """Whether a bundle holds an engine of a backend, for this machine or not."""
    if backend == "onnxruntime-cuda":
        return has_cuda_engine(bundle)
    return bool(engine_directories(bundle, backend))


def _choose_gpu(bundle: Bundle, backend: GpuBackend, wanted: Wanted, integrity: Integrity) -> GpuChoice:
    given = {"accuracy_level": wanted.accuracy_level, "threads": wanted.threads}
    others = [name for name, value in given.items() if value is not None]
    if others:
        reason = f"only ONNX Runtime on the CPU has it; leave it out for {SPOKEN_BACKENDS[backend]}"
        raise OptionError(others[0], reason)
    if backend == "onnxruntime-cuda":
        return choose_cuda(bundle, integrity)
    return choose_tensorrt(bundle, backend, wanted.max_len)


def fall_back(bundle: Bundle, wanted: Wanted, integrity: Integrity, refusals: Sequence[str]) -> OnnxRuntimeChoice:
    """ONNX Runtime on the CPU, saying why no GPU: ``refusals``, or that there is no engine though there is a GPU.

    Raises:
        BundleError: the engine for this version is there but damaged.
        BackendError: ONNX Runtime is not installed.
        OptionError: an accuracy level for a bundle in which nothing is quantised.
    """
    try:
        choice = choose_onnxruntime(bundle, onnxruntime_version(), wanted.accuracy_level, integrity)
    except BackendError as error:
        raise BackendError("; ".join([str(error), *refusals])) from error
    if not refusals and any(path.exists() for path in _GPU_FILES):
        backend: Backend = "onnxruntime-cuda" if cuda_refusal(bundle.manifest) is None else "tensorrt-rtx"
        build = f"llava-deploy build {bundle.directory} --backend {backend}"
        refusals = [f"this machine has an NVIDIA GPU: {build} makes the bundle run on it"]
    return replace(choice, reason="; ".join([choice.reason, *refusals]))


def choose_onnxruntime(
    bundle: Bundle, version: str, accuracy_level: AccuracyLevel | None, integrity: Integrity
) -> OnnxRuntimeChoice:
    """Prefer the engine that ``llava-deploy build`` made for this ONNX Runtime; else take the canonical graphs.

    An ``accuracy_level`` that is asked for has to be the engine's.

    Raises:
        BundleError: the engine for this version is there but damaged.
        OptionError: an accuracy level for a bundle in which nothing is quantised.
    """
    level = resolved_accuracy_level(bundle.manifest, accuracy_level)
    key = EngineKey("onnxruntime", version, "cpu", source_digest(bundle.manifest), level, None)
    directory = bundle.directory / key.directory
    name = f"ONNX Runtime {version} on the CPU, "
    if not directory.is_dir():
        return _canonical(bundle, level, f"{name}canonical graphs; llava-deploy build makes it start sooner")
    engine = read_engine_manifest(directory)
    built = engine.key.accuracy_level
    if replace(engine.key, accuracy_level=level, int8=()) != key:
        reason = "was built from others; build it again"
    elif engine.key.int8 and not has_int8_products():
        reason = "computes in 8-bit integers, for which this processor lacks exact products; build it here, without"
    elif accuracy_level is not None and built != accuracy_level:
        reason = f"was built for accuracy level {built}"
    else:
        reason = None
    if reason is not None:
        return _canonical(bundle, level, f"{name}canonical graphs: {directory.name} {reason}")
    int8 = engine.key.int8
    options = "".join(f" --int8 {part}" for part in int8)
    again = f"build it again with: llava-deploy build{options} --force"
    check_files(directory, engine.files, integrity, remedy=again)
    unlisted = sorted({*loaded_files(engine.key)} - {entry.path for entry in engine.files})
    if unlisted:
        raise BundleError(f"{directory}: want {', '.join(unlisted)} in its manifest, found none; {again}")
    many = directory / INT8_DECODER_GRAPH if "prefill" in int8 else None
    reason = f"{name}engine {directory.name}" + (f", int8: {' and '.join(int8)}" if int8 else "")
    return OnnxRuntimeChoice(directory / VISION_GRAPH, directory / DECODER_GRAPH, many, int8, built, reason)


def _canonical(bundle: Bundle, level: AccuracyLevel | None, reason: str) -> OnnxRuntimeChoice:
    return OnnxRuntimeChoice(bundle.path(VISION_GRAPH), bundle.path(DECODER_GRAPH), None, (), level, reason)
