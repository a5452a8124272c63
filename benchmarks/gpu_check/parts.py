"""The parts of the check on a machine: what runs, in which order, for how long, and what cannot run and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from names import BUILT, ON_GPU, YARDSTICK, BackendUnderTest, ShapeName, Weights

RTX_WITHOUT_GPU = "sm89"
"""What TensorRT for RTX builds for where there is no GPU; such an engine is built and not run."""

TEXT_TOKENS = 84
"""Of the prompt that is timed, beside the picture's; a test holds it against the runtime's count."""

DEMO_LIMITS = {"max_batch": 4, "max_len": 512, "max_images": 4}
LAYER_BY_LAYER: tuple[BackendUnderTest, ...] = ("tensorrt", "tensorrt-rtx", "onnxruntime")
"""Backends whose layers Polygraphy compares; it has no runner for a decoder in a CUDA graph."""

BATCHES = (1, 8)
"""Rows that decode is timed with; a TensorRT engine that is timed is built for one."""

GIB = 1 << 30


@dataclass(frozen=True)
class Measured:
    """How a shape is measured.

    Attributes:
        max_len: slots of the cache.
        patches: of its picture.
        device_bytes: GPU memory that it wants, for fp16 and for int4, roughly.
        export_s: the longest that its export may take; likewise the others.
        build_s: of an engine.
        speed_s: of one backend's measurement.
        transformers_s: of transformers', compilation included.
    """

    max_len: int
    patches: int
    device_bytes: tuple[int, int]
    export_s: float
    build_s: float
    speed_s: float
    transformers_s: float


MEASURED: dict[ShapeName, Measured] = {
    "7b": Measured(2048, 576, (17 * GIB, 7 * GIB), 150, 240, 150, 200),
    "1b": Measured(2048, 576, (5 * GIB, 3 * GIB), 90, 120, 90, 150),
    "tiny": Measured(512, 36, (0, 0), 60, 90, 60, 120),
}


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    shape: ShapeName
    work: Path


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: ``model/weights/backend/what``, fewer where some do not apply.
        function: ``module:name``.
        limit_s: the longest that it may take.
        needs: parts that must have passed before.
        missing: why it cannot run on this machine; ``None`` where it can.
        environment: variables of its process.
        removes: a bundle that nobody needs after it.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    limit_s: float
    needs: tuple[str, ...] = ()
    missing: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    removes: Path | None = None


def all_parts(found: dict[str, Any], settings: Settings) -> list[Part]:
    """Every part, those that cannot run among them, the most telling first.

    Args:
        found: what :func:`environment.look` gives.
        settings: what was asked for.
    """
    demo: tuple[Weights, ...] = ("fp16", "int4")
    others: tuple[BackendUnderTest, ...] = (YARDSTICK, "onnxruntime")
    no_gpu = None if found["gpu"] else f"no GPU: {found['no_gpu']}"
    parts = [Part("device", "device_layer:check", {}, 60, missing=no_gpu)]
    parts += [_demo_export(settings, weights) for weights in demo]
    parts += [part for one in ON_GPU for weights in demo for part in _demo_parts(found, settings, weights, one)]
    is_measured = settings.shape == "tiny" or no_gpu is None
    if is_measured:
        parts += _speed_parts(found, settings)
    else:
        parts.append(Part(f"{settings.shape}/speed", "", {}, 0, missing=no_gpu))
    parts += [part for one in others for weights in demo for part in _demo_parts(found, settings, weights, one)]
    if is_measured:
        parts += _measured(found, settings, "int4-symmetric", ("tensorrt", "tensorrt-rtx"))
    return list(_with_removals(parts))


def not_installed(found: dict[str, Any], backend: BackendUnderTest) -> str | None:
    """Why a backend's module cannot be imported; ``None`` where it can."""
    module = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}.get(backend, "onnxruntime")
    version: str = found["modules"][module]
    return f"{module} {version}" if version.startswith("cannot be imported") else None


def missing(found: dict[str, Any], backend: BackendUnderTest) -> str | None:
    """Why a backend cannot run on the machine; ``None`` where it can."""
    why = not_installed(found, backend)
    if why is not None or backend == "onnxruntime":
        return why
    if found["gpu"] is None:
        return f"no GPU: {found['no_gpu']}"
    if backend == "tensorrt-rtx":
        refusal: str | None = found["tensorrt_rtx_refusal"]
        return refusal
    if backend.startswith("onnxruntime") and "CUDAExecutionProvider" not in found["onnxruntime_providers"]:
        version = found["modules"]["onnxruntime"]
        return f"ONNX Runtime {version} is installed without CUDAExecutionProvider, which onnxruntime-gpu has"
    return None


def _demo_export(settings: Settings, weights: Weights) -> Part:
    given = {"weights": weights, "bundle": str(settings.work / f"demo-{weights}")}
    return Part(f"demo/{weights}/export", "demo:make_bundle", given, 60)


def _demo_parts(
    found: dict[str, Any], settings: Settings, weights: Weights, backend: BackendUnderTest
) -> Iterator[Part]:
    export = _demo_export(settings, weights)
    at, bundle = f"demo/{weights}/{backend}", export.arguments["bundle"]
    given = {"bundle": bundle, "backend": backend}
    why = missing(found, backend)
    needs: tuple[str, ...] = (export.name,)
    if backend in BUILT:
        build = _build(found, at, bundle, backend, DEMO_LIMITS, 120, needs)
        yield build
        needs = (*needs, build.name)
    beside = {**given, "device": "cuda" if found["torch_cuda"] else "cpu"}
    yield Part(f"{at}/verify", "demo:compare", beside, 90, needs, why)
    if backend != YARDSTICK:
        yield Part(f"{at}/questions", "questions:ask", given, 90, needs, why)
    if backend not in LAYER_BY_LAYER:
        return
    rtx = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"} if backend == "tensorrt-rtx" else {}
    yield Part(f"{at}/polygraphy", "stage_by_stage:compare", beside, 120, (export.name,), why, rtx)


