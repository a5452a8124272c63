"""Boards and graphics cards: memory, bandwidth, compute capability, and the TensorRT that their system ships with.

Figures are NVIDIA's published ones. A gigabyte is taken as 10 ** 9 bytes: what 2 ** 30 would be more is about what
firmware and driver keep for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_deploy.engines.errors import OptionError

_GB = 10**9
_ORIN = "JetPack 6.1 and 6.2 (TensorRT 10.3)"
_THOR = "JetPack 7.0 (TensorRT 10.13)"
SYSTEM = 1 * _GB
"""Assumed for Linux without a desktop, where it shares its memory with the GPU."""


@dataclass(frozen=True)
class Board:
    """Something to run a model on.

    Attributes:
        name: on the command line.
        title: for people; of a card, as nvidia-smi names it, without the vendor.
        memory: bytes for the GPU, or for both where they are one; ``None`` where there is no GPU.
        host: bytes for the host; ``None`` where it is not known, and where memory is unified.
        is_unified: host and device share one memory.
        bandwidth: of ``memory``, bytes a second; ``None`` where it is not known.
        capability: compute capability, as ``sm87``; ``None`` where there is no GPU.
        tensorrt: release that its system comes with, as ``10.3``; ``None`` where one is installed as one likes.
        source: who says so.
    """

    name: str
    title: str
    memory: int | None
    host: int | None
    is_unified: bool
    bandwidth: float | None
    capability: str | None
    tensorrt: str | None
    source: str


def _jetson(name: str, title: str, gigabytes: float, bandwidth: float, source: str) -> Board:
    is_orin = "orin" in name
    capability, release, system = ("sm87", "10.3", _ORIN) if is_orin else ("sm110", "10.13", _THOR)
    memory = int(gigabytes * _GB) - SYSTEM
    source = f"NVIDIA, {source}; {system}; 1 GB is left to the system"
    return Board(name, f"Jetson {title}", memory, None, True, bandwidth * _GB, capability, release, source)


def _card(name: str, title: str, gigabytes: int, bandwidth: float, capability: str, source: str) -> Board:
    memory = gigabytes * _GB
    return Board(name, title, memory, None, False, bandwidth * _GB, capability, None, f"NVIDIA, {source}")


_GEFORCE_30 = "GeForce RTX 30 series specifications"
_GEFORCE_40 = "GeForce RTX 40 series specifications"
_GEFORCE_50 = "GeForce RTX 50 series specifications"

BOARDS: dict[str, Board] = {
    board.name: board
    for board in (
        _jetson("orin-nano-4gb", "Orin Nano 4GB", 4, 34, "Jetson Orin Nano series data sheet"),
        _jetson("orin-nano-8gb", "Orin Nano 8GB", 8, 68, "Jetson Orin Nano series data sheet, before the Super mode"),
        _jetson("orin-nano-8gb-super", "Orin Nano 8GB, Super mode", 8, 102, "Jetson Orin Nano Super data sheet"),
        _jetson("orin-nx-8gb", "Orin NX 8GB", 8, 102.4, "Jetson Orin NX series data sheet"),
        _jetson("orin-nx-16gb", "Orin NX 16GB", 16, 102.4, "Jetson Orin NX series data sheet"),
        _jetson("agx-orin-32gb", "AGX Orin 32GB", 32, 204.8, "Jetson AGX Orin series data sheet"),
        _jetson("agx-orin-64gb", "AGX Orin 64GB", 64, 204.8, "Jetson AGX Orin series data sheet"),
        _jetson("thor-64gb", "T4000", 64, 273, "Jetson Thor series specifications"),
        _jetson("thor-128gb", "T5000, AGX Thor", 128, 273, "Jetson Thor series specifications"),
        Board(
            "dgx-spark", "GB10 (DGX Spark)", 128 * _GB - SYSTEM, None, True, 273 * _GB, "sm121", None,
            "NVIDIA, DGX Spark hardware overview; 1 GB is left to the system",
        ),
        _card("rtx-3060-12gb", "GeForce RTX 3060", 12, 360, "sm86", _GEFORCE_30),
        _card("rtx-3090", "GeForce RTX 3090", 24, 936, "sm86", _GEFORCE_30),
        _card("rtx-4060", "GeForce RTX 4060", 8, 272, "sm89", _GEFORCE_40),
        _card("rtx-4070", "GeForce RTX 4070", 12, 504, "sm89", _GEFORCE_40),
        _card("rtx-4090", "GeForce RTX 4090", 24, 1008, "sm89", _GEFORCE_40),
        _card("rtx-5070", "GeForce RTX 5070", 12, 672, "sm120", _GEFORCE_50),
        _card("rtx-5080", "GeForce RTX 5080", 16, 960, "sm120", _GEFORCE_50),
        _card("rtx-5090", "GeForce RTX 5090", 32, 1792, "sm120", _GEFORCE_50),
        _card("rtx-a6000", "RTX A6000", 48, 768, "sm86", "RTX A6000 data sheet"),
        _card("rtx-6000-ada", "RTX 6000 Ada Generation", 48, 960, "sm89", "RTX 6000 Ada data sheet"),
        _card("t4", "Tesla T4", 16, 320, "sm75", "T4 data sheet"),
        _card("a10", "A10", 24, 600, "sm86", "A10 data sheet"),
        _card("l4", "L4", 24, 300, "sm89", "L4 data sheet"),
        _card("l40s", "L40S", 48, 864, "sm89", "L40S data sheet"),
        _card("a100-40gb", "A100-SXM4-40GB", 40, 1555, "sm80", "A100 data sheet"),
        _card("a100-80gb", "A100-SXM4-80GB", 80, 2039, "sm80", "A100 data sheet, SXM"),
        _card("a100-80gb-pcie", "A100 80GB PCIe", 80, 1935, "sm80", "A100 data sheet, PCIe"),
        _card("h100", "H100 80GB HBM3", 80, 3350, "sm90", "H100 data sheet, SXM"),
        _card("h100-pcie", "H100 PCIe", 80, 2000, "sm90", "H100 data sheet, PCIe"),
        _card("h100-nvl", "H100 NVL", 94, 3900, "sm90", "H100 data sheet, NVL"),
        _card("h200", "H200", 141, 4800, "sm90", "H200 data sheet"),
    )
}  # fmt: skip
"""By name."""


def find_board(name: str) -> Board:
    """The board of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in BOARDS:
        raise OptionError("board", f"want auto or one of {', '.join(BOARDS)}; got {name!r:.60}")
    return BOARDS[name]
