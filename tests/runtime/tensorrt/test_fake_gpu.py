"""The fake GPU refuses what a real one would, so that what passes on it has a chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorrt_rtx
from cuda.bindings import runtime as real

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

KINDS = real.cudaMemcpyKind
OK = real.cudaError_t.cudaSuccess


def ok(result: tuple[Any, ...]) -> Any:
    assert result[0] == OK, result
    return result[1] if len(result) == 2 else result[1:]


@pytest.fixture
def stream(fake_gpu: FakeGpu) -> Any:
    return ok(fake_gpu.cuda.cudaStreamCreateWithFlags(real.cudaStreamNonBlocking))


def pinned(gpu: FakeGpu, size: int) -> tuple[int, np.ndarray]:
    address = ok(gpu.cuda.cudaHostAlloc(size, 0))
    return address, gpu.memory.view(address, size)


def test_work_is_done_late_and_reads_what_is_there_then(fake_gpu: FakeGpu, stream: Any) -> None:
    cuda, device = fake_gpu.cuda, ok(fake_gpu.cuda.cudaMalloc(8))
    (up, source), (down, result) = pinned(fake_gpu, 8), pinned(fake_gpu, 8)
    source[:] = 1
    ok(cuda.cudaMemcpyAsync(device, up, 8, KINDS.cudaMemcpyHostToDevice, stream))
    ok(cuda.cudaMemcpyAsync(down, device, 8, KINDS.cudaMemcpyDeviceToHost, stream))
    source[:] = 2  # too early: nobody has waited
    assert set(result) == {0xFF}
    ok(cuda.cudaStreamSynchronize(stream))
    assert set(result) == {2}


def test_a_graph_runs_again_what_was_captured(fake_gpu: FakeGpu, stream: Any) -> None:
    cuda, device = fake_gpu.cuda, ok(fake_gpu.cuda.cudaMalloc(8))
    (up, source), (down, result) = pinned(fake_gpu, 8), pinned(fake_gpu, 8)
    ok(cuda.cudaStreamBeginCapture(stream, real.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
    ok(cuda.cudaMemcpyAsync(device, up, 8, KINDS.cudaMemcpyHostToDevice, stream))
    ok(cuda.cudaMemcpyAsync(down, device, 8, KINDS.cudaMemcpyDeviceToHost, stream))
    graph = ok(cuda.cudaStreamEndCapture(stream))
    ready = ok(cuda.cudaGraphInstantiate(graph, 0))
    for value in (3, 4):
        source[:] = value
        ok(cuda.cudaGraphLaunch(ready, stream))
        ok(cuda.cudaStreamSynchronize(stream))
        assert set(result) == {value}


@pytest.mark.parametrize("call", [("cudaMalloc", 8), ("cudaFreeHost", None), ("cudaStreamSynchronize", "stream")])
def test_what_waits_for_the_device_breaks_a_capture(fake_gpu: FakeGpu, stream: Any, call: tuple[str, Any]) -> None:
    name, argument = call
    argument = stream if argument == "stream" else pinned(fake_gpu, 8)[0] if argument is None else argument
    ok(fake_gpu.cuda.cudaStreamBeginCapture(stream, real.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
    assert getattr(fake_gpu.cuda, name)(argument)[0] == real.cudaError_t.cudaErrorStreamCaptureUnsupported
    assert fake_gpu.cuda.cudaStreamEndCapture(stream)[0] == real.cudaError_t.cudaErrorStreamCaptureInvalidated


def test_memory_that_is_not_there_breaks_the_device(fake_gpu: FakeGpu, stream: Any) -> None:
    cuda, device = fake_gpu.cuda, ok(fake_gpu.cuda.cudaMalloc(8))
    ok(cuda.cudaMemsetAsync(device, 0, 9, stream))
    assert cuda.cudaStreamSynchronize(stream)[0] == real.cudaError_t.cudaErrorIllegalAddress
    assert cuda.cudaMalloc(8)[0] == real.cudaError_t.cudaErrorIllegalAddress
    assert len(fake_gpu.illegal) == 1
    fake_gpu.illegal.clear()


def test_memory_ends_and_failures_come_where_they_are_asked_for(fake_gpu: FakeGpu) -> None:
    cuda, full = fake_gpu.cuda, (real.cudaError_t.cudaErrorMemoryAllocation, None)
    fake_gpu.memory.total = 100
    block = ok(cuda.cudaMalloc(60))
    assert cuda.cudaMalloc(60) == full
    ok(cuda.cudaFree(block))
    fake_gpu.fail("cudaMalloc", at=2)
    ok(cuda.cudaMalloc(10))
    assert cuda.cudaMalloc(10) == full
    ok(cuda.cudaMalloc(10))
    assert fake_gpu.live() == {"device blocks": 2}


def test_names_and_arguments_are_the_real_modules(fake_gpu: FakeGpu, stream: Any) -> None:
    with pytest.raises(AttributeError):
        _ = fake_gpu.cuda.cudaMallocQuickly
    with pytest.raises(TypeError, match="exactly 1 positional"):
        fake_gpu.cuda.cudaMalloc()
    with pytest.raises(TypeError, match="cudaMemcpyKind"):
        fake_gpu.cuda.cudaMemcpyAsync(1, 2, 3, 4, stream)
    import tensorrt_rtx as there

    with pytest.raises(AttributeError):
        there.Runtime(tensorrt_rtx.Logger()).frobnicate = 1
    fake_gpu.provide("tensorrt", "10.3.0")
    import tensorrt

    with pytest.raises(AttributeError):
        _ = tensorrt.CudaGraphStrategy


def test_an_engine_computes_what_its_graph_says(fake_gpu: FakeGpu, demo_bundle: Path, tmp_path: Path) -> None:
    import tensorrt_rtx as api

    directory = fake_gpu.write_engine(demo_bundle, tmp_path / "engine")
    stream = ok(fake_gpu.cuda.cudaStreamCreateWithFlags(real.cudaStreamNonBlocking))
    engine = api.Runtime(api.Logger()).deserialize_cuda_engine((directory / "vision.plan").read_bytes())
    context = engine.create_execution_context()
    assert context.set_optimization_profile_async(0, int(stream))
    shape = tuple(engine.get_tensor_profile_shape("pixel_values", 0)[0])
    pixels = np.random.default_rng(0).random(shape).astype(np.float32)
    (want,) = fake_gpu.session(demo_bundle / "vision.onnx").run(None, {"pixel_values": pixels})
    up, down = ok(fake_gpu.cuda.cudaMalloc(pixels.nbytes)), ok(fake_gpu.cuda.cudaMalloc(want.nbytes))
    ok(fake_gpu.cuda.cudaMemcpyAsync(up, pixels.ctypes.data, pixels.nbytes, KINDS.cudaMemcpyHostToDevice, stream))
    assert not context.set_input_shape("pixel_values", (99, *shape[1:]))
    assert not context.set_tensor_address("pixel_values", up + 8)
    assert not context.execute_async_v3(int(stream))
    assert context.set_input_shape("pixel_values", shape)
    assert context.set_tensor_address("pixel_values", up)
    assert context.set_tensor_address("image_features", down)
    assert context.execute_async_v3(int(stream))
    found = np.empty_like(want)
    ok(fake_gpu.cuda.cudaMemcpyAsync(found.ctypes.data, down, want.nbytes, KINDS.cudaMemcpyDeviceToHost, stream))
    np.testing.assert_array_equal(found, want)