def _speed_parts(found: dict[str, Any], settings: Settings) -> Iterator[Part]:
    """int4 first: what a board has room for. The yardstick last."""
    yield from _measured(found, settings, "int4", _measured_backends(settings))
    yield _transformers(found, settings, "eager")
    yield from _measured(found, settings, "fp16", _measured_backends(settings))
    yield _transformers(found, settings, "compiled")
    yield _speed(found, settings, "int4", YARDSTICK, (f"{settings.shape}/int4/export",))
    yield _speed(found, settings, "fp16", YARDSTICK, (f"{settings.shape}/fp16/export",))


def _measured_backends(settings: Settings) -> tuple[BackendUnderTest, ...]:
    return (*ON_GPU, "onnxruntime") if settings.shape == "tiny" else ON_GPU


def _measured(
    found: dict[str, Any], settings: Settings, weights: Weights, backends: Iterable[BackendUnderTest]
) -> Iterator[Part]:
    """Export, and for each backend a build and its speed; no export where none of them can run."""
    shape, measured = settings.shape, MEASURED[settings.shape]
    name, bundle = f"{shape}/{weights}/export", _bundle(settings, weights)
    limits = {"max_batch": 1, "max_len": measured.max_len, "max_images": 1}
    parts = []
    for backend in backends:
        at = f"{shape}/{weights}/{backend}"
        build = _build(found, at, bundle, backend, limits, measured.build_s, (name,))
        speed = _speed(found, settings, weights, backend, (name, build.name))
        if found["gpu"] is not None:  # without one, that it can be built is worth knowing
            build = replace(build, missing=speed.missing)
        parts += [build, speed]
    reasons = [part.missing for part in parts]
    why = None if None in reasons else reasons[0]
    given = {"shape": shape, "weights": weights, "bundle": bundle}
    yield Part(name, "shapes:make_bundle", given, measured.export_s, missing=why)
    yield from parts


def _bundle(settings: Settings, weights: Weights) -> str:
    return str(settings.work / f"{settings.shape}-{weights}")


def _speed(
    found: dict[str, Any], settings: Settings, weights: Weights, backend: BackendUnderTest, needs: tuple[str, ...]
) -> Part:
    shape, measured = settings.shape, MEASURED[settings.shape]
    given = {
        "bundle": _bundle(settings, weights),
        "backend": backend,
        "max_len": measured.max_len,
        "copy_gb_per_s": found["copy_gb_per_s"],
        "batches": BATCHES if backend in ("onnxruntime", "onnxruntime-cuda") else (),
    }
    why = missing(found, backend) or (None if backend == "onnxruntime" else _device_want(found, shape, weights))
    return Part(f"{shape}/{weights}/{backend}/speed", "speed:measure", given, measured.speed_s, needs, why)


def _with_removals(parts: list[Part]) -> Iterator[Part]:
    """Each bundle goes with the last part that has it."""
    last = {part.arguments["bundle"]: part.name for part in parts if "bundle" in part.arguments}
    for part in parts:
        bundle = part.arguments.get("bundle")
        yield replace(part, removes=Path(bundle)) if bundle and last[bundle] == part.name else part


def _transformers(found: dict[str, Any], settings: Settings, mode: str) -> Part:
    shape, measured = settings.shape, MEASURED[settings.shape]
    device = "cuda" if found["torch_cuda"] else "cpu"
    why = None
    if shape != "tiny":
        why = _device_want(found, shape, "fp16") if found["torch_cuda"] else "PyTorch cannot use the GPU here"
    given = {
        "shape": shape,
        "mode": mode,
        "prompt_tokens": measured.patches + TEXT_TOKENS,
        "max_len": measured.max_len,
        "device": device,
        "copy_gb_per_s": found["copy_gb_per_s"],
    }
    return Part(
        f"{shape}/fp16/transformers {mode}/speed", "speed_torch:measure", given, measured.transformers_s, (), why
    )


def _build(
    found: dict[str, Any], at: str, bundle: str, backend: BackendUnderTest, limits: dict[str, int], limit_s: float,
    needs: tuple[str, ...],
) -> Part:  # fmt: skip
    capability, why = _capability(found), missing(found, backend)
    if backend == "tensorrt-rtx" and found["gpu"] is None:
        why, capability = not_installed(found, backend), RTX_WITHOUT_GPU
    if backend == "onnxruntime-cuda" and found["gpu"] is None:
        why = None
    given = {"bundle": bundle, "backend": backend, "limits": limits, "capability": capability}
    return Part(f"{at}/build", "backends:build", given, limit_s, needs, why)


def _capability(found: dict[str, Any]) -> str | None:
    return None if found["gpu"] is None else found["gpu"]["capability"]


def _device_want(found: dict[str, Any], shape: ShapeName, weights: Weights) -> str | None:
    wanted = MEASURED[shape].device_bytes[weights != "fp16"]
    there = 0 if found["gpu"] is None else found["gpu"]["memory_bytes"]
    if there >= wanted:
        return None
    return f"wants {wanted / GIB:.0f} GiB of GPU memory, this machine has {there / GIB:.1f}"
