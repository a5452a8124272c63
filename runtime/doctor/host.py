"""The machine without its GPU: system, processor, power mode, heat. What cannot be had is ``None``.

Sources: NVIDIA's Jetson Linux Developer Guide, "Platform Power and Performance", for ``nvpmodel``, ``jetson_clocks``
and the counters of over-current events; Linux's ``driver-api/thermal``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llava_deploy.engines.processor import (
    count_physical_cores,
    has_int8_products,
    processor_name,
    vector_extensions,
)
from llava_deploy.runtime.doctor.system import System

_CPUINFO = "/proc/cpuinfo"


@dataclass(frozen=True)
class Host:
    """The system and the processor.

    Attributes:
        system: the distribution and its release.
        kernel: release and architecture.
        libc: the C library.
        container: what keeps this process in one, as ``docker``; ``None`` outside of any.
        board: model of the machine, where its device tree names one.
        l4t: release of Jetson Linux, as ``36.4.3``.
        jetpack: version of JetPack's package, where it is installed.
        processor: its name.
        cores: physical ones.
        processors: logical ones that this process may run on.
        extensions: what the processor has for products of matrices.
        int8_products: it multiplies 8-bit integers exactly.
    """

    system: str | None
    kernel: str
    libc: str
    container: str | None
    board: str | None
    l4t: str | None
    jetpack: str | None
    processor: str | None
    cores: int
    processors: int
    extensions: tuple[str, ...]
    int8_products: bool

    @property
    def architecture(self) -> str:
        """Of the processor, as ``x86_64``."""
        return self.kernel.rpartition(", ")[2]

    @property
    def is_jetson(self) -> bool:
        """Whether it is one of NVIDIA's boards with L4T."""
        return self.l4t is not None or (self.board is not None and "Jetson" in self.board)


@dataclass(frozen=True)
class Power:
    """How fast a board lets itself be.

    Attributes:
        mode: name of nvpmodel's mode; ``None`` where there is no nvpmodel, or it does not say.
        highest: name of the fastest mode.
        highest_id: its number, for ``nvpmodel -m``.
        clocks: lowest and highest frequency of a Jetson's GPU, in Hz; equal after ``jetson_clocks``.
        hottest: temperature of the hottest zone, in degrees Celsius, and the zone's name.
        throttled: zones that are at or above the temperature from which the kernel slows the machine down.
        over_current: times since the start that a Jetson was slowed down since it drew too much.
        trouble: why the mode is not known, where there is an nvpmodel.
    """

    mode: str | None
    highest: str | None
    highest_id: int | None
    clocks: tuple[int, int] | None
    hottest: tuple[float, str] | None
    throttled: tuple[str, ...]
    over_current: int
    trouble: str = ""


def look_at_host(system: System) -> Host:
    """What the system and the processor are."""
    cpuinfo = system.path(_CPUINFO)
    release = system.read("/etc/os-release") or ""
    title = re.search(r'^PRETTY_NAME="?([^"\n]*)', release, re.MULTILINE)
    return Host(
        system=title[1] if title else None,
        kernel=f"{system.release}, {system.machine}",
        libc=system.libc,
        container=_container(system),
        board=system.read("/proc/device-tree/model"),
        l4t=_l4t(system.read("/etc/nv_tegra_release")),
        jetpack=_jetpack(system),
        processor=processor_name(cpuinfo),
        cores=count_physical_cores(cpuinfo, system.processors),
        processors=system.processors,
        extensions=vector_extensions(cpuinfo),
        int8_products=has_int8_products(cpuinfo, system.machine),
    )


def _container(system: System) -> str | None:
    if system.exists("/run/.containerenv"):
        return "podman"
    if system.exists("/.dockerenv"):
        return "docker"
    named = system.read("/run/systemd/container") or system.environment.get("container")
    if named:
        return named
    groups = system.read("/proc/1/cgroup") or ""
    return next((kind for kind in ("kubepods", "docker", "lxc", "containerd") if kind in groups), None)


def _l4t(text: str | None) -> str | None:
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text or "")
    return f"{found[1]}.{found[2]}" if found else None


def _jetpack(system: System) -> str | None:
    if not system.exists("/etc/nv_tegra_release"):
        return None
    ran = system.run_first(("dpkg-query",), "-W", "-f", "${Version}", "nvidia-jetpack")
    return ran.text.strip() if ran.code == 0 and re.match(r"\d", ran.text.strip()) else None


def look_at_power(system: System) -> Power:
    """The power mode of a Jetson, its clocks, and what is too hot on any machine."""
    modes = {
        int(number): name
        for number, name in re.findall(
            r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", system.read("/etc/nvpmodel.conf") or "", re.MULTILINE
        )
    }
    mode, trouble = _mode(system, modes)
    highest = max(modes, key=lambda number: _speed(modes[number]), default=None)
    zones = [_zone(system, zone) for zone in system.find("/sys/class/thermal/thermal_zone*")]
    known = [(degrees, name, limit) for degrees, name, limit in zones if degrees is not None]
    hottest = max(known, default=None)
    events = [system.number(path) for path in system.find("/sys/class/hwmon/hwmon*/oc*_event_cnt")]
    return Power(
        mode=mode,
        highest=None if highest is None else modes[highest],
        highest_id=highest,
        clocks=_clocks(system),
        hottest=None if hottest is None else hottest[:2],
        throttled=tuple(name for degrees, name, limit in known if limit is not None and degrees >= limit),
        over_current=sum(count for count in events if count is not None),
        trouble=trouble,
    )


def _speed(name: str) -> tuple[bool, bool, int]:
    """Grows with how fast a mode is: without a cap of power at all, and else by its watts."""
    watts = re.search(r"(\d+)W", name)
    return name.startswith("MAXN"), "SUPER" in name, int(watts[1]) if watts else 0


def _mode(system: System, modes: dict[int, str]) -> tuple[str | None, str]:
    ran = system.run_first(("nvpmodel", "/usr/sbin/nvpmodel"), "-q")
    named = re.search(r"NV Power Mode:\s*(\S+)", ran.text)
    if ran.code == 0 and named:
        return named[1], ""
    kept = re.match(r"pmode:(\d+)", system.read("/var/lib/nvpmodel/status") or "")
    if kept and int(kept[1]) in modes:
        return modes[int(kept[1])], ""
    if ran.code is None:
        return None, "" if ran.outcome == "not installed" else ran.trouble
    return None, f"nvpmodel -q says no mode: {' '.join(ran.text.split())[:120]!r}"


def _clocks(system: System) -> tuple[int, int] | None:
    for directory in (*system.find("/sys/class/devfreq/*gpu*"), *system.find("/sys/class/devfreq/*.g[ab]*")):
        low, high = system.number(f"{directory}/min_freq"), system.number(f"{directory}/max_freq")
        if low is not None and high is not None:
            return low, high
    return None


def _zone(system: System, zone: str) -> tuple[float | None, str, float | None]:
    """Degrees, name, and the lowest temperature from which the kernel slows things down."""
    heat = system.number(f"{zone}/temp")
    limits = []
    for kind in system.find(f"{zone}/trip_point_*_type"):
        at = system.number(f"{kind.removesuffix('_type')}_temp")
        if system.read(kind) in ("passive", "hot", "critical") and at is not None and at > 0:
            limits.append(at / 1000)
    name = system.read(f"{zone}/type") or zone.rpartition("/")[2]
    return None if heat is None else heat / 1000, name, min(limits, default=None)
