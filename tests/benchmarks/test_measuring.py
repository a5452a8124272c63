"""What the parts do, on the tiny model and on the CPU: questions, speeds and the models made for them."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llava_deploy.engines.manifest import read_manifest
from llava_deploy.exporter.quantization.weight import WeightFormat
from llava_deploy.exporter.weights import expected_tensors

GpuCheck = Callable[[str], ModuleType]


def test_the_yardstick_answers_as_the_product(
    gpu_check: GpuCheck, demo_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU; on a GPU only where the buffers are differs."""
    llava = gpu_check("onnxruntime_on").load(demo_bundles["int4"], None, "cpu")
    assert "canonical graphs (a yardstick)" in llava.backend
    questions = gpu_check("questions")
    monkeypatch.setattr(questions, "load", lambda *_: llava)
    monkeypatch.setattr(questions, "PER_KIND", 2)
    result = questions.ask(str(demo_bundles["int4"]), "onnxruntime-cuda-canonical")
    assert result["batch of 4"]["right"] >= 8


def test_an_onnxruntime_without_the_provider_has_not_run(gpu_check: GpuCheck, demo_bundles: dict[str, Path]) -> None:
    with pytest.raises(gpu_check("outcome").NotRunError, match="without CUDAExecutionProvider"):
        gpu_check("backends").load(demo_bundles["fp16"], "onnxruntime-cuda-canonical", None)


