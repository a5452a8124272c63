# ruff: noqa: N802  (the names are the real module's)
"""A fake ``cuda.bindings.runtime``: the real module's enums and handles, its functions over the fake GPU."""

from __future__ import annotations

import ctypes
from typing import Any

from cuda.bindings import runtime as real

from fake_gpu.calls import ERRORS, Calls, CudaError, LastError, results
from fake_gpu.memory import GARBAGE
from fake_gpu.streams import Capture, Event, Graph, Stream


class FakeCuda(Calls):
    """Stands in for the module. A function that it does not have is one that nothing here needed so far."""

    # The device.

    @results(1)
    def cudaGetErrorString(self, error: Any) -> bytes:
        return real.cudaGetErrorString(error)[1]

    @results(0)
    def cudaGetLastError(self) -> None:
        error, self._gpu.last_error = self._gpu.last_error, None
        if error is not None:
            raise LastError(error)

    @results(1)
    def cudaDriverGetVersion(self) -> int:
        return self._gpu.driver

    @results(1)
    def cudaRuntimeGetVersion(self) -> int:
        return 12090

    @results(0)
    def cudaSetDevice(self, device: int) -> None:
        if device != 0:
            raise CudaError(ERRORS.cudaErrorInvalidDevice)

    @results(1)
    def cudaGetDeviceProperties(self, device: int) -> Any:
        type(self).cudaSetDevice(self, device)
        properties = real.cudaDeviceProp()
        properties.name = b"Fake GPU".ljust(256, b"\0")
        properties.major, properties.minor = self._gpu.capability
        properties.totalGlobalMem = self._gpu.memory.total
        return properties

    @results(1)
    def cudaDeviceGetAttribute(self, attribute: Any, device: int) -> int:
        type(self).cudaSetDevice(self, device)
        known = real.cudaDeviceAttr
        values = {
            known.cudaDevAttrComputeCapabilityMajor: self._gpu.capability[0],
            known.cudaDevAttrComputeCapabilityMinor: self._gpu.capability[1],
            known.cudaDevAttrIntegrated: 0,
        }
        return values[attribute]

    @results(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self._gpu.memory.total - self._gpu.memory.used, self._gpu.memory.total

    @results(0)
    def cudaDeviceSynchronize(self) -> None:
        self._not_while_capturing()
        for stream in self._streams():
            stream.run()

    # Memory.

    @results(1)
    def cudaMalloc(self, size: int) -> int:
        self._not_while_capturing()
        address = self._gpu.memory.allocate(size)
        if address is None:
            raise CudaError(ERRORS.cudaErrorMemoryAllocation)
        return address

    @results(0)
    def cudaFree(self, address: Any) -> None:
        self._not_while_capturing()  # in fact it waits for the device, too, but nobody promises it
        if not self._gpu.memory.free(int(address)):
            raise CudaError(ERRORS.cudaErrorInvalidValue)

    @results(1)
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        self._not_while_capturing()
        return self._gpu.memory.pin(size)

    @results(0)
    def cudaFreeHost(self, address: Any) -> None:
        self._not_while_capturing()
        if not self._gpu.memory.unpin(int(address)):
            raise CudaError(ERRORS.cudaErrorInvalidValue)

    @results(0)
    def cudaMemcpyAsync(self, to: Any, source: Any, count: int, kind: Any, stream: Any) -> None:
        memory, queue, to, source = self._gpu.memory, self.stream(stream), int(to), int(source)
        ends = {"Host": False, "Device": True}
        want = [ends[end] for end in kind.name.removeprefix("cudaMemcpy").split("To")]
        if want != [memory.is_device(source), memory.is_device(to)]:
            raise CudaError(ERRORS.cudaErrorInvalidValue)
        pageable = [a for a in (source, to) if not memory.is_device(a) and not memory.is_pinned(a)]
        if not pageable:
            queue.add(lambda: memory.view(to, count).__setitem__(slice(None), memory.view(source, count)))
            return
        if queue.capture is not None:
            queue.capture.valid = False
            raise CudaError(ERRORS.cudaErrorStreamCaptureUnsupported)
        if want == [False, True]:  # read at once, written late
            data = memory.view(source, count).copy()
            queue.add(lambda: memory.view(to, count).__setitem__(slice(None), data))
        else:
            queue.run()
            ctypes.memmove(to, memory.view(source, count).ctypes.data, count)

    @results(0)
    def cudaMemcpy2DAsync(
        self, to: Any, pitch: int, source: Any, source_pitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> None:
        view, to, source = self._gpu.memory.view, int(to), int(source)
        if kind is not real.cudaMemcpyKind.cudaMemcpyDeviceToDevice or width > min(pitch, source_pitch):
            raise CudaError(ERRORS.cudaErrorInvalidValue)

        def work() -> None:
            for row in range(height):
                view(to + row * pitch, width)[:] = view(source + row * source_pitch, width)

        self.stream(stream).add(work)

    @results(0)
    def cudaMemsetAsync(self, address: Any, value: int, count: int, stream: Any) -> None:
        view, address = self._gpu.memory.view, int(address)
        self.stream(stream).add(lambda: view(address, count).fill(value & GARBAGE))

    # Streams, events, graphs.

    @results(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return real.cudaStream_t(self._add(Stream()))

    @results(0)
    def cudaStreamDestroy(self, stream: Any) -> None:
        self.stream(stream).run()
        self._drop(stream, Stream)

    @results(0)
    def cudaStreamSynchronize(self, stream: Any) -> None:
        queue = self.stream(stream)
        if queue.capture is not None:
            queue.capture.valid = False
            raise CudaError(ERRORS.cudaErrorStreamCaptureUnsupported)
        queue.run()

    @results(1)
    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return real.cudaEvent_t(self._add(Event()))

    @results(0)
    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        place, queue = self._get(event, Event), self.stream(stream)
        place.stream, place.at = queue, queue.queued

    @results(0)
    def cudaEventSynchronize(self, event: Any) -> None:
        self._get(event, Event).wait()

    @results(1)
    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:
        for place in (self._get(start, Event), self._get(end, Event)):
            if place.stream is None or place.stream.done < place.at:
                raise CudaError(ERRORS.cudaErrorNotReady)
        return 1.0

    @results(0)
    def cudaEventDestroy(self, event: Any) -> None:
        self._drop(event, Event)

    @results(1)
    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> Any:
        return mode

    @results(0)
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        if self.stream(stream).capture is not None:
            raise CudaError(ERRORS.cudaErrorIllegalState)
        self.stream(stream).capture = Capture()

    @results(1)
    def cudaStreamEndCapture(self, stream: Any) -> Any:
        queue = self.stream(stream)
        capture, queue.capture = queue.capture, None
        if capture is None:
            raise CudaError(ERRORS.cudaErrorIllegalState)
        if not capture.valid:
            raise CudaError(ERRORS.cudaErrorStreamCaptureInvalidated)
        return real.cudaGraph_t(self._add(Graph(capture.work)))

    @results(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return real.cudaGraphExec_t(self._add(Graph(list(self._get(graph, Graph).work))))

    @results(0)
    def cudaGraphLaunch(self, graph: Any, stream: Any) -> None:
        queue = self.stream(stream)
        for work in self._get(graph, Graph).work:
            queue.add(work)

    @results(0)
    def cudaGraphDestroy(self, graph: Any) -> None:
        self._drop(graph, Graph)

    @results(0)
    def cudaGraphExecDestroy(self, graph: Any) -> None:
        self._drop(graph, Graph)
