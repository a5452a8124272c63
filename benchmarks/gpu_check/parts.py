"""The parts of the check on a machine: what runs, in which order, for how long, and what cannot run and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from names import BUILT, BackendUnderTest, ShapeName, Weights

RTX_WITHOUT_GPU = "sm89"
"""What TensorRT for RTX builds for where there is no GPU; such an engine is built and not run."""

TEXT_TOKENS = 84
"""Of the prompt that is timed, beside the picture's; a test holds it against the runtime's count."""

DEMO_LIMITS = {"max_batch": 4, "max_len": 512, "max_images": 4}
GIB = 1 << 30


@dataclass(frozen=True)
class Measured:
    """How a shape is measured: slots of the cache, patches of its picture, and the GPU memory that it wants.

    Attributes:
        device_bytes: for fp16 and for int4, roughly.
    """

    max_len: int
    patches: int
    device_bytes: tuple[int, int]


MEASURED: dict[ShapeName, Measured] = {
    "7b": Measured(2048, 576, (17 * GIB, 7 * GIB)),
    "1b": Measured(2048, 576, (5 * GIB, 3 * GIB)),
    "tiny": Measured(512, 36, (0, 0)),
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
    """Every part, those that cannot run among them; ``found`` is what :func:`environment.look` gives."""
    demo: tuple[Weights, ...] = ("fp16", "int4")
    product: tuple[BackendUnderTest, ...] = ("tensorrt", "tensorrt-rtx")
    others: tuple[BackendUnderTest, ...] = ("onnxruntime-cuda-lowered", "onnxruntime-cuda", "onnxruntime")
    parts = [_demo_export(settings, weights) for weights in demo]
    parts += [part for weights in demo for one in product for part in _demo_parts(found, settings, weights, one)]
    if settings.shape != "tiny" and found["gpu"] is None:
        parts.append(Part(f"{settings.shape}/speed", "", {}, 0, missing=f"no GPU: {found['no_gpu']}"))
    else:
        parts += _speed_parts(found, settings)
    parts += [part for weights in demo for one in others for part in _demo_parts(found, settings, weights, one)]
    if settings.shape == "tiny" or found["gpu"] is not None:
        parts += _measured(found, settings, "int4-symmetric")
    return parts


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
    yield Part(f"{at}/questions", "questions:ask", given, 90, needs, why)
    rtx = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"} if backend == "tensorrt-rtx" else {}
    watched = {**beside, "capability": _capability(found)}
    yield Part(f"{at}/polygraphy", "stage_by_stage:compare", watched, 120, (export.name,), why, rtx)


def _speed_parts(found: dict[str, Any], settings: Settings) -> Iterator[Part]:
    """int4 first: what a board has room for."""
    yield from _measured(found, settings, "int4")
    yield _transformers(found, settings, "eager")
    yield from _measured(found, settings, "fp16")
    yield _transformers(found, settings, "compiled")


def _measured(found: dict[str, Any], settings: Settings, weights: Weights) -> Iterator[Part]:
    shape, measured = settings.shape, MEASURED[settings.shape]
    bundle = settings.work / f"{shape}-{weights}"
    export = Part(
        f"{shape}/{weights}/export",
        "shapes:make_bundle",
        {"shape": shape, "weights": weights, "bundle": str(bundle)},
        180,
    )
    parts = [export]
    limits = {"max_batch": 1, "max_len": measured.max_len, "max_images": 1}
    backends: tuple[BackendUnderTest, ...] = ("tensorrt", "tensorrt-rtx")
    if weights != "int4-symmetric":
        backends = (*backends, "onnxruntime-cuda-lowered", "onnxruntime-cuda")
    for backend in (*backends, "onnxruntime") if shape == "tiny" else backends:
        at = f"{shape}/{weights}/{backend}"
        needs: tuple[str, ...] = (export.name,)
        if backend in BUILT:
            parts.append(_build(found, at, str(bundle), backend, limits, 240, needs))
            needs = (*needs, parts[-1].name)
        why = missing(found, backend) or (None if backend == "onnxruntime" else _device_want(found, shape, weights))
        given = {
            "bundle": str(bundle),
            "backend": backend,
            "max_len": measured.max_len,
            "copy_gb_per_s": found["copy_gb_per_s"],
        }
        parts.append(Part(f"{at}/speed", "speed:measure", given, 120, needs, why))
    yield from parts[:-1]
    yield replace(parts[-1], removes=bundle)


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
    return Part(f"{shape}/fp16/transformers {mode}/speed", "speed_torch:measure", given, 240, (), why)


def _build(
    found: dict[str, Any], at: str, bundle: str, backend: BackendUnderTest, limits: dict[str, int], limit_s: float,
    needs: tuple[str, ...],
) -> Part:  # fmt: skip
    capability = _capability(found)
    why = missing(found, backend)
    if backend == "tensorrt-rtx" and found["gpu"] is None:
        why, capability = not_installed(found, backend), RTX_WITHOUT_GPU
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
