"""A part's process: what comes of one that passes, fails, hangs or crashes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PARTS = """
import os, subprocess, sys, time
from pathlib import Path
from outcome import CheckFailedError, NotRunError

def add(a, b):
    return {"sum": a + b, "seen": os.environ.get("SEEN")}

def wrong():
    raise CheckFailedError("two of three are off", {"off": 2})

def absent():
    raise NotRunError("no such device")

def broken():
    raise ValueError("a line\\nand another")

def crash():
    print("about to go", flush=True)
    os.abort()

def leave():
    os._exit(3)

def hang(pid_file):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(pid_file).write_text(str(child.pid))
    print("waiting", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(gpu_check: Callable[[str], ModuleType], tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "some_parts.py").write_text(PARTS)

    def call(function: str, limit_s: float = 30, **arguments: object) -> Any:
        environment = {"PYTHONPATH": str(tmp_path), "SEEN": "yes"}
        target = f"some_parts:{function}"
        return gpu_check("isolation").run_isolated(
            "some/part", target, arguments, limit_s, tmp_path / "out", environment
        )

    return call


def test_a_part_that_passes(run: Callable[..., Any]) -> None:
    outcome = run("add", a=2, b=3)
    assert (outcome.status, outcome.reason) == ("passed", "")
    assert outcome.result == {"sum": 5, "seen": "yes"}
    assert outcome.seconds > 0


def test_what_was_found_stays_with_a_failure(run: Callable[..., Any]) -> None:
    outcome = run("wrong")
    assert (outcome.status, outcome.reason, outcome.result) == ("failed", "two of three are off", {"off": 2})


def test_what_cannot_be_run_has_not_passed(run: Callable[..., Any]) -> None:
    outcome = run("absent")
    assert (outcome.status, outcome.reason) == ("not run", "no such device")


def test_an_exception_is_a_failure_in_one_line(run: Callable[..., Any]) -> None:
    assert run("broken").reason == "ValueError: a line and another"


def test_a_crash_is_a_failure_with_what_was_said_last(run: Callable[..., Any]) -> None:
    outcome = run("crash")
    assert outcome.status == "failed"
    assert outcome.reason.startswith("ended by SIGABRT; it last said: about to go")


def test_an_end_without_a_result(run: Callable[..., Any]) -> None:
    outcome = run("leave")
    assert outcome.status == "failed"
    assert outcome.reason.startswith("ended with exit code 3 and no result")


def test_an_older_result_is_not_taken_for_this_one(run: Callable[..., Any]) -> None:
    assert run("add", a=1, b=1).status == "passed"
    assert run("leave").status == "failed"


def test_a_part_that_hangs_ends_with_its_children(run: Callable[..., Any], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    outcome = run("hang", limit_s=2, pid_file=str(pid_file))
    assert outcome.status == "failed"
    assert outcome.reason.startswith("took longer than 2 s; it last said: waiting")
    child = int(pid_file.read_text())
    end = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.is_file() or state.read_text().rpartition(")")[2].split()[0] != "Z"
