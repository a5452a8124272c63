"""The benchmark on the fake GPU: its memory, its bandwidth, and what an engine has no room for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.onnxruntime_cuda import CUDA_PROVIDER
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.runtime import cuda_choice, onnxruntime_cuda
from llava_deploy.runtime.backend_choice import BackendName, Wanted
from llava_deploy.runtime.bench.bandwidth import copy_bandwidth
from llava_deploy.runtime.bench.options import BenchOptions
from llava_deploy.runtime.bench.report import Report
from llava_deploy.runtime.cuda_provider import Provider
from llava_deploy.runtime.tensorrt.cuda import Device

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

Run = Callable[..., Report]
OPTIONS = BenchOptions(None, (16, 64, 512), (1, 2, 8), 6, 2)


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path, fake_gpu: FakeGpu) -> Path:
    """A bundle of its own, with an engine for the fake GPU: 4 rows, 256 slots."""
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    fake_gpu.write_engine(bundle)
    return bundle


@pytest.mark.parametrize("backend", ["auto", "tensorrt-rtx"])
def test_what_is_measured_of_a_gpu(run_bench: Run, bundle: Path, backend: BackendName) -> None:
    found = run_bench(bundle, Wanted(backend), OPTIONS)
    assert (found.backend.name, found.backend.max_len) == ("tensorrt-rtx", 256)
    assert found.machine.gpu == Device().name
    assert found.versions["tensorrt-rtx"] == "1.7.1.116"
    assert "onnxruntime" not in found.versions
    assert (found.bandwidth.kind, found.bandwidth.buffer_bytes) == ("device copy", 1 << 20)
    assert [decode.context for decode in found.decode] == [16, 64]
    assert [decode.batch for decode in found.batches] == [1, 2]
    assert any(remark.startswith("batch of 8 left out: ") for remark in found.remarks)
    assert any("context of 512 tokens left out" in remark for remark in found.remarks)
    assert not any("cache holds" in remark for remark in found.remarks)
    first = found.first_token
    assert first.pictures == 1
    assert sum(part.each[0] for part in (first.preprocess, first.vision, first.splice, first.prefill, first.rest)) > 0
    peaks = {peak.phase: peak.device for peak in found.memory}
    one, two = (peaks[phase] for phase in ("one prompt", "batch of 2"))
    assert peaks["before loading"] == 0
    assert one is not None
    assert two is not None
    assert two > one > 1 << 19  # which is the cache of one row


def test_with_another_backend_the_gpu_is_left_alone(run_bench: Run, bundle: Path) -> None:
    found = run_bench(bundle, Wanted("onnxruntime", threads=1), OPTIONS)
    assert found.machine.gpu is None
    assert found.bandwidth.kind == "host read"
    assert {peak.device for peak in found.memory} == {None}


def test_a_gpu_that_cannot_be_asked_for_its_memory_is_an_error_that_says_why(
    run_bench: Run, demo_bundle_fp16: Path, tmp_path: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime on CUDA needs no cuda-python; here its sessions are the CPU's."""
    bundle = shutil.copytree(demo_bundle_fp16, tmp_path / "fp16", ignore=shutil.ignore_patterns(ENGINES))
    build_onnxruntime_cuda(bundle)
    found = SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: [CUDA_PROVIDER])
    monkeypatch.setattr(cuda_choice, "import_onnxruntime", lambda: found)
    on_the_cpu = Provider("CPUExecutionProvider", "cpu", captures=False)
    for name in ("OnnxRuntimeCudaVision", "OnnxRuntimeCudaDecoder"):
        monkeypatch.setattr(getattr(onnxruntime_cuda, name).__init__, "__defaults__", (on_the_cpu,))
    assert run_bench(bundle, Wanted("onnxruntime-cuda"), OPTIONS).machine.gpu == Device().name
    fake_gpu.driver = 0
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        run_bench(bundle, Wanted("onnxruntime-cuda"), OPTIONS)


def test_without_a_driver_auto_measures_what_runs(run_bench: Run, bundle: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.driver = 0
    found = run_bench(bundle, Wanted("auto"), OPTIONS)
    assert found.backend.name == "onnxruntime"
    assert "not TensorRT for RTX: no NVIDIA driver" in found.backend.reason
    assert {peak.device for peak in found.memory} == {None}


def test_a_copy_reads_and_writes(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_deploy.runtime.tensorrt.cuda.Mark.since", lambda *_: 0.5)
    assert copy_bandwidth(Device(), 1 << 20, 3) == [2 * (1 << 20) / 0.5] * 3
    assert fake_gpu.live().get("device blocks") is None
