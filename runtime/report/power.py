"""Power over time, where the board tells it: a GPU's tools, a Jetson's sensors, a processor's counters. Linux.

Each source is read by a thread of its own, which stamps what it reads with :func:`time.monotonic`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from llava_deploy.runtime.report.power_files import PowerFiles, ina_watts, rapl_watts, whole_board

_INTERVAL = 0.05  # seconds between two readings of a file
_PATIENCE = 3.0  # seconds for a tool's first reading
_ENDING = 2.0  # seconds for a tool to end when it is asked to
_MOST = 10_000.0  # watts: what is more is no reading

_COVERED = 0.8
"""Of the time that readings have to tell of: the first and the last are not at its ends."""

_TEGRASTATS = ("tegrastats", "--interval", "100")
_NVIDIA_SMI = ("nvidia-smi", "--id=0", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "--loop-ms=100")


@dataclass(frozen=True)
class PowerReading:
    """Mean power since the reading before it, or now, at a time of :func:`time.monotonic`."""

    at: float
    watts: float


class PowerMeter(Protocol):
    """A source that is being read."""

    name: str

    def stop(self) -> list[PowerReading]:
        """End it; everything that was read, in order."""


def open_power(files: PowerFiles, *, on_gpu: bool) -> tuple[PowerMeter | None, tuple[str, ...]]:
    """The first source that tells something; and why those before it do not, a sentence each.

    A board's own sensors come first, as they count everything; then the GPU's where that runs the model, or else the
    processor's.
    """
    sources: list[Callable[[], PowerMeter]] = [lambda: _polled("INA3221", ina_watts(files)), _open_tegrastats]
    sources.append(_open_nvidia_smi if on_gpu else lambda: _polled("RAPL", rapl_watts(files)))
    refusals: list[str] = []
    for source in sources:
        try:
            return source(), tuple(refusals)
        except OSError as error:
            refusals.append(str(error))
    return None, tuple(refusals)


def mean_watts(readings: Sequence[PowerReading], began: float, ended: float) -> tuple[float, int] | None:
    """Mean power between two times, and the readings that it is of; ``None`` where none tells of all of it.

    A reading stands for the time since the one before it.
    """
    joules, covered, used = 0.0, 0.0, 0
    for before, now in pairwise(readings):
        seconds = min(now.at, ended) - max(before.at, began)
        if seconds > 0:
            joules += seconds * now.watts
            covered += seconds
            used += 1
    if not used or covered < _COVERED * (ended - began):
        return None
    return joules / covered, used


class PolledPower:
    """A function that is asked again and again; ``None`` from it is no reading."""

    def __init__(self, name: str, read: Callable[[], float | None]) -> None:
        self.name = name
        self._read = read
        self._over = threading.Event()
        self._readings: list[PowerReading] = []
        self._thread = threading.Thread(target=self._run, name="power meter", daemon=True)
        self._thread.start()

    def stop(self) -> list[PowerReading]:
        """End it; everything that was read."""
        self._over.set()
        self._thread.join()
        return list(self._readings)

    def _run(self) -> None:
        while True:
            try:
                watts = self._read()
            except (OSError, ValueError):  # a sensor that is busy, or has gone
                watts = None
            if watts is not None and 0 <= watts < _MOST:
                self._readings.append(PowerReading(time.monotonic(), watts))
            if self._over.wait(_INTERVAL):
                return


class StreamedPower:
    """A tool that prints a line for each reading."""

    def __init__(self, name: str, command: Sequence[str], watts_of: Callable[[str], float | None]) -> None:
        """Start it and wait for its first reading.

        Raises:
            OSError: it is not there, or gives none; the message says which.
        """
        path = shutil.which(command[0])
        if path is None:
            raise OSError(f"{command[0]} is not there")
        self.name = name
        self._watts_of = watts_of
        self._readings: list[PowerReading] = []
        self._first = threading.Event()
        self._process = subprocess.Popen(
            [path, *command[1:]],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace",
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="power meter", daemon=True)
        self._thread.start()
        self._first.wait(_PATIENCE)
        if not self._readings:
            self.stop()
            raise OSError(f"{command[0]} tells no power")

    def stop(self) -> list[PowerReading]:
        """End the tool; everything that was read."""
        self._process.terminate()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(_ENDING)  # a child of the tool's may hold the pipe open
        return list(self._readings)

    def _run(self) -> None:
        lines = self._process.stdout
        for line in lines if lines is not None else ():
            watts = self._watts_of(line)
            if watts is not None and 0 <= watts < _MOST:
                self._readings.append(PowerReading(time.monotonic(), watts))
                self._first.set()
        self._first.set()  # nothing more comes


def tegrastats_watts(line: str) -> float | None:
    """What the whole board takes, of one of tegrastats' lines; milliwatts now, before the slash and the mean."""
    rails = {name: float(value) / 1e3 for name, value in re.findall(r"\b([A-Z][A-Z0-9_]+) (\d+)(?:mW)?/\d+", line)}
    wanted = whole_board(rails)
    return None if wanted is None else sum(rails[name] for name in wanted)


def nvidia_smi_watts(line: str) -> float | None:
    """One of nvidia-smi's lines; ``[N/A]`` is none."""
    try:
        return float(line)
    except ValueError:
        return None


def _polled(name: str, found: tuple[str, Callable[[], float | None]]) -> PowerMeter:
    what, read = found
    return PolledPower(f"{name}: {what}", read)


def _open_tegrastats() -> PowerMeter:
    return StreamedPower("tegrastats: the whole board", _TEGRASTATS, tegrastats_watts)


def _open_nvidia_smi() -> PowerMeter:
    return StreamedPower("nvidia-smi: the GPU's board, without the host", _NVIDIA_SMI, nvidia_smi_watts)
