"""Peaks of this process's memory, phase by phase, looked at by a thread. Linux."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_deploy.runtime.bench.report import Memory

_STATUS = Path("/proc/self/status")
_INTERVAL = 0.002  # seconds between two looks


@contextmanager
def peak_watch(device_used: Callable[[], int] | None) -> Iterator[PeakWatch]:
    """Watch while the block runs; nothing should be timed meanwhile.

    Where the system has no ``/proc/self/status``, there are no peaks.

    Args:
        device_used: bytes in use on the GPU; ``None`` where there is none.
    """
    watch = PeakWatch(device_used)
    watch.phase("before loading")
    over = threading.Event()

    def look() -> None:
        while not over.wait(_INTERVAL):
            watch.look()

    thread = threading.Thread(target=look, name="memory watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()
    watch.look()


class PeakWatch:
    """The peaks of each phase so far."""

    def __init__(self, device_used: Callable[[], int] | None) -> None:
        self._device_used = device_used
        self._before = device_used() if device_used is not None else 0
        self._peaks: list[Memory] = []
        self._lock = threading.Lock()

    @property
    def peaks(self) -> tuple[Memory, ...]:
        """Of every phase so far."""
        with self._lock:
            return tuple(self._peaks)

    def phase(self, name: str) -> None:
        """Something else is done from here on."""
        self.look()
        with self._lock:
            found = self._now(name)
            self._peaks += [] if found is None else [found]

    def look(self) -> None:
        """Take what is in use now into account."""
        with self._lock:
            if not self._peaks:
                return
            last = self._peaks[-1]
            now = self._now(last.phase)
            if now is not None:
                device = None if now.device is None or last.device is None else max(now.device, last.device)
                self._peaks[-1] = Memory(
                    last.phase, max(now.anonymous, last.anonymous), max(now.mapped, last.mapped), device
                )

    def _now(self, phase: str) -> Memory | None:
        if not _STATUS.is_file():
            return None
        sizes = {}
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                sizes[name] = int(value.split()[0]) * 1024
        if len(sizes) < 2:
            return None
        device = None if self._device_used is None else self._device_used() - self._before
        return Memory(phase, sizes["RssAnon"], sizes["RssFile"], device)
