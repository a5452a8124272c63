"""The peers' comparison: its clock, our own entry on the tiny model, and what becomes of the rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from llava_deploy.runtime import Llava

Benchmark = Callable[[str], ModuleType]


def result(ids: list[int], **changed: Any) -> dict[str, Any]:
    """What a peer's process says."""
    speed = {"ttft_ms": 100.0, "decode_tokens_per_s": 50.0, "load_s": 1.0}
    memory = {"peak_mb": 300, "anonymous_mb": 100, "mapped_mb": 200, "disk_mb": 90.0, "decoder_bytes": 100_000_000}
    return {**speed, **memory, "versions": {}, "ids": ids, **changed}


def test_the_clock_counts_what_comes_after_the_first_tokens(
    benchmark: Benchmark, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = benchmark("clock")
    asked = clock.Asked(Path("model"), "timed", "warm-up", "text", 1, 12, {})
    answered, now = [], 0.0
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now))

    def answer(question: str, tokens: int, on_tokens: Callable[[int], None]) -> list[int]:
        nonlocal now
        answered.append((question, tokens))
        now += 0.05
        on_tokens(2)  # two tokens make the first character
        for _ in range(tokens - 2):
            now += 0.01
            on_tokens(1)
        return list(range(tokens))

    clock.measure(asked, lambda: answer, ("numpy",), fact=1)
    assert answered == [("warm-up", clock.WARM_UP_TOKENS), ("timed", 12)]
    line = capsys.readouterr().out
    assert line.startswith(clock.RESULT)
    found = json.loads(line.removeprefix(clock.RESULT))
    assert found["ttft_ms"] == 50
    assert found["decode_tokens_per_s"] == 100  # 10 tokens in 100 ms, not 12
    assert found["peak_mb"] >= found["anonymous_mb"] > 0
    assert (found["fact"], found["ids"]) == (1, list(range(12)))


def test_an_answer_that_is_too_short_is_no_result(benchmark: Benchmark) -> None:
    clock = benchmark("clock")
    asked = clock.Asked(Path("model"), "timed", "warm-up", "text", 1, 8, {})

    def answer(question: str, tokens: int, on_tokens: Callable[[int], None]) -> list[int]:
        on_tokens(3)
        return [1, 2, 3]

    with pytest.raises(ValueError, match="want 8 tokens, got 3"):
        clock.measure(asked, lambda: answer, ())


QUESTION = "{}<image>\nWhat is in the picture?"
TIMED, WARM_UP = (QUESTION.format(begin) for begin in "ab")


def write_task(place: Path, prompt_tokens: int, warm_up: str, warm_up_image: str) -> Path:
    """A task for the tiny model; of the pictures, one is the other's mirror image."""
    picture = Image.new("RGB", (64, 64), "navy")
    picture.paste("red", (4, 4, 30, 30))
    picture.save(place / "picture.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(place / "mirrored.png")
    asked = {"timed": (TIMED, "picture.png"), "warm_up": (warm_up, warm_up_image)}
    ids = [0] * prompt_tokens
    questions = {name: {"prompt": prompt, "image": image, "ids": ids} for name, (prompt, image) in asked.items()}
    (place / "task.json").write_text(json.dumps({"questions": questions}), encoding="utf-8")
    return place


@pytest.mark.parametrize(
    ("warm_up", "image", "failure"),
    [
        (WARM_UP, "mirrored.png", None),
        (TIMED, "mirrored.png", "not computed from its beginning"),
        (WARM_UP, "picture.png", "not computed from its beginning"),
    ],
    ids=["another question", "the same words", "the same picture"],
)
def test_ours_computes_the_whole_answer(
    benchmark: Benchmark,
    demo_bundles: dict[str, Path],
    tmp_path: Path,
    child_environment: dict[str, str],
    warm_up: str,
    image: str,
    failure: str | None,
) -> None:
    """To the last of the tokens, whatever they are; one that is known in part is no result."""
    bundle = demo_bundles["int4"]
    llava = Llava.load(bundle)
    (answer,) = llava.generate([TIMED], images=[[Image.new("RGB", (64, 64))]], max_new_tokens=1)
    task = write_task(tmp_path, answer.timings.prompt_tokens, warm_up, image)
    script = Path(benchmark("clock").__file__).with_name("run_ours.py")
    command = [sys.executable, script, bundle, task, "--mode", "vlm", "--threads", "1", "--new-tokens", "24"]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment, check=False)
    if failure is not None:
        assert failure in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.removeprefix("RESULT "))
    assert len(found["ids"]) == 24
    assert found["decoder_bytes"] == (bundle / "decoder.onnx.data").stat().st_size


