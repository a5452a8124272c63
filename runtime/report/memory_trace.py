"""What this process takes of the memory, over time, looked at by a thread. Linux."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from llava_deploy.runtime.report.record import MemorySample

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_USED = Path("/sys/fs/cgroup/memory.current")
_INTERVAL = 0.004  # seconds between two looks
_FIELDS = ("RssAnon", "RssFile", "VmSwap")


@contextmanager
def memory_trace(device_used: Callable[[], int] | None) -> Iterator[list[MemorySample]]:
    """Look while the block runs; the list grows, its times are readings of :func:`time.monotonic`.

    Where the system has no ``/proc/self/status`` it stays empty.

    Args:
        device_used: bytes in use on the GPU; ``None`` where there is none.
    """
    samples: list[MemorySample] = []
    before = 0 if device_used is None else device_used()
    over = threading.Event()

    def look() -> None:
        sizes = _sizes()
        if sizes is not None:
            device = None if device_used is None else device_used() - before
            samples.append(MemorySample(time.monotonic(), *sizes, device))

    def run() -> None:
        while not over.wait(_INTERVAL):
            look()

    look()
    thread = threading.Thread(target=run, name="memory trace", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
    look()


def available_memory() -> int | None:
    """Bytes that a process could have: what is free or easily freed, within what a container allows."""
    free = _kilobytes(_MEMINFO, ("MemAvailable",))
    if free is None:
        return None
    limit, used = _whole(_LIMIT), _whole(_USED)
    return free[0] if limit is None or used is None else max(0, min(free[0], limit - used))


def thinned(samples: Sequence[MemorySample], most: int) -> list[MemorySample]:
    """No more than so many: of neighbours the one with the most memory, and always the first and the last."""
    if len(samples) <= most:
        return list(samples)
    inner, parts = samples[1:-1], most - 2
    bounds = [part * len(inner) // parts for part in range(parts + 1)]
    kept = [max(inner[at:to], key=_weight) for at, to in pairwise(bounds)]
    return [samples[0], *kept, samples[-1]]


def _weight(sample: MemorySample) -> int:
    return sample.anonymous + sample.mapped + (0 if sample.device is None else sample.device)


def _sizes() -> tuple[int, int, int] | None:
    found = _kilobytes(_STATUS, _FIELDS)
    return None if found is None else (found[0], found[1], found[2])


def _kilobytes(path: Path, names: Sequence[str]) -> list[int] | None:
    """Fields of one of the kernel's files, in bytes; ``None`` where one is not there."""
    if not path.is_file():
        return None
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[name] = int(value.split()[0]) * 1024
    return [found[name] for name in names] if found.keys() >= {*names} else None


def _whole(path: Path) -> int | None:
    """The number in a file; ``None`` where there is no such file, or ``max`` in it."""
    text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
