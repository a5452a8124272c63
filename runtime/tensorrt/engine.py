"""A plan on the GPU: held against its manifest before TensorRT sees it, and run through contexts that share memory."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections import deque
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from llava_deploy.engines.contract import GraphSpec
from llava_deploy.engines.engine_manifest import EngineManifest, read_engine_manifest
from llava_deploy.engines.errors import BackendError, BundleError
from llava_deploy.engines.manifest import FileEntry
from llava_deploy.engines.tensorrt_module import DTYPES, TensorRtModule
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe
from llava_deploy.runtime.tensorrt.cuda import Device, DeviceMemory, DeviceMemoryError

_CHUNK = 64 << 20  # bytes hashed at a time


class Replay(Enum):
    """Whether TensorRT for RTX captures what a context does as a CUDA graph and replays it."""

    NEVER = "never"
    BY_TENSORRT = "by TensorRT"


class Workspace:
    """Memory for the activations of all contexts; they share it, as one stream runs them in turn."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._size = 0
        self._memory: DeviceMemory | None = None

    def reserve(self, size: int) -> None:
        """Have room for ``size`` bytes, to be called before the first :meth:`block`."""
        self._size = max(self._size, size)

    def block(self) -> DeviceMemory:
        """The memory, allocated at the first call.

        Raises:
            DeviceMemoryError: there is no room for it.
        """
        if self._memory is None:
            self._memory = self._device.allocate(max(self._size, 1), "TensorRT's activations")
        return self._memory


class Engine:
    """A deserialised plan.

    Attributes:
        device: where it is.
        recipe: what it was built for.
        name: for messages.
    """

    def __init__(
        self, name: str, plan: mmap.mmap, recipe: TensorRtRecipe, module: TensorRtModule, workspace: Workspace,
        device: Device,
    ) -> None:  # fmt: skip
        """Deserialise a plan that was checked.

        Raises:
            DeviceMemoryError: the GPU has no room for it.
            BackendError: TensorRT refuses it.
        """
        self.name = name
        self.device = device
        self.recipe = recipe
        self._module = module
        self._workspace = workspace
        self._messages: deque[str] = deque(maxlen=4)
        # Kept: what they make uses them.
        self._logger = _logger(module.api, self._messages)
        self._runtime = module.api.Runtime(self._logger)
        if recipe.version_compatible and module.backend == "tensorrt":
            self._runtime.engine_host_code_allowed = True  # such a plan brings the code of its own version's runtime
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.failure("cannot be deserialised")
        profiles = range(self._engine.num_optimization_profiles)
        workspace.reserve(max(self._engine.get_device_memory_size_for_profile_v2(each) for each in profiles))

    def context(self, profile: int, replay: Replay) -> Context:
        """A new context that runs one optimisation profile.

        Raises:
            DeviceMemoryError: the GPU has no room for it.
            BackendError: TensorRT refuses.
        """
        api = self._module.api
        memory = self._workspace.block()
        managed = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._module.backend == "tensorrt-rtx":
            settings = self._engine.create_runtime_config()
            settings.set_execution_context_allocation_strategy(managed)
            if replay is Replay.BY_TENSORRT:
                settings.cuda_graph_strategy = api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(settings)
        else:
            context = self._engine.create_execution_context(managed)
        if context is None:
            raise self.failure("gives no execution context")
        context.set_device_memory(memory.address, memory.size)
        if not context.set_optimization_profile_async(profile, self.device.stream):
            raise self.failure(f"does not take optimisation profile {profile}")
        return Context(self, context, memory)

    def require(self, spec: GraphSpec) -> None:
        """Hold the inputs and outputs against the contract: names, dtypes, and the sizes that are fixed in it.

        Raises:
            BackendError: one differs.
        """
        engine = self._engine
        inputs = self._module.api.TensorIOMode.INPUT
        found: dict[tuple[str, bool], Any] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            found[name, engine.get_tensor_mode(name) == inputs] = engine.get_tensor_dtype(name).name
        wanted = {(each.name, True): each for each in spec.inputs} | {(each.name, False): each for each in spec.outputs}
        if differ := sorted(name for name, _ in found.keys() ^ wanted.keys()):
            raise BackendError(f"{self.name}: not of this model: its inputs and outputs differ in {', '.join(differ)}")
        for key, tensor in wanted.items():
            shape = tuple(engine.get_tensor_shape(tensor.name))
            fits = len(shape) == len(tensor.shape) and all(
                isinstance(want, str) or want == got for want, got in zip(tensor.shape, shape, strict=True)
            )
            if not fits or found[key] != DTYPES[tensor.dtype]:
                raise BackendError(
                    f"{self.name}: not of this model: want {tensor} for {tensor.name}, found {found[key]}{list(shape)}"
                )

    @property
    def replays(self) -> bool:
        """Whether TensorRT captures and replays CUDA graphs by itself."""
        return self._module.backend == "tensorrt-rtx"

    def failure(self, what: str) -> BackendError:
        """An error with what TensorRT has logged."""
        said = "; ".join(self._messages) or "it gives no reason"
        self._messages.clear()
        text = f"{self.name}: {self._module.backend} {self._module.version} {what}: {' '.join(said.split())}"
        if any(word in said for word in ("OutOfMemory", "out of memory", "cudaError 2:")):
            free, total = self.device.memory()
            return DeviceMemoryError(f"{text}; {free:,} of the GPU's {total:,} bytes are free")
        return BackendError(text)


