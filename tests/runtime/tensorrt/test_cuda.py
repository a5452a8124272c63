"""The device layer: errors in words, memory that is freed, captures that nothing breaks."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cuda.bindings import runtime

from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.tensorrt.buffers import Staging
from llava_deploy.runtime.tensorrt.cuda import FATAL, Device, DeviceMemoryError

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

INT64 = np.dtype(np.int64)


def test_what_it_says_of_the_gpu(fake_gpu: FakeGpu) -> None:
    fake_gpu.capability = (12, 1)
    device = Device()
    assert (device.name, device.capability, device.integrated) == ("Fake GPU", "sm121", False)
    assert device.memory() == (1 << 30, 1 << 30)


def test_no_driver_an_old_one_and_no_gpu(fake_gpu: FakeGpu) -> None:
    fake_gpu.driver = 0
    with pytest.raises(BackendError, match="no NVIDIA driver is loaded"):
        Device()
    fake_gpu.driver = 11040
    with pytest.raises(BackendError, match=r"too old: it is for CUDA 11\.4, and cuda-python for 12\.9; update"):
        Device()
    fake_gpu.driver, fake_gpu.devices = 12040, 0
    with pytest.raises(BackendError, match="cudaErrorNoDevice: the driver finds no GPU; look at CUDA_VISIBLE_DEVICES"):
        Device()


def test_cuda_python_that_is_not_installed(fake_gpu: FakeGpu) -> None:
    fake_gpu.withhold("cuda.bindings.runtime")
    with pytest.raises(BackendError, match=r"cuda-python cannot be imported .*llava-deploy\[rtx\]"):
        Device()


def test_the_real_module_here_says_that_there_is_no_driver() -> None:
    """Without the fake: whatever this machine has, it is a device or an error of ours. In a process of its own."""
    code = (
        "from llava_deploy.runtime.tensorrt.cuda import Device\n"
        "from llava_deploy.engines.errors import BackendError\n"
        "try:\n    print(Device().capability)\nexcept BackendError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith(("sm", "no NVIDIA driver is loaded", "CUDA, ", "the NVIDIA driver is too old"))


def test_memory_says_what_it_is_wanted_for(fake_gpu: FakeGpu) -> None:
    device = Device()
    fake_gpu.memory.total = 1000
    with pytest.raises(DeviceMemoryError, match=r"^the cache: want 2,000 bytes on the GPU, of whose 1,000 1,000 are"):
        device.allocate(2000, "the cache")
    fake_gpu.fail("cudaHostAlloc")
    with pytest.raises(DeviceMemoryError, match=r"^logits: the machine has no 2,000 bytes of memory to pin"):
        device.pin(2000, "logits")


@pytest.mark.parametrize(
    ("error", "lives"),
    [
        ("cudaErrorInvalidValue", True),
        ("cudaErrorInvalidResourceHandle", True),
        ("cudaErrorIllegalAddress", False),
        ("cudaErrorAssert", False),
    ],
)
def test_errors_after_which_nothing_works_say_so(fake_gpu: FakeGpu, error: str, lives: bool) -> None:
    device = Device()
    fake_gpu.fail("cudaStreamSynchronize", error=error)
    with pytest.raises(BackendError, match=f"^CUDA, cudaStreamSynchronize: {error}: ") as caught:
        device.synchronize()
    assert ("start it again" in str(caught.value)) is not lives


def test_those_errors_are_the_ones_that_cuda_names() -> None:
    said = {error.name for error in runtime.cudaError_t if "relaunched" in (error.__doc__ or "")}
    assert said
    assert said <= FATAL


def test_an_error_is_not_left_for_others_to_find(fake_gpu: FakeGpu) -> None:
    device = Device()
    fake_gpu.fail("cudaMalloc")
    with pytest.raises(DeviceMemoryError):
        device.allocate(8, "a test")
    assert fake_gpu.last_error is None


def test_an_array_keeps_its_pinned_memory(fake_gpu: FakeGpu) -> None:
    block = Device().pin(64, "a test")
    array = block.array(16, (3, 2), INT64)
    array[:] = 7
    assert array.flags.writeable
    del block
    part = array[1:]
    del array
    assert fake_gpu.live()["pinned blocks"] == 1
    assert part.tolist() == [[7, 7], [7, 7]]
    del part
    assert fake_gpu.live() == {}


def test_what_goes_while_a_capture_is_on_is_freed_after_it(fake_gpu: FakeGpu) -> None:
    device = Device()
    blocks = [device.allocate(8, "a test")]
    graph = device.capture(blocks.clear)
    assert fake_gpu.live() == {"Stream": 1, "Graph": 1}
    graph.launch()
    del graph
    assert fake_gpu.live() == {"Stream": 1}


def test_what_goes_just_as_a_capture_begins_is_freed_after_it(
    fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Python collects garbage between CUDA's answer and the first work."""
    device = Device()
    blocks, call = [device.allocate(8, "a test")], device.call

    def collecting(name: str, *arguments: Any) -> Any:
        result = call(name, *arguments)
        if name == "cudaStreamBeginCapture":
            blocks.clear()
        return result

    monkeypatch.setattr(device, "call", collecting)
    graph = device.capture(lambda: None)
    assert fake_gpu.live() == {"Stream": 1, "Graph": 1}
    graph.launch()


def test_a_capture_that_fails_leaves_the_stream_as_it_was(fake_gpu: FakeGpu) -> None:
    device = Device()
    with pytest.raises(BackendError, match="cudaErrorStreamCaptureUnsupported"):
        device.capture(device.synchronize)
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 // 0)  # type: ignore[arg-type]
    device.synchronize()
    assert fake_gpu.live() == {"Stream": 1}


def test_arrays_go_up_in_one_copy(fake_gpu: FakeGpu) -> None:
    device = Device()
    staging = Staging(device, "a test")
    arrays = staging.lay_out({"a": ((3,), INT64), "b": ((2, 2), np.dtype(np.float16))})
    arrays.host["a"][:], arrays.host["b"][:] = [1, 2, 3], 0.5
    arrays.upload()
    device.synchronize()
    assert fake_gpu.calls["cudaMemcpyAsync"] == 1
    assert fake_gpu.memory.view(arrays.addresses["a"], 24).view(np.int64).tolist() == [1, 2, 3]
    assert fake_gpu.memory.view(arrays.addresses["b"], 8).view(np.float16).tolist() == [0.5] * 4
    assert all(address % 256 == 0 for address in arrays.addresses.values())
    smaller = staging.lay_out({"a": ((1,), INT64)})
    assert smaller.addresses["a"] == arrays.addresses["a"]
    staging.lay_out({"a": ((1000,), INT64)})
    del arrays, smaller
    assert fake_gpu.live() == {"device blocks": 1, "pinned blocks": 1, "Stream": 1}


def test_a_mark_is_waited_for(fake_gpu: FakeGpu) -> None:
    device = Device()
    pinned, memory = device.pin(8, "a test"), device.allocate(8, "a test")
    array = pinned.array(0, (1,), INT64)
    array[:] = 5
    device.upload(memory.address, pinned.address, 8)
    mark = device.mark()
    mark.wait()
    array[:] = 6
    device.synchronize()
    assert fake_gpu.memory.view(memory.address, 8).view(np.int64).tolist() == [5]
