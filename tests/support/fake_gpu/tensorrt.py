"""A fake TensorRT: the real module's enums and loggers; its engines are ONNX graphs that ONNX Runtime runs."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import tensorrt_rtx as real

from fake_gpu.memory import ALIGNMENT, GARBAGE
from fake_gpu.refit import FakeOnnxParserRefitter, FakeRefitter, Refittable
from fake_gpu.signatures import held_against
from llava_deploy.engines.names import ACCURACY_LEVEL_ENTRY

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

DTYPES = {
    "tensor(float)": (np.dtype(np.float32), real.DataType.FLOAT),
    "tensor(float16)": (np.dtype(np.float16), real.DataType.HALF),
    "tensor(int64)": (np.dtype(np.int64), real.DataType.INT64),
    "tensor(bool)": (np.dtype(np.bool_), real.DataType.BOOL),
}
RTX_ONLY = {
    *("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "ComputeCapability", "EngineValidity"),
    *("EngineInvalidityDiagnostics", "IRuntimeCache"),
}
"""Names that the bindings of full TensorRT, 10.3.0 and 11.4.0, do not have."""

AFTER_10_3 = {"IRuntimeConfig", "IStreamReaderV2"}


class FakeTensorRt:
    """Stands in for the module; everything but Runtime and refitters is the real one's."""

    Refitter, OnnxParserRefitter = FakeRefitter, FakeOnnxParserRefitter

    def __init__(self, gpu: FakeGpu, name: str, version: str) -> None:
        self._gpu, self._name = gpu, name
        self.__name__, self.__version__ = name, version

    def __getattr__(self, name: str) -> Any:
        if self._name == "tensorrt":
            old = self.__version__.startswith("10.3.")
            if name in RTX_ONLY or (old and name in AFTER_10_3):
                raise AttributeError(f"module 'tensorrt' {self.__version__} has no attribute {name!r}")
        return getattr(real, name)

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802  (the real module's name)
        if not isinstance(logger, real.ILogger):
            raise TypeError("Runtime: incompatible constructor arguments: want an ILogger")
        return FakeRuntime(self, logger)


class _Checked:
    """As a class of pybind11: nothing can be set that is not declared."""

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        object.__setattr__(self, name, value)

    def _complain(self, message: str) -> None:
        self._logger.log(real.ILogger.ERROR, message)


@held_against(real.Runtime)
class FakeRuntime(_Checked):
    engine_host_code_allowed = False

    def __init__(self, module: FakeTensorRt, logger: Any) -> None:
        self._module, self._logger, self._gpu = module, logger, module._gpu

    def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeEngine | None:
        self._gpu.calls["deserialize_cuda_engine"] += 1
        if self._gpu.asked_to_fail("deserialize_cuda_engine"):
            self._complain("Error Code 2: OutOfMemory (Requested size was larger than the GPU has)")
            return None
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self._complain("Error Code 1: Serialization (magicTag)")
            return None
        capability = "sm{}{}".format(*self._gpu.capability)
        found = plan["backend"], plan["version"], capability in plan["capabilities"]
        if found != (self._module._name.replace("_", "-"), self._module.__version__, True):
            self._complain(f"Error Code 6: the plan is for {plan['backend']} {plan['version']} {plan['capabilities']}")
            return None
        return FakeEngine(self, plan)


@held_against(real.IRuntimeCache)
class FakeRuntimeCache(_Checked):
    pass


@held_against(real.IRuntimeConfig)
class FakeRuntimeConfig(_Checked):
    cuda_graph_strategy = real.CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = real.DynamicShapesKernelSpecializationStrategy.LAZY

    def __init__(self) -> None:
        self._strategy = real.ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: Any = real.ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache | None = None) -> bool:
        self._cache = cache
        return cache is not None


