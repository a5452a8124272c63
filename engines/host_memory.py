"""How much memory this host has, and how much of it can be had within the limits of control groups. Linux.

Source: Linux's ``admin-guide/cgroup-v2.rst`` and ``admin-guide/cgroup-v1/memory.rst``. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llava_deploy.engines.processor import read_fields

_GROUPS = PurePosixPath("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # bytes: what version 1 of control groups says where there is none is about 2 ** 63
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


@dataclass(frozen=True)
class HostMemory:
    """Bytes; ``None`` is what the system does not say.

    Attributes:
        total: of the machine.
        available: to a new process without others losing theirs, within the control group's limit.
        swap: that is free, of all swap.
        swap_total: all of it.
        limit: of the control group, where that is less than the machine has.
    """

    total: int | None
    available: int | None
    swap: int | None
    swap_total: int | None
    limit: int | None


def host_memory(root: Path = Path("/")) -> HostMemory:
    """How much memory there is, and is to be had; the machine's files are below ``root``."""
    known = {}
    for name, value in read_fields(root / "proc/meminfo"):
        number = value.partition(" ")[0]
        if number.isdecimal():
            known[name] = int(number) * 1024
    total, available = known.get("MemTotal"), known.get("MemAvailable")
    limits = _limits(root)
    limit = min((most for most, _ in limits), default=None)
    left = min((most - used for most, used in limits), default=None)
    if limit is not None and total is not None and limit >= total:
        limit = None
    if left is not None and available is not None:
        available = max(0, min(available, left))
    return HostMemory(total, available, known.get("SwapFree"), known.get("SwapTotal"), limit)


def _limits(root: Path) -> list[tuple[int, int]]:
    """Limits of the control groups that this process is in, each with what is used of it and cannot be taken back."""
    found = []
    for group in _groups(root):
        for most, used in _FILES:
            limit, usage = _number(group / most), _number(group / used)
            if limit is not None and 0 < limit < _NO_LIMIT:
                files = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
                cached = int(files[1]) if files else 0
                found.append((limit, 0 if usage is None else max(0, usage - cached)))
    return found


def _groups(root: Path) -> list[Path]:
    places = [_GROUPS, _GROUPS / "memory"]  # in a container its own group is the root
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        base = _GROUPS / "memory" if "memory" in controllers.split(",") else _GROUPS
        if path.startswith("/") and ".." not in path and (number == "0" or base != _GROUPS):
            own = PurePosixPath(path.lstrip("/"))
            places += [base / each for each in (own, *own.parents)]
    return [root / place.relative_to("/") for place in dict.fromkeys(places)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None
