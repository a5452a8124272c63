"""Whether a bundle fits a machine that somebody else has looked at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.planner.fits import stages_here
from llava_deploy.engines.planner.plan import StagePlan

GB = 10**9


def run_of(stages: tuple[StagePlan, ...], backend: str) -> StagePlan:
    return next(stage for stage in stages if (stage.stage, stage.backend) == ("run", backend))


def test_a_gpu_of_its_own_has_its_own_memory(demo_bundle_fp16: Path) -> None:
    stages = stages_here(demo_bundle_fp16, 16 * GB, 8 * GB, "sm89", None, is_unified=False)
    assert all(run_of(stages, backend).fits for backend in ("onnxruntime", "tensorrt", "tensorrt-rtx"))
    stages = stages_here(demo_bundle_fp16, 16 * GB, GB // 1000, "sm89", None, is_unified=False)
    assert [run_of(stages, backend).fits for backend in ("onnxruntime", "tensorrt-rtx")] == [True, False]


def test_shared_memory_is_counted_once(demo_bundle_fp16: Path) -> None:
    stages = stages_here(demo_bundle_fp16, 4 * GB, None, "sm87", "10.3", is_unified=True)
    assert run_of(stages, "tensorrt").fits
    assert run_of(stages, "tensorrt-rtx").note == "TensorRT for RTX 1.7 knows no sm87"
    stages = stages_here(demo_bundle_fp16, GB // 10, None, "sm87", "10.3", is_unified=True)
    assert run_of(stages, "tensorrt").fits is False


def test_what_nobody_knows_is_not_made_up(demo_bundle_fp16: Path, tmp_path: Path) -> None:
    stages = stages_here(demo_bundle_fp16, None, None, None, None, is_unified=False)
    assert run_of(stages, "onnxruntime").fits is None
    assert run_of(stages, "tensorrt").note == "no NVIDIA GPU"
    bundle = shutil.copytree(demo_bundle_fp16, tmp_path / "bundle")
    (bundle / "decoder.onnx").unlink()
    with pytest.raises(BundleError):
        stages_here(bundle, GB, None, None, None, is_unified=False)
