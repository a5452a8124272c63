"""Services in processes of their own, and clients that speak to them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PLAIN = "from llava_deploy.cli import main; import sys; main(sys.argv[1:], prog_name='llava-deploy')"
SLOW = """
import time
from llava_deploy.runtime import answers, llava
def stream(self, prompt, images=(), *, max_new_tokens, sampling, stop):
    if "stuck" in prompt:
        time.sleep(1000)
    if "broken" in prompt:
        raise (llava.BackendError("no GPU") if "GPU" in prompt else ZeroDivisionError("a bug"))
    for number in range(max_new_tokens):
        time.sleep(0.02)
        last = number == max_new_tokens - 1
        timings = answers.Timings(0, 0, 0, 0, 1, 0, 1, 0, number + 1) if last else None
        yield answers.Piece((number,), f"{number} ", "length" if last else None, timings)
llava.Llava.stream = stream
"""
"""A model that says a number every 20 ms, hangs when it is told to, or breaks."""


class Client:
    """One connection."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self._file = self.socket.makefile("rb")

    def send(self, value: object) -> None:
        self.socket.sendall(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n")

    def line(self) -> Any:
        """The next; ``None`` where the service has closed."""
        line = self._file.readline()
        return json.loads(line) if line else None

    def ask(self, value: object) -> list[dict[str, Any]]:
        """Everything that a request gets, its last line last."""
        self.send(value)
        lines = [self.line()]
        while lines[-1] is not None and set(lines[-1]) == {"text"}:
            lines.append(self.line())
        return lines

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@dataclass
class Served:
    process: subprocess.Popen[str]
    socket: Path

    def client(self) -> Client:
        return Client(self.socket)

    def health(self) -> dict[str, Any]:
        client = self.client()
        (answer,) = client.ask({"health": True})
        client.close()
        return answer

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a state."""
        deadline = time.monotonic() + 20
        while not holds(state := self.health()):
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        return state

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and what it said."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=20)
        return self.process.returncode, said


Start = Callable[..., Served]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short name: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="serve-") as name:
        yield Path(name)


@pytest.fixture
def start(demo_bundle: Path, folder: Path) -> Iterator[Start]:
    """Start a service; of the tiny model, or with ``script`` of one that is changed."""
    running: list[subprocess.Popen[str]] = []

    def begin(*options: object, script: str = "", ready: bool = True, **environment: str) -> Served:
        path = folder / "socket"
        run = [sys.executable, "-c", script + PLAIN, "serve", demo_bundle, "--socket", path, "--threads", 1, *options]
        process = subprocess.Popen(
            [str(part) for part in run],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **environment},
        )
        running.append(process)
        served = Served(process, path)
        deadline = time.monotonic() + 60
        while ready:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            try:
                served.client().close()
                break
            except OSError:
                time.sleep(0.02)
        return served

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def slow(start: Start) -> Start:
    """Start a service of :data:`SLOW`."""
    return lambda *options, **rest: start(*options, script=SLOW, **rest)
