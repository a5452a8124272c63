"""A plan on the GPU, run through contexts that share memory."""

from __future__ import annotations

import mmap
from collections import deque
from enum import Enum
from typing import Any

from llava_deploy.engines.contract import GraphSpec
from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.tensorrt_module import DTYPES, TensorRtModule
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe
from llava_deploy.runtime.tensorrt.cuda import Device, DeviceMemory, DeviceMemoryError


class Replay(Enum):
    """Whether TensorRT for RTX captures what a context does as a CUDA graph and replays it."""

    NEVER = "never"
    BY_TENSORRT = "by TensorRT"


class Runtime:
    """What the engines of one directory share: TensorRT's runtime and what it logs, and memory for activations.

    One logger, as TensorRT keeps the first of a process for some of what it says; one block of memory, as one stream
    runs all contexts in turn.

    Attributes:
        module: TensorRT.
        device: where the engines go.
        recipe: what they were built for.
        messages: TensorRT's last errors.
    """

    def __init__(self, module: TensorRtModule, device: Device, recipe: TensorRtRecipe) -> None:
        self.module = module
        self.device = device
        self.recipe = recipe
        self.messages: deque[str] = deque(maxlen=4)
        self._logger = _logger(module.api, self.messages)  # kept: TensorRT uses it
        self.handle = module.api.Runtime(self._logger)
        if recipe.version_compatible and module.backend == "tensorrt":
            self.handle.engine_host_code_allowed = True  # such a plan brings the code of its own version's runtime
        self._size = 0
        self._memory: DeviceMemory | None = None
        self._kernels: Any = None

    def reserve(self, size: int) -> None:
        """Have room for ``size`` bytes of activations, to be called before the first :meth:`block`."""
        self._size = max(self._size, size)

    def block(self) -> DeviceMemory:
        """The memory, allocated at the first call.

        Raises:
            DeviceMemoryError: there is no room for it.
        """
        if self._memory is None:
            self._memory = self.device.allocate(max(self._size, 1), "TensorRT's activations")
        return self._memory

    def kernels(self, settings: Any) -> Any:
        """TensorRT for RTX's cache of kernels, made with the first context's settings: the next need not compile."""
        if self._kernels is None:
            self._kernels = settings.create_runtime_cache()
        return self._kernels


class Engine:
    """A deserialised plan.

    Attributes:
        name: for messages.
        device: where it is.
        recipe: what it was built for.
    """

    def __init__(self, name: str, plan: mmap.mmap, runtime: Runtime) -> None:
        """Deserialise a plan that was checked.

        Raises:
            DeviceMemoryError: the GPU has no room for it.
            BackendError: TensorRT refuses it.
        """
        self.name = name
        self.device = runtime.device
        self.recipe = runtime.recipe
        self._module = runtime.module
        self._engine = runtime.handle.deserialize_cuda_engine(plan)
        self._runtime = runtime
        if self._engine is None:
            raise self.failure("cannot be deserialised")
        profiles = range(self._engine.num_optimization_profiles)
        runtime.reserve(max(self._engine.get_device_memory_size_for_profile_v2(each) for each in profiles))

    def context(self, profile: int, replay: Replay) -> Context:
        """A new context that runs one optimisation profile.

        Raises:
            DeviceMemoryError: the GPU has no room for it.
            BackendError: TensorRT refuses.
        """
        api = self._module.api
        memory = self._runtime.block()
        managed = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._module.backend == "tensorrt-rtx":
            settings = self._engine.create_runtime_config()
            settings.set_execution_context_allocation_strategy(managed)
            if not settings.set_runtime_cache(self._runtime.kernels(settings)):
                raise self.failure("takes no cache of kernels")
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
        said = "; ".join(self._runtime.messages) or "it gives no reason"
        self._runtime.messages.clear()
        text = f"{self.name}: {self._module.backend} {self._module.version} {what}: {' '.join(said.split())}"
        if any(word in said for word in ("OutOfMemory", "out of memory", "cudaError 2:")):
            free, total = self.device.memory()
            return DeviceMemoryError(f"{text}; {free:,} of the GPU's {total:,} bytes are free")
        return BackendError(text)


class Context:
    """Runs an engine in one optimisation profile; inputs and outputs stay bound from run to run."""

    def __init__(self, engine: Engine, context: Any, memory: DeviceMemory) -> None:
        self._context = context  # in this order they go: it uses what comes after it
        self._memory = memory
        self._engine = engine
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


def _logger(api: Any, messages: deque[str]) -> Any:
    """TensorRT's errors are kept; what else it has to say is of its builder's making, or for its developers."""

    class Errors(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Errors()
