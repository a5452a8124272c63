"""Plans on disk: held against their manifest, the module and the GPU, and every byte, before TensorRT sees them."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from llava_deploy.engines.engine_manifest import EngineKey, read_engine_manifest
from llava_deploy.engines.errors import BackendError, BundleError
from llava_deploy.engines.manifest import FileEntry
from llava_deploy.engines.tensorrt_module import SPOKEN, TensorRtModule
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe
from llava_deploy.runtime.tensorrt.cuda import Device
from llava_deploy.runtime.tensorrt.engine import Engine, Runtime

_CHUNK = 64 << 20  # bytes hashed at a time


def open_plans(directory: Path, plans: Sequence[str], module: TensorRtModule, device: Device) -> list[Engine]:
    """Deserialise plans of an engine directory; their contexts share one block of memory.

    Before TensorRT gets to see a file, its directory's manifest is held against the module and the GPU, and all of the
    file against its sha256.

    Args:
        directory: of the engine, inside its bundle.
        plans: names of files in it.
        module: what deserialises them.
        device: where they go.

    Raises:
        BackendError: built for another backend, version or GPU, or TensorRT refuses.
        BundleError: altered on disk.
        DeviceMemoryError: no room on the GPU.
    """
    again = f"llava-deploy build {directory.parent.parent} --backend {module.backend}"
    manifest = read_engine_manifest(directory, remedy=f"build it again with: {again}")
    reason, recipe = misfit(manifest.key, module, device), manifest.key.tensorrt
    if reason is not None or recipe is None:
        raise BackendError(f"{directory}: was built {reason}; build one for this machine with: {again}")
    entries = {entry.path: entry for entry in manifest.files}
    runtime = Runtime(module, device, recipe)
    engines = []
    for name in plans:
        if name not in entries:
            raise BundleError(
                f"{directory}: want {name} in its manifest, found {sorted(entries)}; "
                f"build it again with: {again} --force"
            )
        with _mapped(directory / name, entries[name], again) as plan:
            engines.append(Engine(str(directory / name), plan, runtime))
    return engines


def fits_version(version: str, recipe: TensorRtRecipe, installed: str) -> bool:
    """Whether the version of TensorRT that is installed runs a plan of ``version``: its own, or made for later ones."""
    if version == installed:
        return True
    built, there = (re.match(r"(\d+)\.(\d+)\.(\d+)", each) for each in (version, installed))
    if built is None or there is None or not recipe.version_compatible:
        return False
    before, now = (tuple(map(int, each.groups())) for each in (built, there))
    return before[0] == now[0] and before <= now


class Target(Protocol):
    """A GPU, as far as it matters to where an engine runs; a :class:`Device` is one, opened."""

    @property
    def name(self) -> str:
        """As its driver says."""

    @property
    def capability(self) -> str | None:
        """Compute capability, as ``sm89``; ``None`` where nobody says."""


def misfit(key: EngineKey, module: TensorRtModule, device: Target) -> str | None:
    """Why an engine does not run here, after "was built"; ``None`` where it does."""
    recipe = key.tensorrt
    if recipe is None or key.backend != module.backend:
        return f"for {key.backend}"
    if not fits_version(key.version, recipe, module.version):
        return f"with {SPOKEN[module.backend]} {key.version}, and {module.version} is installed"
    if device.capability not in recipe.capabilities:
        return f"for {', '.join(recipe.capabilities)}, and the GPU is {device.capability} ({device.name})"
    return None


def _mapped(path: Path, entry: FileEntry, again: str) -> mmap.mmap:
    """The file's bytes, of the right size and sha256; mapped, so that they take no memory of their own."""
    try:
        with path.open("rb") as file:
            plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise BundleError(f"{path}: cannot be read ({error}); build it again with: {again} --force") from error
    digest = hashlib.sha256()
    with memoryview(plan) as view:
        for at in range(0, len(view), _CHUNK):
            digest.update(view[at : at + _CHUNK])
    if (len(plan), digest.hexdigest()) != (entry.size, entry.sha256):
        found = f"{len(plan):,} bytes with sha256 {digest.hexdigest()[:12]}…"
        plan.close()
        raise BundleError(
            f"{path}: want {entry.size:,} bytes with sha256 {entry.sha256[:12]}…, found {found}: the file was altered; "
            f"build it again with: {again} --force"
        )
    return plan
