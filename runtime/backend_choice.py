"""What runs a bundle: the best backend that it holds an engine for and that runs on this machine, and why no better."""

from __future__ import annotations

from collections.abc import Sequence
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
from llava_deploy.engines.processor import has_int8_products
from llava_deploy.engines.tensorrt_module import SPOKEN, TensorRtBackend
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.onnxruntime_backend import onnxruntime_version
from llava_deploy.runtime.tensorrt_choice import TensorRtChoice, choose_tensorrt, engine_directories

BackendName: TypeAlias = "Backend | Literal['auto']"
"""What may be asked for; ``auto`` takes the best that there is."""

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


def choose(bundle: Bundle, wanted: Wanted, integrity: Integrity) -> OnnxRuntimeChoice | TensorRtChoice:
    """Choose the backend, and the files that it loads.

    ``auto`` tries TensorRT, then TensorRT for RTX, each only where the bundle has an engine of it, then ONNX Runtime.

    Raises:
        BundleError: an engine is damaged.
        BackendError: the backend that was asked for does not run here, or none does.
        OptionError: an option that the backend does not have, or beyond what the engine was built for.
    """
    if wanted.backend == "onnxruntime":
        return choose_onnxruntime(bundle, onnxruntime_version(), wanted.accuracy_level, integrity)
    others = _of_onnxruntime_alone(wanted)
    if wanted.backend != "auto":
        if others is not None:
            raise OptionError(others, f"only ONNX Runtime has it; leave it out for {SPOKEN[wanted.backend]}")
        return choose_tensorrt(bundle, wanted.backend, wanted.max_len)
    refusals = []
    for backend in get_args(TensorRtBackend):
        if not engine_directories(bundle, backend):
            continue
        try:
            if others is not None:
                raise OptionError(others, "only ONNX Runtime has it")
            return choose_tensorrt(bundle, backend, wanted.max_len)
        except (BackendError, OptionError) as error:
            refusals.append(f"not {SPOKEN[backend]}: {error}")
    return fall_back(bundle, wanted, integrity, refusals)


def fall_back(bundle: Bundle, wanted: Wanted, integrity: Integrity, refusals: Sequence[str]) -> OnnxRuntimeChoice:
    """ONNX Runtime, saying why not TensorRT: ``refusals``, or that there is no engine though there is a GPU.

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
        build = f"llava-deploy build {bundle.directory} --backend tensorrt-rtx"
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


def _of_onnxruntime_alone(wanted: Wanted) -> str | None:
    """An option that was given and that TensorRT has not."""
    given = {"accuracy_level": wanted.accuracy_level, "threads": wanted.threads}
    return next((name for name, value in given.items() if value is not None), None)
