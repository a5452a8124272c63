"""TensorRT's Python module, imported when it is wanted: the full one, or TensorRT for RTX. They share one API."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from llava_deploy.engines.errors import BackendError

TensorRtBackend = Literal["tensorrt", "tensorrt-rtx"]


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
