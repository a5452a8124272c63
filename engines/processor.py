"""What this machine's processor is and can do, which a choice of graphs depends on. Standard library only."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_ARM = ("aarch64", "arm64")
_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
_SPOKEN = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "asimdhp": "NEON fp16",
    "asimddp": "NEON dot products",
    "i8mm": "int8 matrices",
    "sve": "SVE",
}
"""Of the flags that matter to products of matrices, what people call them."""

_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
    "0xd83": "Neoverse V3AE",
}
"""Of ARM's own cores, which Linux lists without their names (its ``arch/arm64/include/asm/cputype.h``)."""


def read_fields(path: Path) -> list[tuple[str, str]]:
    """Names and values of a file of ``name: value`` lines, as Linux gives them; none where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]


def processor_name(cpuinfo: Path = CPUINFO) -> str | None:
    """What it is called; ``None`` where the system does not say."""
    fields = read_fields(cpuinfo)
    named = [value for name, value in fields if name == "model name"]
    if named:
        return named[0]
    parts = {_ARM_PARTS[value]: None for name, value in fields if name == "CPU part" and value in _ARM_PARTS}
    return f"ARM {' and '.join(parts)}" if parts else None


def count_physical_cores(cpuinfo: Path, allowed: int) -> int:
    """Cores that ONNX Runtime starts a thread on, of ``allowed`` logical ones, which it is where nothing is known."""
    fields = read_fields(cpuinfo)
    sockets = [value for name, value in fields if name == "physical id"]
    cores = [value for name, value in fields if name == "core id"]
    if not cores or len(sockets) != len(cores):
        return allowed
    return min(allowed, len(set(zip(sockets, cores, strict=True))))


def vector_extensions(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """What it has for products of matrices, in words."""
    flags = next((value.split() for name, value in read_fields(cpuinfo) if name in ("flags", "Features")), [])
    return tuple(words for flag, words in _SPOKEN.items() if flag in flags)


def has_int8_products(cpuinfo: Path = CPUINFO, machine: str | None = None) -> bool:
    """Whether products of unsigned and signed 8-bit integers are exact.

    On x86 it takes VNNI: what comes before it adds two products in 16 bits, where they saturate (Intel's intrinsics
    guide, ``vpmaddubsw`` beside ``vpdpbusd``). ARM's instructions widen first. Where the system does not tell, no.

    Args:
        cpuinfo: what Linux says of it.
        machine: its architecture; this one's.
    """
    if (platform.machine() if machine is None else machine).lower() in _ARM:
        return True
    return any(name == "flags" and not _FLAGS.isdisjoint(value.split()) for name, value in read_fields(cpuinfo))
