"""What the GPU check measured, held against the planner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llava_deploy.engines.planner.onnxruntime_cuda_memory import PROVIDER

GpuCheck = Callable[[str], ModuleType]
GB = 10**9


def part(name: str, status: str = "passed", device: int | None = 6 * GB) -> dict[str, Any]:
    result = {"device_peak_bytes": device, "host_peak_bytes": 5 * GB, "prompt_tokens": 660}
    return {"name": name, "status": status, "result": result}


def test_parts_that_measured_the_backend_on_a_gpu_are_compared(
    gpu_check: GpuCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned_memory = gpu_check("planned_memory")
    names = ("7b/int4/onnxruntime-cuda/speed", "7b/fp16/onnxruntime-cuda/speed")
    others = (
        part("7b/int4/onnxruntime-cuda-canonical/speed"),
        part("7b/int4/tensorrt/speed"),
        part("7b/int4/onnxruntime-cuda/build"),
        part("device"),
        part("7b/int4-symmetric/onnxruntime-cuda/speed", status="failed"),
        part("1b/int4/onnxruntime-cuda/speed", device=None),
    )
    check = {"parts": [*others, *(part(name) for name in names)]}
    int4, fp16 = planned_memory.compared(check)
    assert (int4.part, fp16.part) == names
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    cache = 2048 * 2 * 32 * 4096 * 2
    assert fp16.counted == pytest.approx(2 * weights + cache + 1.2 * GB, rel=0.03)  # and tower, head, activations
    assert fp16.counted - int4.counted == pytest.approx((2 - 0.5 - 2.5 / 128) * weights, rel=0.03)
    assert int4.left == 6 * GB - int4.counted
    assert int4.error == pytest.approx((int4.counted + PROVIDER - 6 * GB) / (6 * GB))
    path = tmp_path / "gpu_check.json"
    path.write_text(json.dumps(check), "utf-8")
    monkeypatch.setattr("sys.argv", ["planned_memory.py", str(path)])
    planned_memory.main()
    assert capsys.readouterr().out.splitlines()[0].startswith("7b/int4/onnxruntime-cuda/speed: device 6.00 GB, counted")
