"""The self-test of a TensorRT engine, on the fake GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_gpu import LIMITS, RTX

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.selftest.report import SelftestReport
from llava_deploy.runtime.stages import TOLERANCE
from llava_deploy.runtime.tensorrt.decoder import TensorRtDecoder

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

Tested = Callable[..., SelftestReport]
ON_GPU = Wanted("tensorrt-rtx")


@pytest.fixture
def bundle(recorded_bundle: Path, copied: Callable[..., Path]) -> Path:
    return copied(recorded_bundle, ENGINES)


def test_a_pass_says_the_gpu_and_its_driver(bundle: Path, fake_gpu: FakeGpu, tested: Tested) -> None:
    engine = fake_gpu.write_engine(bundle)
    report = tested(bundle, ON_GPU)
    assert report.ok, report.sentence
    assert report.not_run == ()
    assert report.backend is not None
    assert report.backend.name == "tensorrt-rtx"
    assert engine.name in report.backend.reason
    assert report.machine.gpu is not None
    assert report.machine.gpu in report.backend.reason
    assert report.versions["tensorrt-rtx"] == RTX
    assert report.versions["driver's CUDA"] == "12.9"
    assert any(stage.result.name == "tokens, in a batch of 3" for stage in report.stages)


def test_auto_takes_the_engine_and_hashes_it(bundle: Path, fake_gpu: FakeGpu, tested: Tested) -> None:
    engine = fake_gpu.write_engine(bundle)
    plan = bytearray((engine / "decoder.plan").read_bytes())
    plan[len(plan) // 2] ^= 1
    (engine / "decoder.plan").write_bytes(plan)
    report = tested(bundle, Wanted())
    assert report.first_failure is not None
    assert report.first_failure.result.kind == "files"
    assert "decoder.plan: want sha256" in report.sentence


def test_an_engine_of_one_row_and_of_a_short_context(bundle: Path, fake_gpu: FakeGpu, tested: Tested) -> None:
    fake_gpu.write_engine(bundle, limits=replace(LIMITS, max_batch=1, max_len=100, max_seq=96))
    report = tested(bundle, ON_GPU)
    assert report.ok, report.sentence
    assert {each.what for each in report.not_run} == {"golden two-pictures", "tokens, in a batch"}
    assert "the engine or the memory has room for one row" in report.to_dict()["not_run"][-1]["reason"]


def test_where_the_engine_does_not_load_what_runs_instead_is_tested_as_itself(
    bundle: Path, fake_gpu: FakeGpu, tested: Tested, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_gpu.write_engine(bundle)

    def full(*_: Any) -> Any:
        raise BackendError("no memory on the GPU")

    monkeypatch.setattr("llava_deploy.runtime.tensorrt.plans.open_plans", full)
    report = tested(bundle, Wanted())
    assert report.ok, report.sentence
    (left,) = report.not_run
    assert left.what == f"engine {engine.name}"
    assert "no memory on the GPU" in left.reason
    assert report.backend is not None
    assert (report.backend.name, report.machine.gpu) == ("onnxruntime", None)
    files, *_, logits = (s.result for s in report.stages if s.result.kind in ("files", "logits"))
    assert engine.name not in files.detail
    assert logits.tolerance < TOLERANCE["fp32"] / 2  # a GPU's are allowed all of it
    with pytest.raises(BackendError, match="no memory on the GPU"):
        tested(bundle, ON_GPU)


def test_an_engine_that_is_wrong(
    bundle: Path, fake_gpu: FakeGpu, tested: Tested, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu.write_engine(bundle)
    right = TensorRtDecoder.step
    monkeypatch.setattr(TensorRtDecoder, "step", lambda *a, **b: _off(right(*a, **b)))
    report = tested(bundle, ON_GPU)
    assert report.first_failure is not None
    assert report.first_failure.result.kind == "logits"


def _off(logits: np.ndarray) -> Any:
    return logits * np.float32(1.01)
