"""What the check plans on which machine, and what it says of what was measured."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from llava_deploy.engines.names import Backend

GIB = 1 << 30
BARE: dict[str, Any] = {
    "machine": "x86_64, 2 CPUs",
    "python": "3.12",
    "packages": {"torch": "2.13", "tensorrt": None},
    "modules": {
        "onnxruntime": "1.32.0",
        "tensorrt_rtx": "1.7.1.116",
        "tensorrt": "cannot be imported: No module named 'tensorrt'",
    },
    "onnxruntime_providers": ["CPUExecutionProvider"],
    "gpu": None,
    "no_gpu": "no driver",
    "torch_cuda": None,
    "tensorrt_rtx_refusal": None,
    "copy_gb_per_s": None,
}


def with_gpu(memory: int = 80 * GIB, **changes: Any) -> dict[str, Any]:
    found = deepcopy(BARE)
    found |= {"gpu": {"name": "Some GPU", "capability": "sm89", "memory_bytes": memory}, "torch_cuda": "12.8"}
    found |= {"copy_gb_per_s": 900.0, "onnxruntime_providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    found["modules"]["tensorrt"] = "10.15.1"
    return found | changes


@pytest.fixture
def plan(gpu_check: Callable[[str], ModuleType], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    parts = gpu_check("parts")

    def call(found: dict[str, Any], shape: str) -> dict[str, Any]:
        planned = parts.all_parts(found, parts.Settings(shape, tmp_path))
        by_name = {part.name: part for part in planned}
        assert len(by_name) == len(planned)
        return by_name

    return call


@pytest.mark.parametrize("shape", ["7b", "1b", "tiny"])
@pytest.mark.parametrize("found", [BARE, with_gpu()], ids=["no GPU", "GPU"])
def test_every_part_calls_what_there_is(
    gpu_check: Callable[[str], ModuleType], plan: Callable[..., Any], found: dict[str, Any], shape: str
) -> None:
    seen: list[str] = []
    for part in plan(found, shape).values():
        assert set(part.needs) <= set(seen), part.name
        seen.append(part.name)
        json.dumps(part.arguments)
        if part.function:
            module, name = part.function.split(":")
            inspect.signature(getattr(gpu_check(module), name)).bind(**part.arguments)
        else:
            assert part.missing


def test_without_a_gpu_nothing_that_wants_one_is_run(plan: Callable[..., Any]) -> None:
    planned = plan(BARE, "tiny")
    can = {name for name, part in planned.items() if part.missing is None}
    built = ("demo/fp16", "demo/int4", "tiny/int4", "tiny/fp16")
    rtx = {f"{base}/tensorrt-rtx/build" for base in (*built, "tiny/int4-symmetric")}
    assert {name for name in can if "tensorrt-rtx" in name} == rtx
    assert {name for name in can if "cuda" in name} == {f"{base}/onnxruntime-cuda/build" for base in built}
    assert not any("/tensorrt/" in name or name == "device" for name in can)
    assert "demo/int4/onnxruntime/verify" in can
    assert planned["demo/int4/tensorrt-rtx/build"].arguments["capability"] == "sm89"
    assert planned["device"].missing == plan(BARE, "7b")["7b/speed"].missing == "no GPU: no driver"


def test_with_a_gpu_all_are_run(plan: Callable[..., Any]) -> None:
    assert [part.name for part in plan(with_gpu(), "7b").values() if part.missing is not None] == []


def test_the_most_telling_come_first(plan: Callable[..., Any]) -> None:
    names = list(plan(with_gpu(), "7b"))
    in_turn = [
        *("device", "demo/int4/onnxruntime-cuda/questions", "demo/fp16/tensorrt/build", "7b/int4/export"),
        *("7b/int4/onnxruntime-cuda/speed", "7b/int4/tensorrt/build", "7b/fp16/transformers eager/speed"),
        *("7b/fp16/onnxruntime-cuda/speed", "7b/fp16/transformers compiled/speed"),
        *("7b/fp16/onnxruntime-cuda-canonical/speed", "demo/fp16/onnxruntime/verify", "7b/int4-symmetric/export"),
    ]
    assert sorted(in_turn, key=names.index) == in_turn


def test_the_products_backends_are_all_built_and_checked(plan: Callable[..., Any]) -> None:
    planned = plan(with_gpu(), "1b")
    product = get_args(Backend)
    for weights in ("fp16", "int4"):
        for backend in product:
            assert {f"demo/{weights}/{backend}/{what}" for what in ("build", "verify", "questions")} <= set(planned)
    measured = {name for name in planned if name.startswith("1b/int4/") and name.endswith("/speed")}
    assert measured == {f"1b/int4/{one}/speed" for one in (*product[1:], "onnxruntime-cuda-canonical")}


def test_several_rows_are_timed_where_the_engine_takes_them(plan: Callable[..., Any]) -> None:
    planned = plan(with_gpu(), "7b")
    timed = {name: part.arguments["batches"] for name, part in planned.items() if "batches" in part.arguments}
    several = {name for name, batches in timed.items() if batches}
    assert several == {f"7b/{weights}/onnxruntime-cuda/speed" for weights in ("int4", "fp16")}
    assert all(timed[name][0] == 1 for name in several)


def test_polygraphy_is_told_which_module_before_its_import(plan: Callable[..., Any]) -> None:
    planned = plan(with_gpu(), "7b")
    told = {name for name, part in planned.items() if part.environment}
    assert told == {f"demo/{weights}/tensorrt-rtx/polygraphy" for weights in ("fp16", "int4")}
    assert not any("cuda" in name for name in planned if name.endswith("/polygraphy"))


def test_a_small_gpu_runs_int4_alone(plan: Callable[..., Any]) -> None:
    planned = plan(with_gpu(memory=8 * GIB), "7b")
    assert planned["7b/int4/tensorrt/speed"].missing is None
    why = "wants 17 GiB of GPU memory, this machine has 8.0"
    for name in ("export", "tensorrt/build", "tensorrt/speed", "onnxruntime-cuda/speed", "transformers eager/speed"):
        assert planned[f"7b/fp16/{name}"].missing == why


def test_a_gpu_that_tensorrt_for_rtx_refuses(plan: Callable[..., Any]) -> None:
    """And no other TensorRT, as on the H100 that this was first run on."""
    found = with_gpu(tensorrt_rtx_refusal="builds for others")
    found["modules"]["tensorrt"] = "cannot be imported: No module named 'tensorrt'"
    planned = plan(found, "7b")
    refused = [part for name, part in planned.items() if "/tensorrt-rtx/" in name]
    assert len(refused) == 4 * 2 + 2 * 3
    assert {part.missing for part in refused} == {"builds for others"}
    assert planned["7b/int4-symmetric/export"].missing is not None  # nothing that is left measures it
    assert planned["7b/int4/export"].missing is None


def test_an_onnxruntime_for_the_cpu_alone(plan: Callable[..., Any]) -> None:
    planned = plan(with_gpu(onnxruntime_providers=["CPUExecutionProvider"]), "7b")
    for name in ("7b/int4/onnxruntime-cuda/speed", "demo/fp16/onnxruntime-cuda/build"):
        assert "onnxruntime-gpu" in planned[name].missing


@pytest.mark.parametrize("shape", ["7b", "tiny"])
def test_bundles_go_with_their_last_part(plan: Callable[..., Any], shape: str) -> None:
    planned = list(plan(with_gpu(), shape).values())
    bundles = {part.arguments["bundle"] for part in planned if "bundle" in part.arguments}
    assert len(bundles) == 5
    for bundle in bundles:
        users = [part for part in planned if part.arguments.get("bundle") == bundle]
        assert [part.removes is not None for part in users] == [False] * (len(users) - 1) + [True]
        assert str(users[-1].removes) == bundle


def test_aims_are_held_against_what_was_measured(gpu_check: Callable[[str], ModuleType]) -> None:
    def speed(weights: str, backend: str, ttft_ms: float, share: float | None, **more: Any) -> Any:
        result = {
            "vision_ms": 9.0,
            "ttft_ms": ttft_ms,
            "prefill_tokens": 640,
            "prefill_ms": 6.25,
            "decode_tokens_per_s": 100.0,
            "share_of_copy_bandwidth": share,
            "device_peak_bytes": 5_000_000_000,
            "host_peak_bytes": None,
            **more,
        }
        return gpu_check("outcome").Outcome(f"7b/{weights}/{backend}/speed", "passed", "", 1.0, result)

    batches = {"1": {"step_ms": 10.0, "tokens_per_s": 100.0}, "8": {"not_measured": "no room"}}
    outcomes = [
        speed("int4", "tensorrt-rtx", 80.0, 0.85, load_s=1.0),
        speed("fp16", "tensorrt-rtx", 95.0, 0.7, load_s=1.0),
        speed("fp16", "onnxruntime-cuda", 70.0, 0.5, load_s=1.0, decode_at_batch=batches),
        speed("fp16", "transformers eager", 90.0, 0.5),
        speed("fp16", "onnxruntime-cuda-canonical", 99.0, 0.4, load_s=1.0),
        gpu_check("outcome").not_run("7b/fp16/tensorrt/speed", "no module"),
    ]
    text = gpu_check("report").markdown(with_gpu(), {"shape": "7b"}, outcomes)
    assert "Installed: torch 2.13. Imported: onnxruntime 1.32.0, tensorrt_rtx 1.7.1.116, tensorrt 10.15.1." in text
    assert "| TTFT ms | prefill 640 ms | decode tok/s | share of copy bandwidth | GPU memory GB | load s |" in text
    assert "| 7b, int4, tensorrt-rtx | 9.0 | 80.0 | 6.2 | 100.0 | 85% | 5.0 | 1.0 |" in text
    assert "| 7b, fp16, transformers eager | 9.0 | 90.0 | 6.2 | 100.0 | 50% | 5.0 | - |" in text
    assert "| 7b, fp16, tensorrt | not run | - |" in text
    assert "| 7b, fp16, onnxruntime-cuda | 1 | 100.0 | 10.00 |" in text
    assert "| 7b, fp16, onnxruntime-cuda | 8 | not measured: no room | - |" in text
    assert "- onnxruntime-cuda, fp16: first token after 70 ms, transformers eager 90 ms, reached" in text
    assert "- onnxruntime-cuda-canonical" not in text
    assert "- tensorrt-rtx, int4: decode at 85% of the copy, reached" in text
    assert "- tensorrt-rtx, fp16: decode at 70% of the copy, **not reached**" in text
    assert "- tensorrt-rtx, int4: first token after 80 ms, transformers eager 90 ms, reached" in text
    assert "- tensorrt-rtx, fp16: first token after 95 ms, transformers eager 90 ms, **not reached**" in text
    assert "Not known" not in text
    assert "Not known" in gpu_check("report").markdown(BARE, {"shape": "7b"}, outcomes[3:])
