"""ONNX Runtime's Python module, imported when it is wanted. Nothing else of ours imports it but the doctor's probes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llava_deploy.engines.errors import BackendError

if TYPE_CHECKING:
    import onnxruntime

NO_REPORTS = "ORT_DISABLE_TELEMETRY"
"""Environment variable that ONNX Runtime looks at when it is loaded."""


def import_onnxruntime() -> onnxruntime:
    """Import it, told to report nothing.

    Since 1.29 it reports its use to its maker, on Linux too, unless the environment says no before it is loaded. Seen
    with 1.32: a database below ``~/.cache/Microsoft``, and sockets. Where the variable is set already, it is left as it
    is.

    Raises:
        BackendError: it is not installed, or cannot be loaded.
    """
    os.environ.setdefault(NO_REPORTS, "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be imported ({error}); install it with: pip install 'llava-deploy[cpu]'"
        ) from error
    return onnxruntime


def cause(error: Exception) -> str:
    """What an error of ONNX Runtime says, in one line."""
    return " ".join(str(error).split())
