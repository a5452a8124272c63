"""Which TensorRT engine of a bundle runs on this machine's GPU, and why another does not. It deserialises nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llava_deploy.engines.engine_manifest import ENGINES, read_engine_manifest, source_digest
from llava_deploy.engines.errors import BackendError, BundleError, OptionError
from llava_deploy.engines.names import Backend
from llava_deploy.engines.tensorrt_module import SPOKEN, TensorRtBackend, TensorRtModule, import_tensorrt
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.tensorrt.cuda import Device
from llava_deploy.runtime.tensorrt.plans import misfit


@dataclass(frozen=True)
class TensorRtChoice:
    """The engine to load, and a sentence on the choice for people.

    Attributes:
        device: the GPU.
        module: what deserialises it.
        directory: of the engine, whose plans were not touched.
        recipe: what it was built for.
        max_len: slots of the cache that are used of those that it was built for.
        reason: the sentence.
    """

    device: Device
    module: TensorRtModule
    directory: Path
    recipe: TensorRtRecipe
    max_len: int
    reason: str

    @property
    def backend(self) -> Backend:
        """What loads it."""
        return self.module.backend


def engine_directories(bundle: Bundle, backend: TensorRtBackend) -> list[Path]:
    """Directories of the bundle that hold an engine of this backend, whether it runs here or not."""
    pattern = re.compile(rf"{backend}-\d[^-]*-.+")
    home = bundle.directory / ENGINES
    found = home.iterdir() if home.is_dir() else ()
    return sorted(path for path in found if pattern.fullmatch(path.name) and path.is_dir())


def choose_tensorrt(bundle: Bundle, backend: TensorRtBackend, max_len: int | None) -> TensorRtChoice:
    """The engine for the version that is installed and for the GPU that is there; its plans are not touched.

    Args:
        bundle: its directory holds the engines.
        backend: one of the two modules.
        max_len: slots of the cache that are wanted; ``None``: all that the engine has.

    Raises:
        BackendError: no engine of this backend, no GPU or driver, the module is not installed, or no engine is for what
            is there.
        BundleError: an engine's manifest cannot be read, and no other engine runs here.
        OptionError: a longer cache than the engine has.
    """
    build = f"llava-deploy build {bundle.directory} --backend {backend}"
    directories = engine_directories(bundle, backend)
    if not directories:
        raise BackendError(f"{bundle.directory}: no engine of {SPOKEN[backend]}; build one with: {build}")
    device = Device()
    module = import_tensorrt(backend)
    source = source_digest(bundle.manifest)
    reasons = []
    damaged: BundleError | None = None
    for directory in directories:
        try:
            key = read_engine_manifest(directory, remedy=f"build it again with: {build}").key
        except BundleError as error:
            damaged = error
            continue
        is_current = key.source == source
        reason = misfit(key, module, device) if is_current else "from other graphs than the bundle holds"
        if reason is None and key.tensorrt is not None:
            return _chosen(directory, key.tensorrt, module, device, max_len, build)
        reasons.append(f"engine {directory.name} was built {reason}")
    if damaged is not None:
        raise damaged
    raise BackendError(f"{'; '.join(reasons)}; build one for this machine with: {build}")


def _chosen(
    directory: Path, recipe: TensorRtRecipe, module: TensorRtModule, device: Device, max_len: int | None, build: str
) -> TensorRtChoice:
    most = recipe.limits.max_len
    if max_len is not None and max_len > most:
        reason = f"engine {directory.name} was built for {most}, got {max_len}; build another with: {build}"
        raise OptionError("max_len", f"{reason} --max-len {max_len}")
    gpu = f"{device.name} ({device.capability})"
    reason = f"{SPOKEN[module.backend]} {module.version} on {gpu}, engine {directory.name}"
    return TensorRtChoice(device, module, directory, recipe, most if max_len is None else max_len, reason)
