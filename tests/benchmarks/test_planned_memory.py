"""What was measured on a GPU, held against the planner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llava_deploy.engines.planner.model import Sizes
from llava_deploy.engines.planner.onnxruntime_cuda_memory import CONTEXT, PROVIDER, cuda_run_memory
from llava_deploy.exporter.plan_source import planned_config
from llava_deploy.exporter.quantization.request import QuantizeOptions

GpuCheck = Callable[[str], ModuleType]
GB = 10**9
RESULTS = Path(__file__).parents[2] / "benchmarks/results/gpu"
WITHIN = 0.1


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
    cache = 1 << 30
    assert fp16.counted == pytest.approx(2 * weights + cache + 1.2 * GB, rel=0.03)  # and tower, head, activations
    assert fp16.counted - int4.counted == pytest.approx((2 - 0.5 - 2.5 / 128) * weights, rel=0.03)
    assert int4.left == 6 * GB - int4.counted
    assert int4.error == pytest.approx((int4.counted + PROVIDER - 6 * GB) / (6 * GB))
    path = tmp_path / "gpu_check.json"
    path.write_text(json.dumps(check), "utf-8")
    monkeypatch.setattr("sys.argv", ["planned_memory.py", str(path)])
    planned_memory.main()
    assert capsys.readouterr().out.splitlines()[0].startswith("7b/int4/onnxruntime-cuda/speed: device 6.00 GB, counted")


def test_the_planner_is_near_what_a_gpu_took(gpu_check: GpuCheck) -> None:
    """Of prompts in one row, and of 2, 4 and 8 rows; each phase's peak, over an empty context.

    Rows came one phase after the other, so the caches of fewer rows are still there.
    """
    bench = json.loads((RESULTS / "bench_h100_7b_int4.json").read_text(encoding="utf-8"))
    options = QuantizeOptions(bench["bundle"]["quantization"]["group_size"], symmetric=False, lm_head="fp16")
    model = planned_config(gpu_check("shapes").config_of("7b"), "7b", "int4", options, {})
    phases = {entry["phase"]: entry for entry in bench["memory"]}
    max_len = bench["backend"]["max_len"]

    def planned(rows: int) -> Any:
        return cuda_run_memory(model, Sizes.of_run(rows, max_len, 1))

    smaller = 0
    for rows, phase in ((1, "one prompt"), (2, "batch of 2"), (4, "batch of 4"), (8, "batch of 8")):
        device = planned(rows).device - CONTEXT
        assert phases[phase]["device"] - smaller < device  # not below what was measured
        assert device + smaller == pytest.approx(phases[phase]["device"], rel=WITHIN)
        smaller += rows * max_len * model.cache_bytes_per_slot
    for place in ("anonymous", "mapped"):
        most = max(entry[place] for entry in bench["memory"])
        assert getattr(planned(1), place) == pytest.approx(most, rel=WITHIN)


def test_the_planner_is_near_what_the_check_measured(gpu_check: GpuCheck) -> None:
    check = json.loads((RESULTS / "gpu_check_h100.json").read_text(encoding="utf-8"))
    compared = list(gpu_check("planned_memory").compared(check))
    assert [one.part for one in compared] == ["7b/int4/onnxruntime-cuda/speed", "7b/fp16/onnxruntime-cuda/speed"]
    for one in compared:
        assert 0 < one.error < WITHIN
        assert one.host_planned == pytest.approx(one.host_measured, rel=WITHIN)
