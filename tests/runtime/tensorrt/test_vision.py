"""Pictures through the GPU: features stay there, each picture's by itself, and nobody waits for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llava_deploy.engines.errors import BackendError, ContractError
from llava_deploy.engines.tensorrt_module import import_tensorrt
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeVision
from llava_deploy.runtime.tensorrt.cuda import Device, DeviceMemoryError
from llava_deploy.runtime.tensorrt.plans import open_plans
from llava_deploy.runtime.tensorrt.vision import TensorRtVision

if TYPE_CHECKING:
    from fake_gpu import FakeGpu


@pytest.fixture
def pictures(sessions: Any) -> Callable[[int, int], np.ndarray]:
    shape = sessions.manifest.vision
    size = (3, shape.image_height, shape.image_width)
    return lambda count, seed: np.random.default_rng(seed).random((count, *size)).astype(np.float32)


def test_features_are_onnx_runtimes(sessions: Any, reference: Any, pictures: Any) -> None:
    for count in (1, 3, 2):
        pixels = pictures(count, count)
        found = sessions.vision.encode(pixels)
        assert len(found) == count
        np.testing.assert_array_equal([each.numpy() for each in found], reference[0].encode(pixels))


def test_nobody_waits_for_the_features(sessions: Any, fake_gpu: FakeGpu, reference: Any, pictures: Any) -> None:
    """Calls one after the other, unlike in size, and read at the end: no buffer may be written to too early."""
    calls = [pictures(count, seed) for seed, count in enumerate((1, 3, 1, 2, 2, 3))]
    sessions.vision.encode(calls[0])
    before = fake_gpu.calls["cudaStreamSynchronize"]
    sessions.vision.encode(calls[0])
    assert fake_gpu.calls["cudaStreamSynchronize"] == before
    found = [sessions.vision.encode(pixels) for pixels in calls]
    for features, pixels in zip(found, calls, strict=True):
        np.testing.assert_array_equal([each.numpy() for each in features], reference[0].encode(pixels))


def test_memory_of_forgotten_pictures_is_used_again(sessions: Any, fake_gpu: FakeGpu, pictures: Any) -> None:
    kept = sessions.vision.encode(pictures(3, 0))
    blocks = len(fake_gpu.memory.device)
    want = kept[1].numpy()
    for seed in range(5):
        sessions.vision.encode(pictures(3, seed))
    assert len(fake_gpu.memory.device) <= blocks + 3
    np.testing.assert_array_equal(kept[1].numpy(), want)
    addresses = {each.address for each in kept}
    assert len(addresses) == 3


def test_too_many_pictures_and_other_shapes_are_refused(sessions: Any, pictures: Any) -> None:
    assert sessions.vision.max_images == 3
    with pytest.raises(ContractError, match=r"images in 1\.\.3"):
        sessions.vision.encode(pictures(4, 0))
    with pytest.raises(ContractError, match="pixel_values"):
        sessions.vision.encode(pictures(1, 0)[:, :, 1:])


@pytest.mark.parametrize("name", ["cudaMalloc", "cudaHostAlloc", "execute_async_v3"])
def test_after_a_failure_the_next_call_works(
    name: str, sessions: Any, fake_gpu: FakeGpu, reference: Any, pictures: Any
) -> None:
    pixels = pictures(2, 0)
    want = reference[0].encode(pixels)
    failed = 0
    for at in range(1, 4):
        fake_gpu.fail(name, at)
        try:
            sessions.vision.encode(pixels)
        except DeviceMemoryError:
            failed += 1
        fake_gpu._failures.clear()
        np.testing.assert_array_equal([each.numpy() for each in sessions.vision.encode(pixels)], want)
    assert failed >= 1


@pytest.mark.parametrize(("version", "units"), [("10.3.0", 2), ("11.4.0.106", 0)])
def test_half_floats_and_old_releases(
    version: str, units: int, fake_gpu: FakeGpu, demo_bundle_fp16: Path, tmp_path: Path, load: Any
) -> None:
    from llava_deploy.engines.manifest import VISION_GRAPH, read_manifest
    from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeOptions

    fake_gpu.provide("tensorrt", version)
    directory = fake_gpu.write_engine(demo_bundle_fp16, tmp_path / "engine", backend="tensorrt", version=version)
    shape = read_manifest(demo_bundle_fp16).vision
    (engine,) = open_plans(directory, ["vision.plan"], import_tensorrt("tensorrt"), Device())
    pixels = np.random.default_rng(0).random((2, 3, shape.image_height, shape.image_width)).astype(np.float32)
    (first, second) = TensorRtVision(engine, shape).encode(pixels)
    theirs = OnnxRuntimeVision(demo_bundle_fp16 / VISION_GRAPH, shape, OnnxRuntimeOptions(1, None)).encode(pixels)
    assert second.dtype == np.float16
    # In the dialect of 10.3 an attention is several operators, and each rounds: in units of the greatest value's last.
    atol = units * float(np.spacing(np.abs(theirs).max()))
    np.testing.assert_allclose([first.numpy(), second.numpy()], theirs, rtol=0, atol=atol)


def test_a_failure_on_the_gpu_comes_when_somebody_waits(sessions: Any, fake_gpu: FakeGpu, pictures: Any) -> None:
    (features,) = sessions.vision.encode(pictures(1, 0))
    fake_gpu.fail("cudaStreamSynchronize", error="cudaErrorIllegalAddress")
    fake_gpu.fail("cudaMemcpyAsync", error="cudaErrorIllegalAddress")
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        features.numpy()
