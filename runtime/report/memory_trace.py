"""What this process takes of the memory, over time, looked at by a thread. Linux."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from llava_deploy.engines.processor import read_fields
from llava_deploy.runtime.report.record import MemorySample

_STATUS = Path("/proc/self/status")
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
    """The fields in bytes; ``None`` where one is not there."""
    found = {name: int(value.split()[0]) * 1024 for name, value in read_fields(_STATUS) if name in _FIELDS}
    return (found["RssAnon"], found["RssFile"], found["VmSwap"]) if found.keys() >= {*_FIELDS} else None
