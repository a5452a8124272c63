"""One GPU through cuda-python: its memory, one stream, and graphs captured from it. CUDA's errors come in words."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.tensorrt_module import import_cuda

ALIGNMENT = 256
"""Bytes: TensorRT wants the addresses of tensors to be multiples of it."""

_WORDS = {
    "cudaErrorNoDevice": "the driver finds no GPU; look at CUDA_VISIBLE_DEVICES, and at what the container was given",
    "cudaErrorInvalidDevice": "the driver finds no GPU by that number; look at CUDA_VISIBLE_DEVICES",
    "cudaErrorDevicesUnavailable": "the GPU is busy or set to be used by one process alone; see nvidia-smi",
    "cudaErrorSystemDriverMismatch": "the driver's kernel module and libraries are of different versions; start the "
    "machine again after an update of the driver",
    "cudaErrorSystemNotReady": "the GPU's system services do not run; see nvidia-smi",
    "cudaErrorCompatNotSupportedOnDevice": "this GPU needs a driver as new as cuda-python; update the driver",
}
FATAL = frozenset(
    f"cudaError{name}"
    for name in (
        "Contained IllegalAddress LaunchTimeout Assert HardwareStackError IllegalInstruction MisalignedAddress "
        "InvalidAddressSpace InvalidPc LaunchFailure TensorMemoryLeak MpsClientTerminated ExternalDevice"
    ).split()
)
"""Errors after which "the process must be terminated and relaunched" (CUDA Runtime API, ``cudaError_t``)."""


class DeviceMemoryError(BackendError):
    """The GPU, or pinned memory of the host, has no room for what was asked; what was there is untouched."""


class Device:
    """The first GPU that CUDA shows, with one stream; all work is done in the order that it is queued in.

    Attributes:
        name: as its driver says.
        capability: compute capability, as ``sm89``.
        integrated: it shares its memory with the host, as Jetson boards do.
        stream: handle of the stream.
    """

    def __init__(self) -> None:
        """Open it.

        Raises:
            BackendError: cuda-python is not installed, or there is no driver, one that is too old, or no GPU.
        """
        self._api = import_cuda()
        self._capturing = False
        self._late: list[tuple[str, Any]] = []
        self.call("cudaSetDevice", 0)
        properties = self.call("cudaGetDeviceProperties", 0)
        self.name = bytes(properties.name).rstrip(b"\0").decode(errors="replace")
        self.capability = f"sm{properties.major}{properties.minor}"
        self.integrated = bool(properties.integrated)
        self.stream = int(self.call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))
        weakref.finalize(self, _quietly, self._api.cudaStreamDestroy, self.stream)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; its result, or a tuple of them.

        Raises:
            DeviceMemoryError: there is no memory.
            BackendError: any other error.
        """
        error, *results = getattr(self._api, name)(*arguments)
        if error != self._api.cudaError_t.cudaSuccess:
            raise self._failure(name, error)
        return results[0] if len(results) == 1 else tuple(results)

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all that there are."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int, purpose: str) -> DeviceMemory:
        """``size`` bytes on the GPU, whose contents are arbitrary.

        Raises:
            DeviceMemoryError: no room; the message names the ``purpose``.
        """
        try:
            return DeviceMemory(self, int(self.call("cudaMalloc", size)), size)
        except DeviceMemoryError as error:
            free, total = self.memory()
            raise DeviceMemoryError(
                f"{purpose}: want {size:,} bytes on the GPU, of whose {total:,} {free:,} are free"
            ) from error

    def pin(self, size: int, purpose: str) -> PinnedMemory:
        """``size`` bytes on the host that the GPU reads and writes by itself; arbitrary contents.

        Raises:
            DeviceMemoryError: see :meth:`allocate`.
        """
        try:
            return PinnedMemory(self, int(self.call("cudaHostAlloc", size, self._api.cudaHostAllocDefault)), size)
        except DeviceMemoryError as error:
            raise DeviceMemoryError(f"{purpose}: the machine has no {size:,} bytes of memory to pin") from error

    def upload(self, to: int, source: int, size: int) -> None:
        """Queue a copy from the host to the GPU; pinned memory must stay as it is until the stream has got there."""
        self._copy(to, source, size, self._api.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, to: int, source: int, size: int) -> None:
        """Queue a copy from the GPU to the host; what is in pinned memory can be read after :meth:`synchronize`."""
        self._copy(to, source, size, self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def copy(self, to: int, source: int, size: int) -> None:
        """Queue a copy within the GPU."""
        self._copy(to, source, size, self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def copy_rows(self, to: tuple[int, int], source: tuple[int, int], shape: tuple[int, int]) -> None:
        """Queue a copy of equal rows within the GPU.

        Args:
            to: address of the first row, and bytes from one to the next.
            source: likewise.
            shape: how many rows, and bytes of each.
        """
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", *to, *source, shape[1], shape[0], kind, self.stream)

    def clear(self, address: int, size: int) -> None:
        """Queue writing zeros."""
        self.call("cudaMemsetAsync", address, 0, size, self.stream)

    def synchronize(self) -> None:
        """Wait until all that was queued is done.

        Raises:
            BackendError: something that was queued failed.
        """
        self.call("cudaStreamSynchronize", self.stream)

    def mark(self) -> Mark:
        """A place in the stream, behind all that was queued so far, that can be waited for."""
        handle = int(self.call("cudaEventCreateWithFlags", self._api.cudaEventDefault))
        mark = Mark(self, handle)
        self.call("cudaEventRecord", handle, self.stream)
        return mark

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what ``work`` queues, without doing it.

        Raises:
            BackendError: it cannot be captured; the stream can be used as before.
        """
        api = self._api
        self._capturing = True  # first: Python may free something at any time
        try:
            self.call("cudaStreamBeginCapture", self.stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            work()
        except BaseException:
            self._end_failed_capture()
            raise
        else:
            graph = self.call("cudaStreamEndCapture", self.stream)
        finally:
            self._capturing = False
            while self._late:
                self.release(*self._late.pop())
        try:
            return Graph(self, int(self.call("cudaGraphInstantiate", graph, 0)))
        finally:
            _quietly(api.cudaGraphDestroy, graph)

    def release(self, name: str, handle: int) -> None:
        """Call a function that frees something; after what is queued, where that may still use it.

        While a capture is on, which that would break, it is put off.
        """
        if self._capturing:
            self._late.append((name, handle))
            return
        if name != "cudaEventDestroy":
            _quietly(self._api.cudaStreamSynchronize, self.stream)
        _quietly(getattr(self._api, name), handle)

    def _end_failed_capture(self) -> None:
        with suppress(BackendError):
            _quietly(self._api.cudaGraphDestroy, self.call("cudaStreamEndCapture", self.stream))

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        self.call("cudaMemcpyAsync", to, source, size, kind, self.stream)

    def _failure(self, name: str, error: Any) -> BackendError:
        self._api.cudaGetLastError()  # else whoever asks after its own next call takes this error for its own
        code = error.name
        if code == "cudaErrorMemoryAllocation":
            return DeviceMemoryError(f"{name}: the GPU has no memory left")
        if code == "cudaErrorInsufficientDriver":
            return BackendError(self._driver())
        _, text = self._api.cudaGetErrorString(error)
        words = _WORDS.get(code, text.decode())
        if code in FATAL:
            words += "; the GPU cannot be used by this process any more: start it again"
        return BackendError(f"CUDA, {name}: {code}: {words}")

    def _driver(self) -> str:
        _, driver = self._api.cudaDriverGetVersion()
        _, runtime = self._api.cudaRuntimeGetVersion()
        if not driver:
            return (
                "no NVIDIA driver is loaded: this machine has no GPU, its driver is not installed, or a container was "
                "started without it (--gpus all)"
            )
        has, wants = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
        return (
            f"the NVIDIA driver is too old: it is for CUDA {has}, and cuda-python for {wants}; update the driver, or "
            f"install a cuda-python of {has.partition('.')[0]}"
        )


class DeviceMemory:
    """A block on the GPU, freed when nobody has it any more.

    Attributes:
        address: of its first byte, a multiple of :data:`ALIGNMENT`.
        size: in bytes.
    """

    def __init__(self, device: Device, address: int, size: int) -> None:
        self.address = address
        self.size = size
        weakref.finalize(self, device.release, "cudaFree", address)


class PinnedMemory:
    """A block on the host, freed when nobody has it or an array over it any more.

    Attributes:
        address: of its first byte.
        size: in bytes.
    """

    def __init__(self, device: Device, address: int, size: int) -> None:
        self.address = address
        self.size = size
        weakref.finalize(self, device.release, "cudaFreeHost", address)

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array over a part of it, ``offset`` bytes in."""
        raw = (ctypes.c_uint8 * self.size).from_address(self.address)
        raw.owner = self  # type: ignore[attr-defined]  # an array keeps what it lies in alive
        return np.ndarray(shape, dtype, memoryview(raw), offset)


class Mark:
    """A place in the stream."""

    def __init__(self, device: Device, handle: int) -> None:
        self._device = device
        self._handle = handle
        weakref.finalize(self, device.release, "cudaEventDestroy", handle)

    def wait(self) -> None:
        """Wait until the stream has got there."""
        self._device.call("cudaEventSynchronize", self._handle)

    def since(self, earlier: Mark) -> float:
        """Seconds that passed on the GPU from there to here; waits until the stream has got here."""
        self.wait()
        return float(self._device.call("cudaEventElapsedTime", earlier._handle, self._handle)) / 1000


class Graph:
    """Captured work, ready to run as often as wanted."""

    def __init__(self, device: Device, handle: int) -> None:
        self._device = device
        self._handle = handle
        weakref.finalize(self, device.release, "cudaGraphExecDestroy", handle)

    def launch(self) -> None:
        """Queue it."""
        self._device.call("cudaGraphLaunch", self._handle, self._device.stream)


def _quietly(function: Callable[[Any], Any], handle: Any) -> None:
    """Free something; there is nobody to tell of an error, and after a broken GPU nothing can be freed."""
    with suppress(Exception):
        function(handle)
