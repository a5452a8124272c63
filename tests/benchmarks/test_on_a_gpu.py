"""The parts for TensorRT on the GPU that is not there: what they would measure, and what they would find wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.lowering.tensorrt import decoder_passes

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

GpuCheck = Callable[[str], ModuleType]
MAX_LEN = 256
OLD = "10.3.0.26"


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def engine(
    request: pytest.FixtureRequest, fake_gpu: FakeGpu, demo_bundles: dict[str, Path], tmp_path: Path
) -> tuple[str, str]:
    """A bundle with an engine, and its backend: TensorRT for RTX in place, TensorRT 10.3 with a growing cache."""
    bundle = shutil.copytree(demo_bundles["int4"], tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    if request.param == "tensorrt-rtx":
        fake_gpu.write_engine(bundle, passes=decoder_passes("in-place", MAX_LEN))
    else:
        fake_gpu.provide("tensorrt", OLD)
        passes = decoder_passes("growing", MAX_LEN)
        fake_gpu.write_engine(bundle, backend="tensorrt", version=OLD, cache="growing", passes=passes)
    return str(bundle), request.param


def test_verify_passes_and_says_what_ran(gpu_check: GpuCheck, engine: tuple[str, str]) -> None:
    result = gpu_check("demo").compare(*engine, "cpu")
    assert result["ok"]
    assert "TensorRT" in result["backend"]
    assert "logits of what is loaded, decode" in [stage["name"] for stage in result["stages"]]


def test_questions_one_by_one_and_at_once(
    gpu_check: GpuCheck, engine: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check("questions"), "PER_KIND", 2)
    result = gpu_check("questions").ask(*engine)
    assert result["batch of 1"] == result["batch of 4"]
    assert result["batch of 4"]["right"] >= 8


def test_speed_and_memory(gpu_check: GpuCheck, engine: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    speed = gpu_check("speed")
    monkeypatch.setattr(speed, "ANSWER", 8)
    monkeypatch.setattr(speed, "FIRSTS", 2)
    result: dict[str, Any] = speed.measure(*engine, MAX_LEN, 900.0, ())
    assert result["answer_tokens"] == [8] * 3
    assert result["device_peak_bytes"] > 100_000
    assert result["share_of_copy_bandwidth"] is not None
    assert result["prefill_tokens"] == MAX_LEN
    assert result["vision_ms"] > 0


def test_a_gpu_that_tensorrt_for_rtx_does_not_run_on(
    gpu_check: GpuCheck, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check("environment"), "COPIED", 1 << 20)
    fake_gpu.capability = (9, 0)
    found = gpu_check("environment").look()
    why = r"^TensorRT for RTX 1\.7\.1\.116 builds for sm75, .*sm121, and this GPU is sm90$"
    assert re.search(why, found["tensorrt_rtx_refusal"])
    assert gpu_check("parts").missing(found, "tensorrt-rtx") == found["tensorrt_rtx_refusal"]


def test_the_environment_names_the_gpu(gpu_check: GpuCheck, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check("environment"), "COPIED", 1 << 20)
    found = gpu_check("environment").look()
    assert found["gpu"]["capability"] == "sm89"
    assert found["gpu"]["memory_bytes"] > 0
    assert found["copy_gb_per_s"] > 0
    assert found["tensorrt_rtx_refusal"] is None
    assert found["torch_cuda"] is None  # it is in the place of cuda-python only
    fake_gpu.driver = 0
    found = gpu_check("environment").look()
    assert (found["gpu"], found["copy_gb_per_s"]) == (None, None)
    assert "driver" in found["no_gpu"]
