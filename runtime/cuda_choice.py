"""Whether a bundle's engine for ONNX Runtime's CUDA provider can run here, and why not. It loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.engine_manifest import loaded_files, read_engine_manifest
from llava_deploy.engines.errors import BackendError, BundleError
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.engines.names import Backend
from llava_deploy.engines.onnxruntime_cuda import CUDA_PROVIDER, CUDA_SINCE, cuda_key, cuda_refusal
from llava_deploy.engines.onnxruntime_module import import_onnxruntime
from llava_deploy.runtime.bundle import Bundle


@dataclass(frozen=True)
class CudaChoice:
    """The graphs to load, and a sentence on the choice for people."""

    vision: Path
    decoder: Path
    reason: str

    @property
    def backend(self) -> Backend:
        """What loads them."""
        return "onnxruntime-cuda"


def has_cuda_engine(bundle: Bundle) -> bool:
    """Whether there is an engine, current or not."""
    return (bundle.directory / cuda_key(bundle.manifest).directory).is_dir()


def choose_cuda(bundle: Bundle, integrity: Integrity) -> CudaChoice:
    """The bundle's engine.

    Raises:
        BackendError: there is none, it was built from other graphs, or the ONNX Runtime that is installed is too old or
            has no such provider.
        BundleError: it is damaged.
    """
    key = cuda_key(bundle.manifest)
    build = f"llava-deploy build {bundle.directory} --backend {key.backend}"
    directory = bundle.directory / key.directory
    if not directory.is_dir():
        refusal = cuda_refusal(bundle.manifest)
        reason = f"no engine of it; build one with: {build}" if refusal is None else refusal
        raise BackendError(f"{bundle.directory}: {reason}")
    ort = import_onnxruntime()
    if _release(ort.__version__) < _release(CUDA_SINCE) or CUDA_PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"want ONNX Runtime {CUDA_SINCE} or later with {CUDA_PROVIDER}, found {ort.__version__} with "
            f"{', '.join(ort.get_available_providers())}; put onnxruntime-gpu in the place of onnxruntime: "
            "pip uninstall onnxruntime, then pip install 'llava-deploy[gpu]'"
        )
    engine = read_engine_manifest(directory, remedy=f"build it again with: {build} --force")
    if engine.key != key:
        raise BackendError(f"engine {directory.name} was built from others; build it again with: {build}")
    check_files(directory, engine.files, integrity, remedy=f"build it again with: {build} --force")
    unlisted = sorted({*loaded_files(engine.key)} - {entry.path for entry in engine.files})
    if unlisted:
        raise BundleError(f"{directory}: want {', '.join(unlisted)} in its manifest, found none; {build} --force")
    reason = f"ONNX Runtime {ort.__version__} on CUDA, engine {directory.name}"
    return CudaChoice(directory / VISION_GRAPH, directory / DECODER_GRAPH, reason)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
