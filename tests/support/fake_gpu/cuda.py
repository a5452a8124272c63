# ruff: noqa: N802  (the names are the real module's)
"""A fake ``cuda.bindings.runtime``: the real module's enums and handles, its functions over the fake GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cuda.bindings import runtime as real

from fake_gpu.memory import GARBAGE, IllegalAddressError
from fake_gpu.signatures import check_cuda_call, cuda_parameters
from fake_gpu.streams import Capture, Event, Graph, Stream

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

_ERRORS = real.cudaError_t
_RESULTS: dict[str, int] = {}
_NEVER_FAILS = ("cudaGetErrorName", "cudaGetErrorString", "cudaDriverGetVersion", "cudaRuntimeGetVersion")


class CudaError(Exception):
    """What a function returns instead of success."""

    def __init__(self, error: Any) -> None:
        super().__init__(error)
        self.error = error


def _results(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        _RESULTS[function.__name__] = count
        return function

    return mark


class FakeCuda:
    """Stands in for the module. A function that it does not have is one that nothing here needed so far."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._handles: dict[int, Any] = {}
        self._next = 1
        for name in _RESULTS:
            setattr(self, name, self._wrapped(name))

    def __getattr__(self, name: str) -> Any:
        value = getattr(real, name)
        if type(value).__name__ == "cython_function_or_method":
            raise AttributeError(f"the fake GPU does not have {name}: add it to {__file__}")
        return value

    def _wrapped(self, name: str) -> Callable[..., tuple[Any, ...]]:
        function, count = getattr(type(self), name), _RESULTS[name]
        parameters = cuda_parameters(getattr(real, name))

        def call(*arguments: Any) -> tuple[Any, ...]:
            check_cuda_call(name, parameters, arguments)
            gpu = self._gpu
            gpu.calls[name] += 1
            try:
                if name not in _NEVER_FAILS:
                    gpu.require_driver()
                    gpu.fail_where_asked(name)
                result = function(self, *arguments)
            except CudaError as failure:
                return (failure.error, *[None] * count)
            except IllegalAddressError as error:
                gpu.broken = _ERRORS.cudaErrorIllegalAddress  # nothing works after it, as on a real GPU
                gpu.illegal.append(str(error))
                return (gpu.broken, *[None] * count)
            return (_ERRORS.cudaSuccess, *(() if count == 0 else (result,) if count == 1 else result))

        return call

    def stream(self, handle: Any) -> Stream:
        return self._get(handle, Stream)

    def live(self) -> dict[str, int]:
        names = [type(value).__name__ for value in self._handles.values()]
        return {name: names.count(name) for name in names}

    def _add(self, value: Any) -> int:
        self._handles[self._next] = value
        self._next += 1
        return self._next - 1

    def _get(self, handle: Any, kind: type) -> Any:
        value = self._handles.get(int(handle))
        if not isinstance(value, kind):
            raise CudaError(_ERRORS.cudaErrorInvalidResourceHandle)
        return value

    def _drop(self, handle: Any, kind: type) -> None:
        self._get(handle, kind)
        del self._handles[int(handle)]

    def _streams(self) -> list[Stream]:
        return [value for value in self._handles.values() if isinstance(value, Stream)]

    def _not_while_capturing(self) -> None:
        """What may wait for the device breaks a capture in global mode."""
        for stream in self._streams():
            if stream.capture is not None:
                stream.capture.valid = False
                raise CudaError(_ERRORS.cudaErrorStreamCaptureUnsupported)

    # The device.

    @_results(1)
    def cudaGetErrorName(self, error: Any) -> bytes:
        return error.name.encode()

    @_results(1)
    def cudaGetErrorString(self, error: Any) -> bytes:
        return real.cudaGetErrorString(error)[1]

    @_results(1)
    def cudaDriverGetVersion(self) -> int:
        return self._gpu.driver

    @_results(1)
    def cudaRuntimeGetVersion(self) -> int:
        return 12090

    @_results(0)
    def cudaSetDevice(self, device: int) -> None:
        if device != 0:
            raise CudaError(_ERRORS.cudaErrorInvalidDevice)

    @_results(1)
    def cudaGetDeviceProperties(self, device: int) -> Any:
        type(self).cudaSetDevice(self, device)
        properties = real.cudaDeviceProp()
        properties.name = b"Fake GPU".ljust(256, b"\0")
        properties.major, properties.minor = self._gpu.capability
        properties.totalGlobalMem = self._gpu.memory.total
        return properties

    @_results(1)
    def cudaDeviceGetAttribute(self, attribute: Any, device: int) -> int:
        type(self).cudaSetDevice(self, device)
        known = real.cudaDeviceAttr
        values = {
            known.cudaDevAttrComputeCapabilityMajor: self._gpu.capability[0],
            known.cudaDevAttrComputeCapabilityMinor: self._gpu.capability[1],
            known.cudaDevAttrIntegrated: 0,
        }
        return values[attribute]

    @_results(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self._gpu.memory.total - self._gpu.memory.used, self._gpu.memory.total

    @_results(0)
    def cudaDeviceSynchronize(self) -> None:
        self._not_while_capturing()
        for stream in self._streams():
            stream.run()

    # Memory.

    @_results(1)
    def cudaMalloc(self, size: int) -> int:
        self._not_while_capturing()
        address = self._gpu.memory.allocate(size)
        if address is None:
            raise CudaError(_ERRORS.cudaErrorMemoryAllocation)
        return address

    @_results(0)
    def cudaFree(self, address: Any) -> None:
        type(self).cudaDeviceSynchronize(self)  # as it does in fact, though nobody promises it
        if not self._gpu.memory.free(int(address)):
            raise CudaError(_ERRORS.cudaErrorInvalidValue)

    @_results(1)
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        self._not_while_capturing()
        return self._gpu.memory.pin(size)

    @_results(0)
    def cudaFreeHost(self, address: Any) -> None:
        type(self).cudaDeviceSynchronize(self)
        if not self._gpu.memory.unpin(int(address)):
            raise CudaError(_ERRORS.cudaErrorInvalidValue)

    @_results(0)
    def cudaMemcpyAsync(self, to: Any, source: Any, count: int, kind: Any, stream: Any) -> None:
        memory, queue, to, source = self._gpu.memory, self.stream(stream), int(to), int(source)
        ends = {"Host": False, "Device": True}
        want = [ends[end] for end in kind.name.removeprefix("cudaMemcpy").split("To")]
        if want != [memory.is_device(source), memory.is_device(to)]:
            raise CudaError(_ERRORS.cudaErrorInvalidValue)
        pageable = [a for a in (source, to) if not memory.is_device(a) and not memory.is_pinned(a)]
        if not pageable:
            queue.add(lambda: memory.view(to, count).__setitem__(slice(None), memory.view(source, count)))
            return
        if queue.capture is not None:
            queue.capture.valid = False
            raise CudaError(_ERRORS.cudaErrorStreamCaptureUnsupported)
        if want == [False, True]:  # read at once, written late
            data = memory.view(source, count).copy()
            queue.add(lambda: memory.view(to, count).__setitem__(slice(None), data))
        else:
            queue.run()
            ctypes.memmove(to, memory.view(source, count).ctypes.data, count)

    @_results(0)
    def cudaMemcpy2DAsync(
        self, to: Any, pitch: int, source: Any, source_pitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> None:
        view, to, source = self._gpu.memory.view, int(to), int(source)
        if kind is not real.cudaMemcpyKind.cudaMemcpyDeviceToDevice or width > min(pitch, source_pitch):
            raise CudaError(_ERRORS.cudaErrorInvalidValue)

        def work() -> None:
            for row in range(height):
                view(to + row * pitch, width)[:] = view(source + row * source_pitch, width)

        self.stream(stream).add(work)

    @_results(0)
    def cudaMemsetAsync(self, address: Any, value: int, count: int, stream: Any) -> None:
        view, address = self._gpu.memory.view, int(address)
        self.stream(stream).add(lambda: view(address, count).fill(value & GARBAGE))

    # Streams, events, graphs.

    @_results(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return real.cudaStream_t(self._add(Stream()))

    @_results(0)
    def cudaStreamDestroy(self, stream: Any) -> None:
        self.stream(stream).run()
        self._drop(stream, Stream)

    @_results(0)
    def cudaStreamSynchronize(self, stream: Any) -> None:
        queue = self.stream(stream)
        if queue.capture is not None:
            queue.capture.valid = False
            raise CudaError(_ERRORS.cudaErrorStreamCaptureUnsupported)
        queue.run()

    @_results(1)
    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return real.cudaEvent_t(self._add(Event()))

    @_results(0)
    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        place, queue = self._get(event, Event), self.stream(stream)
        place.stream, place.at = queue, queue.queued

    @_results(0)
    def cudaEventSynchronize(self, event: Any) -> None:
        self._get(event, Event).wait()

    @_results(1)
    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:
        for place in (self._get(start, Event), self._get(end, Event)):
            if place.stream is None or place.stream.done < place.at:
                raise CudaError(_ERRORS.cudaErrorNotReady)
        return 1.0

    @_results(0)
    def cudaEventDestroy(self, event: Any) -> None:
        self._drop(event, Event)

    @_results(0)
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        if self.stream(stream).capture is not None:
            raise CudaError(_ERRORS.cudaErrorIllegalState)
        self.stream(stream).capture = Capture()

    @_results(1)
    def cudaStreamEndCapture(self, stream: Any) -> Any:
        queue = self.stream(stream)
        capture, queue.capture = queue.capture, None
        if capture is None:
            raise CudaError(_ERRORS.cudaErrorIllegalState)
        if not capture.valid:
            raise CudaError(_ERRORS.cudaErrorStreamCaptureInvalidated)
        return real.cudaGraph_t(self._add(Graph(capture.work)))

    @_results(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return real.cudaGraphExec_t(self._add(Graph(list(self._get(graph, Graph).work))))

    @_results(0)
    def cudaGraphLaunch(self, graph: Any, stream: Any) -> None:
        queue = self.stream(stream)
        for work in self._get(graph, Graph).work:
            queue.add(work)

    @_results(0)
    def cudaGraphDestroy(self, graph: Any) -> None:
        self._drop(graph, Graph)

    @_results(0)
    def cudaGraphExecDestroy(self, graph: Any) -> None:
        self._drop(graph, Graph)