def test_rounds_become_rows(benchmark: Benchmark) -> None:
    rows = benchmark("rows")
    reference, rates = list(range(10)), (90.0, 100.0, 150.0)
    results = {
        "transformers-fp32-vlm": [result(reference, decode_tokens_per_s=20.0, ttft_ms=600.0, peak_mb=1200)] * 3,
        "transformers-bf16-vlm": [result(reference, decode_tokens_per_s=30.0, ttft_ms=250.0, peak_mb=1300)],
        "llamacpp-q4_0-vlm": [result([7] * 10, decode_tokens_per_s=rate, ttft_ms=500.0) for rate in rates],
        "ours-fp32": [result(reference), result([*range(9), 0])],
        "ours-int4": [result([0, 1, 5, *range(3, 10)], decode_tokens_per_s=120.0, peak_mb=150)],
    }  # fmt: skip
    found = rows.report({"machine": "here"}, [10.0, 12.0, 11.0], results, {"openvino-int4-vlm": "no such file"}, 10)
    entries = {entry["name"]: entry for entry in found["entries"]}
    assert found["read_gb_per_s"] == {"median": 11.0, "min": 10.0, "max": 12.0}
    assert entries["llamacpp-q4_0-vlm"]["decode_tokens_per_s"] == {"median": 100.0, "min": 90.0, "max": 150.0}
    assert [entries[name]["equal_tokens"] for name in results] == [10, 10, 0, 9, 2]
    assert entries["ours-int4"]["ideal_tokens_per_s"] == 110.0
    assert entries["ours-int4"]["share_of_ideal"] == 1.091
    beside = found["ours_over_peers"]["ours-int4"]
    assert beside["decode_over_fastest_vlm_peer"] == 1.2
    assert beside["ttft_over_fastest_vlm_peer"] == 0.4  # of all peers, whatever their floats
    assert beside["peak_over_least_vlm_peer"] == 0.5
    beside = found["ours_over_peers"]["ours-fp32"]  # of fp32 peers alone
    assert (beside["decode_over_fastest_peer"], beside["ttft_over_fastest_vlm_peer"]) == (2.5, 0.167)
    table = rows.table(found)
    assert "| llama.cpp Q4_0 | vlm | 500 (500–500) | 100.0 (90.0–150.0) |" in table
    assert "openvino-int4-vlm failed: no such file" in table


def test_a_steps_bytes_are_those_of_the_weights(benchmark: Benchmark) -> None:
    """SmolLM2 has 134.5 million parameters with its output layer, which is tied."""
    rows, entries = benchmark("rows"), {entry.name: entry for entry in benchmark("entries").ENTRIES}
    assert sum(rows.linear_weights()) == 134_516_736
    assert rows.step_bytes(entries["transformers-fp32-vlm"], {}) == 4 * 134_516_736
    assert round(rows.step_bytes(entries["llamacpp-q4_0-vlm"], {}) / 1e6, 1) == 89.8
    assert rows.step_bytes(entries["ours-int4"], {"decoder_bytes": 5}) == 5


def test_entries_are_told_apart_and_have_their_scripts(benchmark: Benchmark) -> None:
    entries = benchmark("entries")
    names = [entry.name for entry in entries.ENTRIES]
    assert len(set(names)) == len(names)
    here = Path(entries.__file__).parent
    for entry in entries.ENTRIES:
        assert (here / f"run_{entry.script}.py").is_file()
        assert entry.environment is None or (here / "requirements" / f"{entry.environment}.txt").is_file()
        assert entry.reference in names


def test_a_process_that_fails_says_why(benchmark: Benchmark, tmp_path: Path) -> None:
    processes = benchmark("processes")
    for code, message in (
        ("raise ValueError('so it is')", "ValueError: so it is"),
        ("print('hello')", "it printed no result"),
        ("import time; time.sleep(30)", "took longer than"),
    ):
        with pytest.raises(processes.ProcessError, match=message):
            processes.result([sys.executable, "-c", code], 2)
    line = "import measuring; print('noise'); print('RESULT {\"a\": 1}')"
    assert processes.result([sys.executable, "-c", line], 20) == {"a": 1}