class Context:
    """Runs an engine in one optimisation profile; inputs and outputs stay bound from run to run."""

    def __init__(self, engine: Engine, context: Any, memory: DeviceMemory) -> None:
        self._engine = engine
        self._context = context
        self._memory = memory
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, name: str, address: int) -> None:
        """Say where an input or output lies.

        Raises:
            BackendError: TensorRT refuses.
        """
        if not self._context.set_tensor_address(name, address):
            raise self._engine.failure(f"refuses the address of {name}")

    def reshape(self, name: str, shape: tuple[int, ...]) -> None:
        """Say an input's shape.

        Raises:
            BackendError: outside the profile.
        """
        if self._shapes.get(name) == shape:
            return
        if not self._context.set_input_shape(name, shape):
            raise self._engine.failure(f"refuses shape {list(shape)} for {name}")
        self._shapes[name] = shape

    def run(self) -> None:
        """Queue a run.

        Raises:
            DeviceMemoryError: the GPU has no memory for it.
            BackendError: TensorRT refuses.
        """
        if not self._context.execute_async_v3(self._engine.device.stream):
            raise self._engine.failure("cannot run")


def open_plans(directory: Path, plans: Sequence[str], module: TensorRtModule, device: Device) -> list[Engine]:
    """Deserialise plans of an engine directory; their contexts share one workspace.

    Before TensorRT gets to see a file, its directory's manifest is held against the module and the GPU, and all of the
    file against its sha256.

    Args:
        directory: of the engine, inside its bundle.
        plans: names of files in it.
        module: what deserialises them.
        device: where they go.

    Raises:
        BackendError: built for another version or another GPU, or TensorRT refuses.
        BundleError: altered on disk, or not a TensorRT engine.
        DeviceMemoryError: no room on the GPU.
    """
    manifest = read_engine_manifest(directory)
    again = f"llava-deploy build {directory.parent.parent} --backend {module.backend}"
    recipe = _require_fit(directory, manifest, module, device, again)
    entries = {entry.path: entry for entry in manifest.files}
    workspace = Workspace(device)
    engines = []
    for name in plans:
        if name not in entries:
            raise BundleError(f"{directory}: want {name} in its manifest, found {sorted(entries)}; {again} --force")
        with _mapped(directory / name, entries[name], again) as plan:
            engines.append(Engine(str(directory / name), plan, recipe, module, workspace, device))
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


def _require_fit(
    directory: Path, manifest: EngineManifest, module: TensorRtModule, device: Device, again: str
) -> TensorRtRecipe:
    key = manifest.key
    if key.tensorrt is None or key.backend != module.backend:
        raise BundleError(f"{directory}: want an engine of {module.backend}, found one of {key.backend}; {again}")
    if not fits_version(key.version, key.tensorrt, module.version):
        raise BackendError(
            f"{directory}: built with {module.backend} {key.version}, and {module.version} is installed; for an engine "
            f"of this version: {again}"
        )
    if device.capability not in key.tensorrt.capabilities:
        raise BackendError(
            f"{directory}: built for {', '.join(key.tensorrt.capabilities)}, and this GPU, {device.name}, is "
            f"{device.capability}; for an engine of this GPU: {again}"
        )
    return key.tensorrt


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


def _logger(api: Any, messages: deque[str]) -> Any:
    """TensorRT's errors are kept; what else it has to say is of its builder's making, or for its developers."""

    class Errors(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Errors()
