"""The parts for ONNX Runtime on CUDA over its engine, with sessions on the CPU: all but the replay of kernels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.lowering import packed_products
from llava_deploy.runtime import cuda_choice
from llava_deploy.runtime.cuda_provider import Provider
from llava_deploy.runtime.onnxruntime_cuda import OnnxRuntimeCudaDecoder, OnnxRuntimeCudaVision

GpuCheck = Callable[[str], ModuleType]
MAX_LEN = 256


@pytest.fixture(params=["fp16", "int4"])
def bundle(
    request: pytest.FixtureRequest,
    gpu_check: GpuCheck,
    demo_bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> str:
    """A bundle with its engine, on a machine whose ONNX Runtime seems to have a GPU."""
    on_the_cpu = Provider("CPUExecutionProvider", "cpu", captures=False)
    monkeypatch.setattr(packed_products, "DEFAULT_ACCURACY_LEVEL", 1)  # in floats, as CUDA's kernels do at any level
    monkeypatch.setattr(cuda_choice, "CUDA_PROVIDER", on_the_cpu.name)
    for session in (OnnxRuntimeCudaVision, OnnxRuntimeCudaDecoder):
        monkeypatch.setattr(session.__init__, "__defaults__", (on_the_cpu,))
    copy = shutil.copytree(demo_bundles[request.param], tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    limits = gpu_check("parts").DEMO_LIMITS
    result: dict[str, Any] = gpu_check("backends").build(str(copy), "onnxruntime-cuda", limits, "sm90")
    assert result["engine"].startswith("onnxruntime-cuda-")
    assert result["engine_bytes"] > 1_000_000
    return str(copy)


def test_verify_and_questions(gpu_check: GpuCheck, bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = gpu_check("demo").compare(bundle, "onnxruntime-cuda", "cpu")
    assert verified["ok"]
    assert "on CUDA" in verified["backend"]
    monkeypatch.setattr(gpu_check("questions"), "PER_KIND", 2)
    asked = gpu_check("questions").ask(bundle, "onnxruntime-cuda")
    assert asked["batch of 4"]["right"] >= 8


def test_speed_of_one_row_and_of_eight(gpu_check: GpuCheck, bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = gpu_check("speed")
    monkeypatch.setattr(speed, "ANSWER", 8)
    monkeypatch.setattr(speed, "FIRSTS", 2)
    result: dict[str, Any] = speed.measure(bundle, "onnxruntime-cuda", MAX_LEN, 900.0, (1, 8))
    assert result["answer_tokens"] == [8] * 3
    assert result["prefill_tokens"] == MAX_LEN
    assert list(result["decode_at_batch"]) == ["1", "8"]
    assert all(one["tokens_per_s"] > 0 for one in result["decode_at_batch"].values())


def test_rows_that_have_no_room_leave_the_rest(
    gpu_check: GpuCheck, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = gpu_check("speed")
    llava = gpu_check("backends").load(Path(bundle), "onnxruntime-cuda", MAX_LEN)
    begin = llava.decoder.begin

    def full(batch: int) -> None:
        if batch > 1:
            raise BackendError("no room for so many rows")
        begin(batch)

    monkeypatch.setattr(llava.decoder, "begin", full)
    found = speed._batches(llava, (1, 8, 16))
    assert found["1"]["step_ms"] > 0
    assert found["8"] == {"not_measured": "no room for so many rows"}
    assert list(found) == ["1", "8"]
