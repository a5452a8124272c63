"""Loads one thing and says in a line of JSON what came of it. A program of its own: what it loads may crash or hang.

``python probe.py cuda``, ``module NAME``, ``provider NAME [run]``, ``cuda-python``. Standard library only, beside what
is loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CUDA_LIBRARIES = ("libcuda.so.1", "libcuda.so")
_ERROR_CONTEXT = "no context can be made on it"
# CUdevice_attribute of the driver's interface.
_COMPUTE_MODE, _MAJOR, _MINOR, _INTEGRATED = 20, 75, 76, 18

_CONVOLUTION = (
    b'\x08\x08:k\n\x0f\n\x01x\n\x01w\x12\x01y"\x04Conv\x12\x01gZ\x1b\n\x01x\x12\x16\n\x14\x08\n\x12\x10\n\x02\x08\x01'
    b"\n\x02\x08\x03\n\x02\x08\x04\n\x02\x08\x04Z\x1b\n\x01w\x12\x16\n\x14\x08\n\x12\x10\n\x02\x08\x02\n\x02\x08\x03\n\x02\x08\x02"
    b"\n\x02\x08\x02b\x1b\n\x01y\x12\x16\n\x14\x08\n\x12\x10\n\x02\x08\x01\n\x02\x08\x02\n\x02\x08\x03\n\x02\x08\x03B\x04\n\x00\x10\x11"
)
"""An ONNX model, ``y = Conv(x, w)``, float16 ``[1, 3, 4, 4]`` and ``[2, 3, 2, 2]``: a vision tower begins with one."""


def main(words: list[str]) -> None:
    """Run the probe of that name; the last line that is printed is its answer."""
    if sys.path and Path(sys.path[0]) == Path(__file__).parent:
        del sys.path[0]  # this directory's modules are nobody's to import by their bare names
    kind, *names = words
    probes: dict[str, Callable[..., dict[str, Any]]] = {
        "cuda": cuda,
        "module": module,
        "provider": provider,
        "cuda-python": cuda_python,
    }
    try:
        said = probes[kind](*names)
    except Exception as error:  # noqa: BLE001 (a loader raises what it likes)
        said = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
    print(f"\n{json.dumps(said)}", flush=True)  # noqa: T201 (this is its answer)


def module(name: str) -> dict[str, Any]:
    """Import a module; of ONNX Runtime also which providers it has."""
    found = importlib.import_module(name)
    said: dict[str, Any] = {"version": str(getattr(found, "__version__", "")), "file": str(found.__file__)}
    if name == "onnxruntime":
        said["providers"] = list(found.get_available_providers())
        said["cuda"] = getattr(found, "cuda_version", None)
    return said


def provider(name: str, aim: str = "load") -> dict[str, Any]:
    """Load one of ONNX Runtime's providers, with what it needs, or with the aim of ``run`` have it compute something.

    What loads may not run: the GPU, its driver or cuDNN may be none that it can use.
    """
    runtime = importlib.import_module("onnxruntime")
    runtime.preload_dlls()  # CUDA's libraries of the environment, which the loader would not find
    return _run(runtime, name) if aim == "run" else _load(runtime, name)


def _load(runtime: Any, name: str) -> dict[str, Any]:
    """Some providers are no libraries, but part of ONNX Runtime."""
    capi = Path(str(runtime.__file__)).parent / "capi"
    library = capi / f"libonnxruntime_providers_{name.removesuffix('ExecutionProvider').lower()}.so"
    if not library.is_file():
        return {"loaded": True}
    ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
    return {"loaded": True}


def _run(runtime: Any, name: str) -> dict[str, Any]:
    numpy = importlib.import_module("numpy")
    settings = runtime.SessionOptions()
    settings.log_severity_level = 4
    session = runtime.InferenceSession(_CONVOLUTION, settings, providers=[name], enable_fallback=0)
    if name not in session.get_providers():  # ONNX Runtime goes on without it; the loader says what is missing
        _load(runtime, name)
        return {"error": f"ONNX Runtime cannot start {name}"}
    ones = {"x": numpy.ones((1, 3, 4, 4), numpy.float16), "w": numpy.ones((2, 3, 2, 2), numpy.float16)}
    (sums,) = session.run(None, ones)
    wrong = (sums != ones["w"][0].size).any()  # [1, 2, 3, 3], each the sum of 3 x 2 x 2 ones
    return {"error": f"{name} computes wrong values"} if wrong else {"loaded": True}


def cuda_python() -> dict[str, Any]:
    """Import cuda-python's interface to the CUDA runtime, and ask which CUDA it is of."""
    runtime = importlib.import_module("cuda.bindings.runtime")
    error, version = runtime.cudaRuntimeGetVersion()
    return {"cuda": int(version)} if int(error) == 0 else {"error": f"cudaRuntimeGetVersion: {error}"}


def cuda() -> dict[str, Any]:
    """Load the driver's library, and make a context on each GPU that it shows, which tells whether it can be used."""
    library, error = _first_library()
    if library is None:
        return {"error": error, "loaded": False}
    said: dict[str, Any] = {"loaded": True, "cuda": None, "code": None, "devices": []}
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
        said["cuda"] = version.value
    code = library.cuInit(0)
    if code:
        return {**said, "code": code, "error": f"cuInit: {_name(library, code)}"}
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    said["devices"] = [_device(library, index) for index in range(count.value)]
    return said


def _first_library() -> tuple[Any, str]:
    said = ""
    for name in _CUDA_LIBRARIES:
        try:
            return ctypes.CDLL(name), ""
        except OSError as error:
            said = said or str(error)
    return None, said


def _device(library: Any, index: int) -> dict[str, Any]:
    device = ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), index)
    name, identity = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    library.cuDeviceGetName(name, 256, device)
    library.cuDeviceGetUuid(identity, device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    found: dict[str, Any] = {
        "name": name.value.decode("utf-8", "replace"),
        "uuid": str(uuid.UUID(bytes=identity.raw)),
        "capability": f"sm{attribute(_MAJOR)}{attribute(_MINOR)}",
        "integrated": bool(attribute(_INTEGRATED)),
        "compute_mode": attribute(_COMPUTE_MODE),
        "free": None,
        "total": None,
        "error": None,
    }
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    code = library.cuCtxCreate_v2(ctypes.byref(context), 0, device)
    if code:
        return {**found, "error": f"{_ERROR_CONTEXT} ({_name(library, code)})"}
    if library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0:
        found.update(free=free.value, total=total.value)
    library.cuCtxDestroy_v2(context)
    return found


def _name(library: Any, code: int) -> str:
    text = ctypes.c_char_p()
    if library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value is not None:
        return f"{text.value.decode()} ({code})"
    return f"error {code}"


if __name__ == "__main__":
    main(sys.argv[1:])