@held_against(real.ICudaEngine)
class FakeEngine(Refittable, _Checked):
    def __init__(self, runtime: FakeRuntime, plan: dict[str, Any]) -> None:
        self._runtime, self._logger, self._gpu, self._plan = runtime, runtime._logger, runtime._gpu, plan
        self._session = self._gpu.session(Path(plan["onnx"]))
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._outputs = {each.name: each for each in self._session.get_outputs()}
        self._gpu.engines.add(self)

    num_optimization_profiles = property(lambda self: len(self._plan["profiles"]))
    num_io_tensors = property(lambda self: len(self._inputs) + len(self._outputs))

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = real.TensorIOMode
        return modes.INPUT if name in self._inputs else modes.OUTPUT if name in self._outputs else modes.NONE

    def get_tensor_dtype(self, name: str) -> Any:
        return DTYPES[{**self._inputs, **self._outputs}[name].type][1]

    def get_tensor_shape(self, name: str) -> Any:
        shape = [dim if isinstance(dim, int) else -1 for dim in {**self._inputs, **self._outputs}[name].shape]
        for i, dim in enumerate(shape):
            sizes = {profile[name][kind][i] for profile in self._plan["profiles"] for kind in range(3)} \
                if name in self._inputs else set()  # fmt: skip
            shape[i] = sizes.pop() if dim == -1 and len(sizes) == 1 else dim
        return real.Dims(shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [real.Dims(shape) for shape in self._plan["profiles"][profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        aliased = self._plan["cache"] == "in-place" and name.startswith("present.")
        return name.replace("present.", "past.") if aliased else None

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return (4 - profile_index) << 12

    def create_runtime_config(self) -> FakeRuntimeConfig:
        if self._plan["version"].startswith("10.3."):
            raise AttributeError("'tensorrt.tensorrt.ICudaEngine' object has no attribute 'create_runtime_config'")
        return FakeRuntimeConfig()

    def create_execution_context(
        self, strategy: Any = real.ExecutionContextAllocationStrategy.STATIC
    ) -> FakeContext | None:
        self._gpu.calls["create_execution_context"] += 1
        if self._gpu.asked_to_fail("create_execution_context"):
            self._complain("Error Code 2: OutOfMemory (Requested size was larger than the GPU has)")
            return None
        config = strategy if isinstance(strategy, FakeRuntimeConfig) else None
        managed = (config._strategy if config else strategy) == real.ExecutionContextAllocationStrategy.USER_MANAGED
        return FakeContext(self, config, managed)


@held_against(real.IExecutionContext)
class FakeContext(_Checked):
    def __init__(self, engine: FakeEngine, config: FakeRuntimeConfig | None, managed: bool) -> None:
        self._engine, self._logger, self._gpu = engine, engine._logger, engine._gpu
        self._config, self._managed, self._scratch = config, managed, (0, 0)
        self._profile, self._version, self._settled = 0, 0, -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._gpu.contexts.add(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (int(memory), int(size))

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        self._gpu.cuda.stream(stream_handle)
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._refuse(f"profile {profile_index} does not exist")
        self._profile, self._shapes = profile_index, {}
        self._version += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if not isinstance(shape, (tuple, list, real.Dims)) or any(type(dim) is not int for dim in shape):
            raise TypeError(f"set_input_shape(): incompatible function arguments: {name!r}, {shape!r}")
        if name not in self._engine._inputs:
            return self._refuse(f"setInputShape: {name} is no input")
        lowest, _, highest = self._engine._plan["profiles"][self._profile][name]
        fits = len(shape) == len(lowest) and all(a <= x <= b for a, x, b in zip(lowest, shape, highest, strict=True))
        if not fits:
            return self._refuse(f"setInputShape: {name}: {shape} is not in {lowest}..{highest} of {self._profile}")
        if self._shapes.get(name) != tuple(shape):
            self._version += 1
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._inputs and name not in self._engine._outputs:
            return self._refuse(f"setTensorAddress: {name} is no tensor of the engine")
        if int(memory) % ALIGNMENT:
            return self._refuse(f"setTensorAddress: {name}: {int(memory):#x} is not aligned to {ALIGNMENT}")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def is_stream_capturable(self, stream: Any) -> bool:
        if self._engine._plan["backend"] == "tensorrt":
            raise AttributeError("'tensorrt.tensorrt.IExecutionContext' object has no attribute 'is_stream_capturable'")
        return True

    def execute_async_v3(self, stream_handle: Any) -> bool:
        gpu, stream = self._gpu, self._gpu.cuda.stream(stream_handle)
        gpu.calls["execute_async_v3"] += 1
        if gpu.asked_to_fail("execute_async_v3"):
            return self._refuse("Error Code 2: OutOfMemory (enqueueV3)")
        problem = self._problem() if gpu.last_error is None else f"CUDA error {gpu.last_error.name}"
        if problem is not None:
            return self._refuse(f"enqueueV3: Error Code 3: API Usage Error ({problem})")
        if stream.capture is None:
            self._settled = self._version
        elif self._settled != self._version:
            stream.capture.valid = False
            return self._refuse("enqueueV3: the first run after shapes have changed cannot be captured")
        me, version, shapes, addresses = weakref.ref(self), self._version, dict(self._shapes), dict(self._addresses)
        engine, scratch, captured = self._engine, self._scratch, stream.capture is not None

        def work() -> None:
            context = me()
            spoilt = captured and (context is None or context._version != version)
            if scratch[1]:
                gpu.memory.view(*scratch).fill(GARBAGE)
            _run(engine, shapes, addresses, spoilt=spoilt)

        stream.add(work)
        return True

    def _problem(self) -> str | None:
        engine = self._engine
        missing = self.infer_shapes() + [n for n in (*engine._inputs, *engine._outputs) if not self._addresses.get(n)]
        if missing:
            return f"no shape or address for {missing}"
        if self._managed and self._scratch[1] < engine.get_device_memory_size_for_profile_v2(self._profile):
            return "the context has no device memory"
        for name in engine._outputs:
            if not name.startswith("present."):
                continue
            past = self._addresses[name.replace("present.", "past.")]
            if (self._addresses[name] == past) != (engine._plan["cache"] == "in-place"):
                return (
                    f"{name} must {'' if engine._plan['cache'] == 'in-place' else 'not '}have the address of its past"
                )
        return None

    def _refuse(self, message: str) -> bool:
        self._complain(message)
        return False


def _run(engine: FakeEngine, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], *, spoilt: bool) -> None:
    view = engine._gpu.memory.view
    feed = {}
    for name, shape in shapes.items():
        dtype = DTYPES[engine._inputs[name].type][0]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        feed[name] = view(addresses[name], size).view(dtype).reshape(shape)
    names = list(engine._outputs)
    for name, value in zip(names, engine._session.run(names, feed), strict=True):
        out = view(addresses[name], value.nbytes)
        if spoilt:
            out.fill(GARBAGE)
        else:
            out[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    settings.add_session_config_entry(ACCURACY_LEVEL_ENTRY, "1")  # int4 in floats, as on a GPU
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
