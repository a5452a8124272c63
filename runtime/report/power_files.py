"""Files of the kernel that tell power: a Jetson's INA3221 sensors, and RAPL's energy counters of a processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Read = Callable[[], "float | None"]
"""Watts now, or since the last call; ``None`` where there is nothing to say yet."""

_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN")
_AGX_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""What a board without one rail for everything takes, none of them fed by another."""


@dataclass(frozen=True)
class PowerFiles:
    """Where the kernel keeps them."""

    hwmon: Path = Path("/sys/class/hwmon")
    powercap: Path = Path("/sys/class/powercap")


def whole_board(rails: Iterable[str]) -> tuple[str, ...] | None:
    """Those of a Jetson's rails that add up to what its board takes; ``None`` where they are not all there."""
    known = {*rails}
    candidates = (*((name,) for name in _WHOLE_BOARD), _AGX_RAILS)
    return next((wanted for wanted in candidates if known.issuperset(wanted)), None)


def ina_watts(files: PowerFiles) -> tuple[str, Read]:
    """The sensors of a Jetson: volts times amperes of the rail that feeds the whole board, or of several.

    Returns:
        The rails, and what reads them.

    Raises:
        OSError: there are none, or they cannot be read; the message says which.
    """
    rails: dict[str, tuple[Path, Path]] = {}
    for chip in sorted(files.hwmon.glob("hwmon*")):
        if _text(chip / "name") != "ina3221":
            continue
        for label in sorted(chip.glob("in*_label")):
            number = label.name.removeprefix("in").removesuffix("_label")
            rails[_text(label)] = (chip / f"in{number}_input", chip / f"curr{number}_input")
    wanted = whole_board(rails)
    if wanted is None:
        raise OSError("no sensors of a Jetson board")

    def watts() -> float:
        return sum(_number(volts) * _number(amperes) / 1e6 for volts, amperes in map(rails.__getitem__, wanted))

    _tried(watts, "the board's sensors")
    return f"the whole board, by {', '.join(wanted)}", watts


def rapl_watts(files: PowerFiles) -> tuple[str, Read]:
    """A processor's counters of energy: every package, and the memory where that counts of its own.

    Returns:
        The zones, and what reads them: the mean power since the last call.

    Raises:
        OSError: there are none, or they cannot be read: since 2020 only root may; the message says which.
    """
    zones: dict[str, tuple[Path, int]] = {}
    for place in sorted(files.powercap.glob("intel-rapl:*")):  # AMD's processors, too
        name = _text(place / "name")
        if name.startswith("package") or name == "dram":
            zones[f"{name} ({place.name})"] = (place / "energy_uj", _range(place))
    if not zones:
        raise OSError("the processor has no energy counters here (RAPL)")

    def read() -> dict[str, int]:
        return {name: _number(path) for name, (path, _) in zones.items()}

    _tried(read, "the processor's energy counters (RAPL)")
    before, then = read(), time.monotonic()

    def watts() -> float | None:
        nonlocal before, then
        found, now = read(), time.monotonic()
        if now <= then:
            return None
        # A counter that has come to its end begins again at 0.
        joules = sum((found[name] - before[name]) % zones[name][1] for name in zones) / 1e6
        elapsed, before, then = now - then, found, now
        return joules / elapsed

    return ", ".join(zones), watts


def _tried(read: Callable[[], object], what: str) -> None:
    try:
        read()
    except PermissionError as error:
        raise OSError(f"{what} are there, but only root may read them") from error
    except (OSError, ValueError) as error:
        raise OSError(f"{what} are there, but cannot be read ({error})") from error


def _range(place: Path) -> int:
    """The counter's values, from 0 on: one more than the greatest."""
    try:
        return _number(place / "max_energy_range_uj") + 1
    except (OSError, ValueError):
        return 1 << 32  # of the register, in units that are never less than a microjoule


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
