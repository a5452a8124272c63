"""How a fake function of cuda-python is called: with the real one's arguments, for its results and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cuda.bindings import runtime as real

from fake_gpu.memory import IllegalAddressError
from fake_gpu.signatures import check_cuda_call, cuda_parameters
from fake_gpu.streams import Stream

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

ERRORS = real.cudaError_t
_RESULTS: dict[str, int] = {}
_NEVER_FAILS = ("cudaGetErrorString", "cudaGetLastError", "cudaDriverGetVersion", "cudaRuntimeGetVersion")


class CudaError(Exception):
    """What a function returns instead of success."""

    def __init__(self, error: Any) -> None:
        super().__init__(error)
        self.error = error


def results(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        _RESULTS[function.__name__] = count
        return function

    return mark


class LastError(CudaError):
    """An error of an earlier call; asking for it is none."""


class Calls:
    """The module without its functions, which a subclass has; handles of what they make."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._handles: dict[int, Any] = {}
        self._next = 1
        for name in _RESULTS:
            setattr(self, name, self._wrapped(name))

    def __getattr__(self, name: str) -> Any:
        value = getattr(real, name)
        if type(value).__name__ == "cython_function_or_method":
            raise AttributeError(f"the fake GPU does not have {name}: add it to {__file__.replace('calls', 'cuda')}")
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
                gpu.last_error = None if isinstance(failure, LastError) else failure.error
                return (failure.error, *[None] * count)
            except IllegalAddressError as error:
                gpu.broken = ERRORS.cudaErrorIllegalAddress  # nothing works after it, as on a real GPU
                gpu.illegal.append(str(error))
                return (gpu.broken, *[None] * count)
            return (ERRORS.cudaSuccess, *(() if count == 0 else (result,) if count == 1 else result))

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
            raise CudaError(ERRORS.cudaErrorInvalidResourceHandle)
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
                raise CudaError(ERRORS.cudaErrorStreamCaptureUnsupported)
