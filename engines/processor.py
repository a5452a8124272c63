"""What this machine's processor can do, as far as a choice of graphs depends on it. Standard library only."""

from __future__ import annotations

import platform
from pathlib import Path

_ARM = ("aarch64", "arm64")
_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})


def has_int8_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of unsigned and signed 8-bit integers are exact.

    On x86 it takes VNNI: what comes before it adds two products in 16 bits, where they saturate (Intel's intrinsics
    guide, ``vpmaddubsw`` beside ``vpdpbusd``). ARM's instructions widen first. Where the system does not tell, no.
    """
    if platform.machine().lower() in _ARM:
        return True
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and not _FLAGS.isdisjoint(line.split()) for line in lines)
