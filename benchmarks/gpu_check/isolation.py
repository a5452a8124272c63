"""A part in a process of its own: what it crashes, hangs in or leaks ends with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outcome import Outcome

RUN_PART = Path(__file__).with_name("run_part.py")
GRACE_S = 5.0  # for a process that is asked to end
LOG_LINES = 12


def run_isolated(
    name: str, function: str, arguments: Mapping[str, Any], limit_s: float, place: Path, environment: Mapping[str, str]
) -> Outcome:
    """Run ``function``, as ``module:name``, in a process of its own, and end it where it takes longer than it may.

    Args:
        name: of the part.
        function: takes the arguments and gives a dict; see ``run_part.py``.
        arguments: plain values.
        limit_s: seconds.
        place: directory for its result and for what it prints.
        environment: variables beside those of this process.
    """
    stem = name.replace("/", ".").replace(" ", "-")
    result, log = place / f"{stem}.json", place / f"{stem}.log"
    place.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    command = [sys.executable, str(RUN_PART), function, json.dumps(dict(arguments)), str(result)]
    began = time.monotonic()
    with log.open("wb") as output:
        # A session of its own, so that the processes that it starts end with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment}
        )
        try:
            process.wait(timeout=limit_s)
            ended = None if process.returncode >= 0 else f"ended by {signal.Signals(-process.returncode).name}"
        except subprocess.TimeoutExpired:
            ended = f"took longer than {limit_s:.0f} s"
            _end(process)
        except BaseException:  # the check itself is being stopped
            _end(process)
            raise
    seconds = round(time.monotonic() - began, 1)
    if ended is None and not result.is_file():
        ended = f"ended with exit code {process.returncode} and no result"
    if ended is not None:
        return Outcome(name, "failed", f"{ended}; it last said: {_tail(log)}", seconds, {})
    found = json.loads(result.read_text(encoding="utf-8"))
    return Outcome(name, found["status"], found["reason"], seconds, found["result"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process's whole group: first asked, then made to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)  # its own group: it was started in a new session
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return " | ".join(said[-LOG_LINES:]) if said else "nothing"
