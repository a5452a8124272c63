"""README's measured tables are those of the files of results, and a figure that is not is found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Benchmark = Callable[[str], ModuleType]
NAMES = ("transformers-fp32-vlm", "ours-int4")


@pytest.fixture
def script(benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a README and results of its own, which the peers' comparison has written."""
    script, rows = benchmark("readme_table"), benchmark("rows")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "README", tmp_path / "README.md")
    said = {"ttft_ms": 612.0, "decode_tokens_per_s": 40.0, "load_s": 1.0, "peak_mb": 1266, "anonymous_mb": 1,
            "mapped_mb": 2, "disk_mb": 3.0, "versions": {}, "ids": [1, 2, 3], "decoder_bytes": 500_000_000}  # fmt: skip
    circumstances = {"date": "2030-01-02T03:04:05+00:00", "machine": "a computer", "threads": 2, "prompt_tokens": 233,
                     "image_tokens": 196}  # fmt: skip
    rows.save(tmp_path / script.PEERS, rows.report(circumstances, [30.0], {name: [said] for name in NAMES}, {}, 3))
    script.README.write_text(f"Before.\n{script.BEGIN}\nold\n{script.END}\nAfter.\n", encoding="utf-8")
    return script


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["readme_table.py", *arguments])
    script.main()


def test_the_readme_says_what_the_results_say(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """This repository's own."""
    run(benchmark("readme_table"), monkeypatch, "--check")


def test_the_tables_are_written_between_the_marks(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="not those of benchmarks/results"):
        run(script, monkeypatch, "--check")
    run(script, monkeypatch)
    run(script, monkeypatch, "--check")
    lines = script.README.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("Before.", "After.")
    assert "old" not in lines
    assert "2030-01-02, a computer, 2 threads, 30.0 GB/s read" in lines[3]
    assert "| transformers fp32 | 612 ms | 40.0 tok/s | 72% | 1,266 MB | 3 of 3 |" in lines
    assert "| **llava-deploy** int4 | 612 ms | 40.0 tok/s | 67% | 1,266 MB | 3 of 3 |" in lines


def test_another_figure_is_found(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run(script, monkeypatch)
    readme = script.README.read_text(encoding="utf-8")
    script.README.write_text(readme.replace("612 ms", "611 ms", 1), encoding="utf-8")
    with pytest.raises(SystemExit, match="not those of benchmarks/results"):
        run(script, monkeypatch, "--check")


def test_another_result_is_found(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run(script, monkeypatch)
    path = script.RESULTS / script.PEERS
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    result["entries"][0]["ttft_ms"]["median"] += 10
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(SystemExit, match="not those of benchmarks/results"):
        run(script, monkeypatch, "--check")


def test_of_a_gpu_what_ran_has_a_row(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"prompt_tokens": 660, "vision_ms": 5.52, "ttft_ms": 32.1, "decode_tokens_per_s": 307.6,
                "share_of_copy_bandwidth": 0.413, "device_peak_bytes": 5_943_328_768}  # fmt: skip
    rows = {"1": {"tokens_per_s": 312.9}, "8": {"tokens_per_s": 1039.4}}
    parts = [
        ("7b/int4/onnxruntime-cuda/speed", "passed", {**measured, "decode_at_batch": rows}),
        ("7b/fp16/transformers eager/speed", "passed", measured),
        ("7b/fp16/tensorrt-rtx/speed", "not run", {}),
        ("demo/fp16/onnxruntime-cuda/verify", "passed", {}),
    ]
    found = {
        "date": "2030-01-02T03:04:05+00:00",
        "environment": {
            "gpu": {"name": "a GPU"},
            "copy_gb_per_s": 2985.8,
            "packages": {"torch": "2.11.0", "transformers": "5.17.0", "onnxruntime": "1.30.0"},
            "modules": {"onnxruntime": "1.31.1"},
        },
        "parts": [{"name": name, "status": status, "result": result} for name, status, result in parts],
    }
    (script.RESULTS / "gpu").mkdir()
    (script.RESULTS / "gpu" / "gpu_check_some.json").write_text(json.dumps(found), encoding="utf-8")
    run(script, monkeypatch)
    lines = script.README.read_text(encoding="utf-8").splitlines()
    (task,) = (line for line in lines if line.startswith("2030-01-02, a GPU, 2,986 GB/s copied"))
    assert "660 prompt tokens" in task
    assert "ONNX Runtime 1.31.1, PyTorch 2.11.0" in task
    cells = "5.5 ms | 32 ms | 308 tok/s | 41% |"
    assert f"| **llava-deploy** int4, ONNX Runtime on CUDA | {cells} 1,039 tok/s | 5.9 GB |" in lines
    assert f"| transformers fp16 | {cells}  | 5.9 GB |" in lines
    assert not [line for line in lines if "TensorRT" in line]


@pytest.mark.parametrize("readme", ["no marks", "{end} {begin}", "{begin} {end} {begin} {end}"])
def test_a_readme_without_the_marks_is_refused(benchmark: Benchmark, readme: str) -> None:
    script = benchmark("readme_table")
    with pytest.raises(ValueError, match="want the marks"):
        script.updated(readme.format(begin=script.BEGIN, end=script.END), "tables")


def test_decode_of_large_shapes_has_a_row_for_each_context(benchmark: Benchmark) -> None:
    at = {"tokens_per_s": 21.26, "ideal_tokens_per_s": 25.0, "share_of_ideal": 0.85}
    row = {"weight_bytes": 1, "64": at, "2000": {**at, "share_of_ideal": 0.5}, "batch_gain": 4.0}
    result = {"medians": {"ours": row, "llama.cpp": row}, "int4": {"group_size": 128}, "rounds": [{}, {}]}
    found = benchmark("readme_table").decode_table({"7B": result})
    assert "groups of 128;" in found
    assert "medians of 2 rounds or more:" in found
    assert found.splitlines()[-2:] == [
        "| 7B | 64 tokens | 21.3 tok/s | 85% | 21.3 tok/s | 85% |",
        "| 7B | 2,000 tokens | 21.3 tok/s | 50% | 21.3 tok/s | 50% |",
    ]
