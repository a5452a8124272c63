"""The run of the parts: what is begun, what is written down, and that 'not run' is never taken for passed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


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
        result = {"machine": "some machine"} if name == "environment" else {}
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
