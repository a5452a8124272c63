"""TensorRT's Python modules and CUDA's, imported when they are wanted, and what both rooms call their things.

The full TensorRT and TensorRT for RTX share one API.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llava_deploy.engines.errors import BackendError

TensorRtBackend = Literal["tensorrt", "tensorrt-rtx"]

SPOKEN: Mapping[TensorRtBackend, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
"""What people call them."""

RTX_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT for RTX 1.7.1.116 can be told to build for (``ComputeCapability`` of its module)."""

DTYPES: Mapping[str, str] = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL"}
"""TensorRT's name of each dtype that a graph's inputs and outputs have."""


def rtx_runs_on(capability: str) -> bool:
    """Whether TensorRT for RTX runs an engine that was built for it on a GPU of this compute capability, as ``sm89``.

    Source: :data:`RTX_CAPABILITIES`, and what the runtime of 1.7.1.116 said when it refused an engine on sm90, which it
    builds there without complaint: see :func:`rtx_builds_for`.
    """
    return capability in RTX_CAPABILITIES or rtx_builds_for(capability)


def rtx_builds_for(capability: str) -> bool:
    """Whether an engine of TensorRT for RTX runs on such a GPU where no target was named when it was built.

    Source: "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0", its runtime on an H100; 7.5 has to be named
    (documentation of TensorRT-RTX, "CPU-Only AOT and TensorRT-RTX Engines").
    """
    least, *_, newest = (int(name.removeprefix("sm")) for name in RTX_CAPABILITIES)
    number = int(capability.removeprefix("sm"))
    return number > newest or (number > least and capability in RTX_CAPABILITIES)


@dataclass(frozen=True)
class TensorRtModule:
    """The module and what is said of it.

    Attributes:
        backend: which of the two.
        api: the module.
        version: as it says, in full.
    """

    backend: TensorRtBackend
    api: Any
    version: str

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version; of TensorRT for RTX, of its own numbering."""
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)


_MODULES = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}


def import_tensorrt(backend: TensorRtBackend) -> TensorRtModule:
    """Import it.

    Raises:
        BackendError: it is not installed, or cannot be loaded.
    """
    name, extra = _MODULES[backend]
    try:
        api = importlib.import_module(name)
    except Exception as error:  # its loader raises what it likes where a library is missing
        raise BackendError(
            f"{name} cannot be imported ({error}); install it with: pip install 'llava-deploy[{extra}]'"
        ) from error
    return TensorRtModule(backend, api, str(api.__version__))


def import_cuda() -> Any:
    """Import CUDA's runtime interface, of cuda-python.

    Raises:
        BackendError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except Exception as error:  # its loader raises what it likes where a library is missing
        raise BackendError(
            f"cuda-python cannot be imported ({error}); it comes with: pip install 'llava-deploy[rtx]' or "
            "'llava-deploy[tensorrt]'"
        ) from error
