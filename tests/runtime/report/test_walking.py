"""A walk through the shipped model in another process, and walks that do not come to their end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.runtime.report import power, walking
from llava_deploy.runtime.report.power_files import PowerFiles
from llava_deploy.runtime.report.walk import SAMPLES, Way
from llava_deploy.runtime.report.walking import Journey, Measuring, take_walk

NO_TIME = Measuring(0.0, 0.0)


@pytest.fixture
def nothing_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PowerFiles:
    monkeypatch.setattr(power.shutil, "which", lambda _: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return PowerFiles(tmp_path / "hwmon", tmp_path / "powercap")


def way(bundle: Path, tokens: int = 8) -> Way:
    return Way(str(bundle), "onnxruntime", 1, tokens, 0.0, 0.0)


def test_phases_and_memory(demo_bundle: Path, nothing_tells: PowerFiles) -> None:
    found = take_walk(way(demo_bundle), NO_TIME, nothing_tells, on_gpu=False)
    assert (found.failure, found.backend, found.energy) == (None, "onnxruntime", None)
    assert found.energy_refusals[0] == "no sensors of a Jetson board"
    walk = found.walk
    assert walk is not None
    assert [phase.name for phase in walk.phases] == ["load", "picture", "prefill", "decode"]
    assert walk.phases[0].began == 0
    for one, two in zip(walk.phases, walk.phases[1:], strict=False):
        assert 0 <= one.began < one.ended == two.began < two.ended
    assert (walk.pictures, walk.new_tokens, walk.decode_tokens) == (1, 8, 7)
    assert 36 + 38 <= walk.prompt_tokens <= 36 + 40
    assert 3 <= len(walk.samples) <= SAMPLES
    loading, answering = walk.samples[0], walk.samples[-1]
    assert answering.anonymous + answering.mapped > loading.anonymous + loading.mapped + (10 << 20)
    assert walk.available is not None
    assert walk.device_available is None


def test_energy_of_a_board_that_tells(demo_bundle: Path, nothing_tells: PowerFiles) -> None:
    """Sensors that always say 6 W: nothing over idle, and 6 W times the time of a token."""
    chip = nothing_tells.hwmon / "hwmon0"
    chip.mkdir(parents=True)
    for name, value in {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": 6000, "curr1_input": 1000}.items():
        (chip / name).write_text(str(value), encoding="ascii")
    found = take_walk(way(demo_bundle), Measuring(0.3, 0.5), nothing_tells, on_gpu=False)
    energy, walk = found.energy, found.walk
    assert energy is not None
    assert walk is not None
    assert (energy.idle_watts, energy.decode_watts) == (pytest.approx(6), pytest.approx(6))
    assert energy.joules_per_token_over_idle == pytest.approx(0, abs=1e-9)
    decode = walk.phases[-1]
    assert decode.ended - decode.began >= 0.5
    assert walk.decode_tokens > 8  # several answers
    assert energy.joules_per_token == pytest.approx(6 * (decode.ended - decode.began) / walk.decode_tokens)
    assert energy.readings >= 5


def test_an_error_of_ours_is_what_it_says(tmp_path: Path, nothing_tells: PowerFiles) -> None:
    found = take_walk(way(tmp_path), NO_TIME, nothing_tells, on_gpu=False)
    assert found.walk is None
    assert found.failure is not None
    assert "want a bundle directory" in found.failure


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch, nothing_tells: PowerFiles) -> Callable[[str], Journey]:
    """A walk whose process runs this script of Python instead."""

    def go(script: str) -> Journey:
        monkeypatch.setattr(walking, "_PROGRAM", script)
        return take_walk(way(Path("bundle")), NO_TIME, nothing_tells, on_gpu=False)

    return go


def test_a_process_that_is_killed_has_too_little_memory(gone: Callable[[str], Journey]) -> None:
    found = gone('import os; print(\'{"phase": "load"}\', flush=True); os.kill(os.getpid(), 9)')
    assert found.failure == (
        "the process was killed while it was loaded: most likely there is too little memory for it"
    )


def test_a_process_that_crashes_says_where(gone: Callable[[str], Journey]) -> None:
    found = gone('import os; print(\'{"phase": "picture"}\', flush=True); os.abort()')
    assert found.failure is not None
    assert f"signal {int(signal.SIGABRT)} at its first question" in found.failure


def test_a_bug_is_an_error_with_its_last_line(gone: Callable[[str], Journey]) -> None:
    with pytest.raises(LlavaDeployError, match=r"bundle: .* failed before it was loaded: ZeroDivisionError"):
        gone("1 / 0")


def test_the_process_does_not_outlive_an_interrupt(monkeypatch: pytest.MonkeyPatch, nothing_tells: PowerFiles) -> None:
    started: list[subprocess.Popen[str]] = []
    process = walking._process

    @contextmanager
    def interrupted() -> Iterator[subprocess.Popen[str]]:
        with process() as child:
            started.append(child)
            raise KeyboardInterrupt
            yield child

    monkeypatch.setattr(walking, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(walking, "_process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take_walk(way(Path("bundle")), NO_TIME, nothing_tells, on_gpu=False)
    assert started[0].returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)
