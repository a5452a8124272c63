"""The machine as the doctor sees it: files below a root, programs with a time limit, packages. Nothing is changed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_deploy.engines.onnxruntime_module import NO_REPORTS

PATIENCE = 8.0
"""Seconds that a program may take; nvidia-smi wakes a sleeping driver up, which takes some."""

PROBE_PATIENCE = 40.0
"""Seconds that a library may take to load: TensorRT's are gigabytes, from a cold disk."""

_MOST = 1 << 20  # bytes that are read of a file, or of what a program prints
_PROBES = Path(__file__).with_name("probe.py")
_LAST_BREATH = 1.0  # seconds that a killed program may take to be gone; one that hangs in the kernel never is


Outcome = Literal["ended", "not installed", "cannot be run", "no answer"]
"""Whether a program came to an end by itself, or why not."""


@dataclass(frozen=True)
class Ran:
    """What a program did.

    Attributes:
        code: its exit status, negative for a signal; ``None`` where it was not started or had to be stopped.
        text: what it printed, standard error with it.
        trouble: why there is no ``code``, for people: empty where there is one.
        outcome: the same in a word.
    """

    code: int | None
    text: str
    trouble: str = ""
    outcome: Outcome = "ended"

    @classmethod
    def not_installed(cls, program: str) -> Ran:
        """Of a program that is not there."""
        return cls(None, "", f"{program} is not installed", "not installed")


@dataclass(frozen=True)
class System:
    """Everything that is asked of the machine goes through here, so that a test can be another machine.

    Attributes:
        root: where its files are.
        run: runs a program, by its words, for so many seconds at most.
        version: of an installed package by its name, or ``None``.
        may_use: whether this user may read and write a path.
        disk: bytes that are free where a path is, or ``None``.
        environment: its variables.
        machine: architecture, as ``x86_64``.
        release: of the kernel.
        libc: the C library and its version, as ``glibc 2.35``; empty where it is another.
        python: version.
        processors: that this process may run on.
    """

    root: Path
    run: Callable[[Sequence[str], float], Ran]
    version: Callable[[str], str | None]
    may_use: Callable[[Path], bool]
    disk: Callable[[Path], int | None]
    environment: Mapping[str, str]
    machine: str
    release: str
    libc: str
    python: str
    processors: int

    def path(self, name: str) -> Path:
        """An absolute path of the machine."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """Text of a file without white space around it; ``None`` where there is none, or it cannot be read."""
        try:
            with self.path(name).open("rb") as file:
                return file.read(_MOST).decode("utf-8", "replace").strip("\0 \t\r\n")
        except (OSError, ValueError):
            return None

    def number(self, name: str) -> int | None:
        """A file's text as a number."""
        text = self.read(name)
        return int(text) if text is not None and text.removeprefix("-").isdecimal() else None

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            return self.path(name).exists()
        except OSError:
            return False

    def find(self, pattern: str) -> list[str]:
        """Absolute paths of the machine that fit a pattern, in order."""
        try:
            return sorted(f"/{found.relative_to(self.root)}" for found in self.root.glob(pattern.lstrip("/")))
        except OSError:
            return []

    def run_first(self, programs: Sequence[str], *words: str) -> Ran:
        """Run the first of some programs that is there."""
        ran = Ran.not_installed(programs[0])
        for program in programs:
            ran = self.run((program, *words), PATIENCE)
            if ran.outcome != "not installed":
                break
        return ran

    def probe(self, *words: str) -> dict[str, Any]:
        """What one of ``probe.py``'s probes says, in a process of its own: what it loads may crash or hang.

        ``{"error": …}`` where it says nothing.
        """
        ran = self.run((sys.executable, str(_PROBES), *words), PROBE_PATIENCE)
        for line in reversed(ran.text.splitlines()):  # libraries print around it
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict):
                    return said
        if ran.code is None:
            return {"error": ran.trouble}
        died = f"killed by {_signal(-ran.code)}" if ran.code < 0 else f"ended with exit status {ran.code}"
        return {"error": f"{died} while it was loaded"}


def this_system() -> System:
    """The machine that this process runs on."""
    libc, version = platform.libc_ver()
    return System(
        root=Path("/"),
        run=run_program,
        version=installed_version,
        may_use=lambda path: os.access(path, os.R_OK | os.W_OK),
        disk=free_bytes,
        environment=os.environ,
        machine=platform.machine(),
        release=platform.release(),
        libc=f"{libc} {version}".strip(),
        python=platform.python_version(),
        processors=len(os.sched_getaffinity(0)),
    )


def installed_version(package: str) -> str | None:
    """Version of an installed package, by the name it is installed by."""
    try:
        found: str | None = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return found


def free_bytes(path: Path) -> int | None:
    """What may still be written where a path is, or will be."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def run_program(words: Sequence[str], patience: float) -> Ran:
    """Run a program without input, in a process group of its own that is killed when its time is up.

    Nobody waits for one that cannot even be killed, as where it hangs in a driver; and of one that prints without end
    the beginning is enough.
    """
    environment = {NO_REPORTS: "1", **os.environ, "LC_ALL": "C"}  # a probe loads ONNX Runtime
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    except FileNotFoundError:
        return Ran.not_installed(words[0])
    except (OSError, ValueError) as error:
        return Ran(None, "", f"{words[0]} cannot be run ({error})", "cannot be run")
    text, is_late = _read(process, time.monotonic() + patience)
    if not is_late:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return Ran(process.wait(_LAST_BREATH), text)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LAST_BREATH)
    return Ran(None, text, f"{Path(words[0]).name} gave no answer within {patience:.0f} s", "no answer")


def _read(process: subprocess.Popen[bytes], deadline: float) -> tuple[str, bool]:
    """What it prints until it closes its output, and whether it was late or had no end."""
    pipe = process.stdout
    if pipe is None:
        return "", False
    data = bytearray()
    with pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        is_open = True
        while is_open and len(data) < _MOST and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                piece = os.read(pipe.fileno(), 1 << 16)
                data += piece
                is_open = bool(piece)
    return data.decode("utf-8", "replace"), is_open


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
