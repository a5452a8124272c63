"""What the machine has that this runs on. Linux; elsewhere it says that it does not know."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_memory() -> int | None:
    """Bytes that a new process can have without others losing theirs; ``None`` where the system does not say."""
    return _meminfo("MemAvailable")


def total_memory() -> int | None:
    """Bytes of the host's memory; ``None`` where the system does not say."""
    return _meminfo("MemTotal")


def _meminfo(key: str) -> int | None:
    if not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None
