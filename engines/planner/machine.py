"""What this machine has: its memory, and its GPU where NVIDIA's tools or the device tree name one. Linux."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

from llava_deploy.engines.host_memory import host_memory
from llava_deploy.engines.planner.boards import BOARDS, Board

_ROOT = Path("/")
_MEMINFO = "/proc/meminfo"
_MODEL = Path("/proc/device-tree/model")
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
_PATIENCE = 5  # seconds
_MIB = 1 << 20


def available_memory() -> int | None:
    """Bytes that a new process can have; see :attr:`~llava_deploy.engines.host_memory.HostMemory.available`."""
    return host_memory(_ROOT).available


def this_machine() -> Board:
    """This machine as a board. The host's memory is what is available now.

    The first GPU counts. Its bandwidth is that of the card of that name in the table, where there is one.
    """
    host = available_memory()
    jetson = _jetson()
    if jetson is not None:
        memory = jetson.memory if host is None else host
        return dataclasses.replace(jetson, name="auto", memory=memory, source=f"{_MODEL}, {_MEMINFO}; {jetson.source}")
    gpu = _gpu()
    if gpu is None:
        return Board(
            "auto", "this machine, without an NVIDIA GPU", None, host, False, None, None, None,
            f"{_MEMINFO}; nvidia-smi finds no GPU",
        )  # fmt: skip
    name, memory, capability = gpu
    known = _card_named(name)
    if known is not None and known.is_unified:
        return dataclasses.replace(known, name="auto", title=name, memory=host, source=f"{_MEMINFO}; {known.source}")
    bandwidth = None if known is None else known.bandwidth
    source = (
        "nvidia-smi; its memory's bandwidth is not in the table" if known is None else f"nvidia-smi; {known.source}"
    )
    return Board("auto", name, memory, host, False, bandwidth, capability, None, source)


def _jetson() -> Board | None:
    if not _MODEL.is_file():
        return None
    model = _MODEL.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    total = host_memory(_ROOT).total
    if "Jetson" not in model or total is None:
        return None
    family = next((kind for kind in ("Orin Nano", "Orin NX", "AGX Orin", "Thor") if kind in model), None)
    candidates = [b for b in BOARDS.values() if family is not None and family in b.title and b.memory is not None]
    # A module's system sees a little less than what is printed on it.
    fitting = [b for b in candidates if b.memory is not None and b.memory * 1.3 >= total]
    return min(fitting, key=lambda b: b.memory or 0, default=None)


def _gpu() -> tuple[str, int | None, str] | None:
    """Name, bytes (none on a Jetson) and capability of the first GPU."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"\s*([^,\n]+),\s*([^,\n]+),\s*(\d+)\.(\d)", done.stdout)
    if found is None:
        return None
    memory = int(found[2]) * _MIB if found[2].strip().isdigit() else None
    return found[1].strip(), memory, f"sm{found[3]}{found[4]}"


def _card_named(name: str) -> Board | None:
    """The card that nvidia-smi calls so."""
    return next((b for b in BOARDS.values() if b.title.partition(" (")[0] == name.removeprefix("NVIDIA ")), None)
