"""Processes that measure: one at a time, each on its own, each with one line of result."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULT = "RESULT "
"""What the line of a process that has measured begins with; JSON follows."""

_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


class ProcessError(Exception):
    """A process has failed; the message is the last error that it printed."""


def run(command: Sequence[str | Path], limit_s: float, environment: Mapping[str, str] | None = None) -> str:
    """Run a command, with the benchmarks' own modules to import; its standard output.

    Raises:
        ProcessError: it failed, or took longer than ``limit_s`` seconds.
    """
    given = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, errors="replace", timeout=limit_s,
            env={**given, **({} if environment is None else environment)}, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ProcessError(f"took longer than {limit_s:.0f} s") from error
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        said = [line for line in lines if _ERROR.match(line)]
        raise ProcessError((said[-1:] or lines[-1:] or [f"exit code {done.returncode}"])[0][:400])
    return done.stdout


def result(command: Sequence[str | Path], limit_s: float) -> dict[str, Any]:
    """Run a command that measures; what its line of result says.

    Raises:
        ProcessError: see :func:`run`; or it printed no such line.
    """
    for line in run(command, limit_s).splitlines():
        if line.startswith(RESULT):
            found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return found
    raise ProcessError("it printed no result")
