"""What the check plans on which machine, what it says of it, and that it never takes 'not run' for passed."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
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


class Sham:
    """A run of the check whose parts are given, and answer at once."""

    def __init__(self, gpu_check: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
        self.begun: list[str] = []
        self.limits: list[float] = []
        self._outcome, self._part = gpu_check("outcome").Outcome, gpu_check("parts").Part
        check = gpu_check("check")
        monkeypatch.setattr(check, "run_isolated", self._run)
        monkeypatch.setattr(check, "all_parts", lambda *_: self.parts)
        self.parts: list[Any] = []
        self.make = lambda minutes=10.0, only=(): check.Check(output, "tiny", minutes, only)

    def part(self, name: str, status: str, **fields: Any) -> None:
        self.parts.append(self._part(name, status, {}, 5, **fields))

    def _run(self, name: str, function: str, _arguments: Any, limit_s: float, *_: Any) -> Any:
        self.begun.append(name)
        self.limits.append(limit_s)
        result = BARE if name == "environment" else {}
        status = "passed" if name == "environment" else function
        return self._outcome(name, status, "" if status == "passed" else "a reason", 1.0, result)


@pytest.fixture
def sham(gpu_check: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sham:
    return Sham(gpu_check, monkeypatch, tmp_path)


def test_results_are_written_and_what_needs_a_failure_is_not_run(sham: Sham, tmp_path: Path) -> None:
    sham.part("demo/fp16/a/build", "failed")
    sham.part("demo/fp16/a/verify", "passed", needs=("demo/fp16/a/build",))
    sham.part("demo/fp16/b/verify", "passed", missing="no such module")
    check = sham.make()
    check.run()
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(part["name"], part["status"]) for part in written["parts"]] == [
        ("environment", "passed"),
        ("demo/fp16/a/build", "failed"),
        ("demo/fp16/a/verify", "not run"),
        ("demo/fp16/b/verify", "not run"),
    ]
    assert written["totals"] == {"passed": 1, "failed": 1, "not run": 2}
    assert sham.begun == ["environment", "demo/fp16/a/build"]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| fp16 | a | **failed** | not run | - | - |" in text
    assert "- no such module: `demo/fp16/b/verify`" in text


def test_a_part_that_time_does_not_reach_is_not_run(sham: Sham) -> None:
    sham.part("demo/fp16/a/verify", "passed")
    check = sham.make(minutes=0.3)
    check._end -= 10
    check.run()
    assert [outcome.status for outcome in check.outcomes] == ["not run"]
    assert "minutes were over" in check.outcomes[0].reason


@pytest.mark.parametrize(("minutes", "limit_s"), [(5, 5), (10, 5), (30, 15)])
def test_more_minutes_are_more_patience(sham: Sham, minutes: float, limit_s: float) -> None:
    sham.part("demo/fp16/export", "passed")
    sham.make(minutes=minutes).run()
    assert sham.limits[1] == limit_s


def test_the_bundles_go_where_it_is_stopped(sham: Sham, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sham.part("demo/fp16/a/verify", "passed")
    check = sham.make()
    (tmp_path / "work" / "demo-fp16").mkdir(parents=True)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "_note", lambda outcome: None if outcome.name == "environment" else stop())
    with pytest.raises(KeyboardInterrupt):
        check.run()
    assert not (tmp_path / "work").exists()


def test_what_ctrl_c_left_is_not_run(sham: Sham, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demo/fp16/export", "demo/fp16/a/verify", "demo/fp16/a/questions"):
        sham.part(name, "passed")
    check = sham.make(only=["verify"])
    run = check._run

    def stop_at(part: Any) -> Any:
        if part.name.endswith("verify"):
            raise KeyboardInterrupt
        return run(part)

    monkeypatch.setattr(check, "_run", stop_at)
    with pytest.raises(KeyboardInterrupt):
        check.run()
    assert [(outcome.name, outcome.status, outcome.reason) for outcome in check.outcomes[1:]] == [
        ("demo/fp16/a/verify", "not run", "stopped with Ctrl-C")
    ]


def test_only_some_parts(sham: Sham) -> None:
    for name in ("demo/fp16/export", "demo/fp16/a/verify", "demo/fp16/a/questions"):
        sham.part(name, "passed")
    sham.make(only=["questions", "export"]).run()
    assert sham.begun == ["environment", "demo/fp16/export", "demo/fp16/a/questions"]


def test_only_some_parts_with_what_they_need(sham: Sham) -> None:
    sham.part("demo/fp16/a/first", "passed")
    sham.part("demo/fp16/a/second", "passed", needs=("demo/fp16/a/first",))
    sham.part("demo/fp16/a/questions", "passed", needs=("demo/fp16/a/second",))
    sham.part("demo/fp16/b/first", "passed")
    sham.make(only=["questions"]).run()
    assert sham.begun == ["environment", *(f"demo/fp16/a/{name}" for name in ("first", "second", "questions"))]


def test_the_script_says_what_it_could_not_do(
    gpu_check: Callable[[str], ModuleType], tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """As a user starts it, from anywhere; with no time at all."""
    script = gpu_check("check").__file__
    command = [sys.executable, script, "out", "--shape", "tiny", "--minutes", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=child_environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["0 passed, 0 failed, 1 not run", str(Path("out") / "gpu_check.md")]
    assert json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"][0]["status"] == "not run"