def test_too_few_right_answers_are_a_failure(
    gpu_check: GpuCheck, demo_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = gpu_check("questions")
    monkeypatch.setattr(questions, "PER_KIND", 1)
    monkeypatch.setattr(questions, "WANTED_RIGHT", 1.1)
    with pytest.raises(gpu_check("outcome").CheckFailedError, match="of 5 answers are right, 1 at once"):
        questions.ask(str(demo_bundles["fp16"]), "onnxruntime")


@pytest.mark.parametrize("weights", ["fp16", "int4", "int4-symmetric"])
def test_a_drawn_model_is_measured(
    gpu_check: GpuCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    parts = gpu_check("parts")
    bundle, speed = tmp_path / "bundle", gpu_check("speed")
    monkeypatch.setattr(speed, "ANSWER", 12)
    monkeypatch.setattr(speed, "FIRSTS", 2)
    gpu_check("shapes").make_bundle("tiny", weights, str(bundle))
    recipe = read_manifest(bundle).quantization
    assert (recipe is None, None if recipe is None else recipe.symmetric) == {
        "fp16": (True, None),
        "int4": (False, False),
        "int4-symmetric": (False, True),
    }[weights]
    result = speed.measure(str(bundle), "onnxruntime", parts.MEASURED["tiny"].max_len, 10.0, (1, 8))
    assert result["answer_tokens"] == [speed.ANSWER] * 3
    assert result["prompt_tokens"] == parts.MEASURED["tiny"].patches + parts.TEXT_TOKENS
    assert all(result[name] > 0 for name in ("vision_ms", "ttft_ms", "prefill_ms", "decode_tokens_per_s"))
    batches = result["decode_at_batch"]
    assert list(batches) == ["1", "8"]
    assert batches["8"]["tokens_per_s"] == pytest.approx(8e3 / batches["8"]["step_ms"], rel=1e-2)
    weight_bytes = speed.decoder_bytes(read_manifest(bundle))
    cache = 2 * 4 * 2 * 32 * 2 * (result["prompt_tokens"] + speed.ANSWER // 2)  # layers, heads of keys, size, bytes
    assert result["step_bytes"] == weight_bytes + cache
    reached = result["step_bytes"] * result["decode_tokens_per_s"] / 1e9
    assert math.isclose(result["share_of_copy_bandwidth"], reached / 10.0, abs_tol=2e-3)


def test_transformers_are_measured(gpu_check: GpuCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_speed = gpu_check("speed_torch")
    monkeypatch.setattr(torch_speed, "ANSWER", 8)
    monkeypatch.setattr(torch_speed, "FIRSTS", 2)
    result = torch_speed.measure("tiny", "eager", 120, 256, "cpu", None)
    assert result["answer_tokens"] == [8] * 3
    assert all(result[name] > 0 for name in ("vision_ms", "ttft_ms", "prefill_ms", "decode_tokens_per_s"))
    assert result["prefill_tokens"] == 256  # all that a cache of 256 has room for
    assert result["share_of_copy_bandwidth"] is None
    weight_bytes = 2 * (3_160_320 - 640 * 256) - result["step_bytes"]
    assert result["step_bytes"] > 2_000_000
    assert weight_bytes > 0  # the tower and the embeddings are not read at every token
    with pytest.raises(gpu_check("outcome").NotRunError, match="compiles nothing on cpu"):
        torch_speed.measure("tiny", "compiled", 120, 256, "cpu", None)


@pytest.mark.parametrize("symmetric", [True, False])
def test_drawn_weights_are_0_in_the_mean(gpu_check: GpuCheck, symmetric: bool) -> None:
    """Of all, and of each output: else the layers' results would add up until fp16 overflows."""
    form = WeightFormat(4, 128, symmetric=symmetric, permuted=False)
    first, other = (
        gpu_check("shapes").DrawnNibbles(key, key, (512, 4096), form).read_quantized().dequantized() for key in "ab"
    )
    assert first.std() == pytest.approx(0.0184, rel=0.1)
    assert abs(first.mean()) < 0.01 * first.std()
    assert np.abs(first.mean(axis=1)).max() < 5 * first.std() / math.sqrt(4096)
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 0.2


@pytest.mark.parametrize(("shape", "billions"), [("7b", 7.05), ("1b", 1.40)])
def test_the_shapes_are_what_they_are_called(gpu_check: GpuCheck, shape: str, billions: float) -> None:
    config = gpu_check("shapes").config_of(shape)
    parameters = sum(math.prod(sizes) for sizes in expected_tensors(config).values())
    assert round(parameters / 1e9, 2) == billions
    assert config.image_features == gpu_check("parts").MEASURED[shape].patches


def test_the_peak_is_over_what_was_in_use_before(gpu_check: GpuCheck) -> None:
    used = iter([100, 150, 400, *[120] * 1_000_000])
    seen: list[int] = []

    def measure() -> int:
        seen.append(next(used))
        return seen[-1]

    with gpu_check("device_memory").device_peak(measure) as peak:
        while len(seen) < 5:
            pass
    assert peak.device == 300
    with gpu_check("device_memory").device_peak(lambda: None) as none:
        pass
    assert none.device is None


def test_the_environment_of_a_machine_without_a_gpu(gpu_check: GpuCheck) -> None:
    found: dict[str, Any] = gpu_check("environment").look()
    assert found["copy_gb_per_s"] is None
    assert found["packages"]["onnxruntime"] == found["modules"]["onnxruntime"]
    assert gpu_check("parts").missing(found, "tensorrt-rtx") == f"no GPU: {found['no_gpu']}"
    assert gpu_check("parts").missing(found, "onnxruntime") is None


def test_what_is_timed_runs_without_pytorch(gpu_check: GpuCheck, child_environment: dict[str, str]) -> None:
    directory = Path(gpu_check("speed").__file__).parent
    code = "import sys, speed, questions; print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**child_environment, "PYTHONPATH": str(directory)},
    )
    assert done.stdout.strip() == "[]"


def test_a_build_without_the_memory_is_not_run(
    gpu_check: GpuCheck, demo_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_deploy.engines.tensorrt.memory.available_memory", lambda: 1_000_000)
    limits = gpu_check("parts").DEMO_LIMITS
    with pytest.raises(gpu_check("outcome").NotRunError, match="is planned to take"):
        gpu_check("backends").build(str(demo_bundles["fp16"]), "tensorrt-rtx", limits, "sm89")


def test_an_engine_is_built_without_a_gpu(gpu_check: GpuCheck, demo_bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(demo_bundles["fp16"], tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    limits = gpu_check("parts").DEMO_LIMITS
    result = gpu_check("backends").build(str(bundle), "tensorrt-rtx", limits, "sm89")
    assert result["engine"].endswith("-sm89")
    assert result["engine_bytes"] == sum(
        (bundle / "engines" / result["engine"] / name).stat().st_size for name in ("vision.plan", "decoder.plan")
    )
