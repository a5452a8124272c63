"""ONNX Runtime's CUDA provider: sessions, values in the GPU's memory, and runs that are replayed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.onnxruntime_cuda import CUDA_PROVIDER
from llava_deploy.engines.onnxruntime_module import cause, import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

NO_REPLAY = -1
"""In the place of a run's number: its kernels are launched one by one."""

_FATAL, _WARNING = 4, 2
"""Severities of ONNX Runtime's log; it begins with the second."""

_REMEDY = "llava-deploy doctor says what is missing"


@dataclass(frozen=True)
class Provider:
    """What computes; tests give the CPU's, which runs the same graphs.

    Attributes:
        name: ONNX Runtime's.
        device: where its values lie, by ONNX Runtime's name.
        captures: it can replay the kernels of a run.
    """

    name: str = CUDA_PROVIDER
    device: str = "cuda"
    captures: bool = True

    def open(self, model: Path) -> onnxruntime.InferenceSession:
        """Load a graph.

        Raises:
            BackendError: ONNX Runtime is not installed or lacks the provider, the GPU or a library is missing, or it
                refuses the graph.
        """
        ort = import_onnxruntime()
        version = f"ONNX Runtime {ort.__version__}"
        if self.name not in ort.get_available_providers():
            raise BackendError(f"{version} is installed without {self.name}, which onnxruntime-gpu has; {_REMEDY}")
        if self.captures:
            _load_libraries(ort)
        settings = ort.SessionOptions()
        settings.log_severity_level = _FATAL  # its errors come as exceptions
        options = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
        if self.captures:
            options["enable_cuda_graph"] = "1"
        providers = [(self.name, options)] if self.captures else [self.name]
        ort.set_default_logger_severity(_FATAL)  # it logs what is missing, and goes on: seen below
        try:
            session = ort.InferenceSession(str(model), settings, providers=providers, enable_fallback=0)
        except Exception as error:
            raise BackendError(f"{model}: {version} cannot load it on the GPU: {cause(error)}; {_REMEDY}") from error
        finally:
            ort.set_default_logger_severity(_WARNING)
        if self.name not in session.get_providers():  # it goes on without one that cannot start
            raise BackendError(f"{version} cannot start {self.name} here; {_REMEDY}")
        return session

    def zeros(
        self, session: onnxruntime.InferenceSession, shape: Sequence[int], dtype: DTypeLike
    ) -> onnxruntime.OrtValue:
        """Zeros on the device, in the session's memory where ONNX Runtime can do that (1.31 can).

        Memory that belongs to no session comes in powers of two: a cache of 88 MiB took 128 on an H100.
        """
        zeros = np.zeros(shape, dtype)
        allocate = getattr(session, "create_ortvalue_from_shape_and_type", None)
        if allocate is None:
            return self.value(zeros)
        found: onnxruntime.OrtValue = allocate([*shape], zeros.dtype.type, self.device, 0)
        found.update_inplace(zeros)
        return found

    def value(self, array: np.ndarray) -> onnxruntime.OrtValue:
        """A copy of an array on the device; on the CPU, the array itself."""
        found: onnxruntime.OrtValue = import_onnxruntime().OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray(array), self.device, 0
        )
        return found


CUDA = Provider()


@dataclass
class Replayed:
    """A run whose values stay where they are, and which is replayed under its number where the provider can."""

    session: onnxruntime.InferenceSession
    inputs: Mapping[str, onnxruntime.OrtValue]
    outputs: Mapping[str, onnxruntime.OrtValue]
    graph: int
    binding: onnxruntime.IOBinding = field(init=False)
    _options: onnxruntime.RunOptions = field(init=False)

    def __post_init__(self) -> None:
        self.binding = self.session.io_binding()
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self.binding.bind_ortvalue_output(name, value)
        self._options = run_options(self.graph)

    def run(self) -> None:
        """Run it over what the inputs hold now."""
        self.session.run_with_iobinding(self.binding, self._options)


def on_the_host(array: np.ndarray) -> onnxruntime.OrtValue:
    """A value over the array, which it holds."""
    found: onnxruntime.OrtValue = import_onnxruntime().OrtValue.ortvalue_from_numpy(array)
    return found


def run_options(graph: int) -> onnxruntime.RunOptions:
    """Options of the run of a number, or of :data:`NO_REPLAY`."""
    options = import_onnxruntime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _load_libraries(ort: onnxruntime) -> None:
    """Load CUDA's and cuDNN's libraries of the wheels that hold them; else the system's are found, or are not."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it did not find
        ort.preload_dlls()
