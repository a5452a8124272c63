"""The largest memory in use on the GPU while a block runs, by all processes, over what was in use before it."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.01


@dataclass
class Peak:
    """Bytes; ``None`` where the machine has no GPU."""

    device: int | None = None


def used_bytes() -> int | None:
    """Bytes in use on the current GPU; ``None`` where there is none, or cuda-python is not installed."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    error, free, total = runtime.cudaMemGetInfo()
    return total - free if error == runtime.cudaError_t.cudaSuccess else None


def allow_during_capture() -> None:
    """Have this thread's calls break no capture of another thread's, as those of CUDA graphs are by default."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return
    runtime.cudaThreadExchangeStreamCaptureMode(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)


@contextmanager
def device_peak(measure: Callable[[], int | None] = used_bytes) -> Iterator[Peak]:
    """Sample what ``measure`` gives until the block ends; do not time anything inside, as asking takes a lock."""
    before = measure()
    peak = Peak(None if before is None else 0)
    over = threading.Event()

    def sample() -> None:
        if before is not None:
            allow_during_capture()
        while before is not None:
            used = measure()
            if used is not None:
                peak.device = max(peak.device or 0, used - before)
            if over.wait(INTERVAL_S):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def host_peak() -> int | None:
    """Largest resident set of this process until now, in bytes; mapped files count."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
