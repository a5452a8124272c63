"""How fast memory is read: the host's by several threads, a GPU's by copying within it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from llava_deploy.runtime.bench.report import BandwidthKind, Machine

if TYPE_CHECKING:
    from llava_deploy.runtime.tensorrt.cuda import Device

_HOST_BUFFER = 512 << 20
_CACHES = 8
"""Of the last level that the buffer is as large as, at least: a processor may have several."""

_SHARE = 8
"""No more than one of so many parts of the machine's memory is taken."""

_DEVICE_BUFFER = 256 << 20
_REPEATS = 4
_WARM_UPS = 1


@dataclass(frozen=True)
class Meter:
    """Measures one memory's bandwidth.

    Attributes:
        kind: which memory, and how.
        threads: that read.
        nbytes: of the buffer.
        read: gives some measurements, bytes a second.
    """

    kind: BandwidthKind
    threads: int
    nbytes: int
    read: Callable[[], Sequence[float]]


def host_meter(threads: int, machine: Machine) -> Meter:
    """Of the host's memory, read by so many threads."""
    cache = 0 if machine.last_level_cache is None else machine.last_level_cache
    nbytes = max(_HOST_BUFFER, _CACHES * cache)
    if machine.memory is not None:
        nbytes = min(nbytes, machine.memory // _SHARE)
    return Meter("host read", threads, nbytes, partial(read_bandwidth, threads, nbytes, _REPEATS))


def device_meter(device: Device) -> Meter:
    """Of a GPU's memory."""
    return Meter("device copy", 1, _DEVICE_BUFFER, partial(copy_bandwidth, device, _DEVICE_BUFFER, _REPEATS))


def read_bandwidth(threads: int, nbytes: int, repeats: int) -> list[float]:
    """Bytes a second that ``threads`` read at once, each a part of its own of ``nbytes``, ``repeats`` times.

    Each sums its part as 64-bit integers, which takes less time than the memory does; NumPy lets the others run
    meanwhile. The time goes from the first that begins to the last that ends. A part is written first by the thread
    that reads it, so that it lies in the memory that is near to it.
    """
    values = max(1, nbytes // threads // 8)
    turn = threading.Barrier(threads)

    def read() -> list[tuple[float, float]]:
        part = np.ones(values, np.uint64)
        spans = []
        for _ in range(_WARM_UPS + repeats):
            turn.wait()
            began = time.perf_counter()
            np.add.reduce(part)
            spans.append((began, time.perf_counter()))
        return spans

    with ThreadPoolExecutor(threads) as pool:
        spans = [future.result() for future in [pool.submit(read) for _ in range(threads)]]
    return [8 * values * threads / _elapsed(together) for together in list(zip(*spans, strict=True))[_WARM_UPS:]]


def copy_bandwidth(device: Device, nbytes: int, repeats: int) -> list[float]:
    """Bytes a second that a GPU reads and writes as it copies ``nbytes`` within its memory, ``repeats`` times.

    Raises:
        DeviceMemoryError: no room for two such buffers.
    """
    source, to = (device.allocate(nbytes, "measuring the memory's bandwidth") for _ in range(2))
    device.clear(source.address, nbytes)
    found = []
    for _ in range(_WARM_UPS + repeats):
        began = device.mark()
        device.copy(to.address, source.address, nbytes)
        found.append(2 * nbytes / device.mark().since(began))
    return found[_WARM_UPS:]


def _elapsed(spans: Sequence[tuple[float, float]]) -> float:
    return max(ended for _, ended in spans) - min(began for began, _ in spans)
