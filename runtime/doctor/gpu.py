"""NVIDIA's GPUs: what the bus, the kernel, nvidia-smi and CUDA's driver library say of them, each where it can.

Sources: NVML's API reference, ``NvmlClocksEventReasons``; ``nvidia-smi --help-query-gpu``; CUDA's driver API.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llava_deploy.runtime.doctor.system import Ran, System

_NVIDIA = "0x10de"
_DISPLAYS = ("0x03", "0x12")
"""Classes of PCI devices: display controllers, processing accelerators."""

_SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")
_FIELDS = (
    *("index", "uuid", "name", "driver_version", "compute_cap", "memory.total", "memory.free", "power.limit"),
    *("persistence_mode", "compute_mode", "mig.mode.current", "temperature.gpu"),
)
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # newer drivers' name first
_SLOWED = {0x20: "too hot", 0x40: "too hot", 0x80: "the power supply says so"}
"""Reasons that nobody asked for: software and hardware thermal slowdown, and the power brake."""

_MIB = 1 << 20
_TOP_NODES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
"""What a PC's driver makes, what a Jetson's, and what Windows gives to its Linux."""


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``None`` is what nobody says.

    Attributes:
        name: as its driver says.
        capability: compute capability, as ``sm89``.
        total: bytes of its memory; the host's, where they share it.
        free: of them.
        is_unified: it shares the host's memory.
        usable: CUDA shows it to this process, and a context can be made on it.
        trouble: why not.
        power_limit: watts.
        persistence: the driver stays awake when nobody uses it.
        compute_mode: as nvidia-smi calls it: Default, Exclusive_Process, Prohibited.
        mig: it is divided into instances.
        celsius: its temperature.
        slowed: why it is slower than it could be at the moment.
        others: processes that compute on it, and the bytes that they use, as far as they can be seen.
    """

    name: str
    capability: str | None
    total: int | None
    free: int | None
    is_unified: bool
    usable: bool
    trouble: str = ""
    power_limit: float | None = None
    persistence: bool | None = None
    compute_mode: str | None = None
    mig: bool | None = None
    celsius: int | None = None
    slowed: tuple[str, ...] = ()
    others: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Graphics:
    """Everything about NVIDIA's GPUs.

    Attributes:
        cards: on the PCI bus, whether somebody drives them or not.
        nouveau: the free driver, which has no CUDA, is loaded.
        driver: version of NVIDIA's.
        nodes: the driver's device files.
        denied: those that this user may not use.
        library: CUDA's driver library can be loaded.
        cuda: that the driver is for, as ``12.4``.
        code: CUDA's error where it does not start.
        trouble: what CUDA says where no GPU can be used.
        smi_trouble: what is wrong with nvidia-smi; empty where it answers, and where there is nothing to answer for.
        gpus: in CUDA's order; the runtime takes the first. Behind them those that CUDA does not show.
    """

    cards: int
    nouveau: bool
    driver: str | None
    nodes: tuple[str, ...]
    denied: tuple[str, ...]
    library: bool
    cuda: str | None
    code: int | None
    trouble: str
    smi_trouble: str
    gpus: tuple[Gpu, ...]

    @property
    def first(self) -> Gpu | None:
        """The GPU that the runtime takes."""
        return next((gpu for gpu in self.gpus if gpu.usable), None)


def look_at_graphics(system: System) -> Graphics:
    """What GPUs there are, and whether they can be used."""
    version = system.read("/proc/driver/nvidia/version") or ""
    kernel = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", version)
    expects_smi = kernel is not None and not system.exists("/etc/nv_tegra_release")
    rows, smi_trouble = _smi(system, expected=expects_smi)
    driver = kernel[1] if kernel else next((row["driver_version"] for row in rows), None)
    nodes = tuple(path for path in (*system.find("/dev/nvidia[0-9]*"), *_TOP_NODES) if system.exists(path))
    cuda = system.probe("cuda")
    cards = sum(_is_card(system, path) for path in system.find("/sys/bus/pci/devices/*"))
    number = cuda.get("cuda")
    return Graphics(
        cards=cards,
        nouveau=system.exists("/sys/module/nouveau"),
        driver=driver,
        nodes=nodes,
        denied=tuple(path for path in nodes if not system.may_use(system.path(path))),
        library=bool(cuda.get("loaded")),
        cuda=f"{number // 1000}.{number % 1000 // 10}" if isinstance(number, int) and number else None,
        code=cuda.get("code"),
        trouble=str(cuda.get("error", "")),
        smi_trouble=smi_trouble,
        gpus=tuple(_merged(cuda.get("devices", []), rows)),
    )


def _is_card(system: System, directory: str) -> bool:
    kind = system.read(f"{directory}/class") or ""
    return system.read(f"{directory}/vendor") == _NVIDIA and kind.startswith(_DISPLAYS)


def _smi(system: System, *, expected: bool) -> tuple[list[dict[str, str]], str]:
    """A row of fields for each GPU, and what is wrong with nvidia-smi; not to have it is, where it is expected."""
    ran = _query(system, "gpu", _FIELDS)
    rows = _rows(ran, _FIELDS)
    if not rows:
        if ran.outcome == "not installed" and not expected:
            return [], ""
        said = ran.trouble or f"nvidia-smi: {' '.join(ran.text.split())[:160] or 'no output'}"
        return [], said
    for reason in _REASONS:
        slowed = _rows(_query(system, "gpu", ("uuid", reason)), ("uuid", reason))
        if slowed:
            by_uuid = {row["uuid"]: row[reason] for row in slowed}
            rows = [{**row, "slowed": by_uuid.get(row["uuid"], "")} for row in rows]
            break
    fields = ("gpu_uuid", "pid", "used_gpu_memory")
    apps = _rows(_query(system, "compute-apps", fields), fields)
    for row in rows:
        used = [_number(app["used_gpu_memory"]) for app in apps if app["gpu_uuid"] == row["uuid"]]
        row["others"] = str(len(used))
        row["others_mib"] = str(sum(int(each) for each in used if each is not None))
    return rows, ""


def _query(system: System, what: str, fields: tuple[str, ...]) -> Ran:
    return system.run_first(_SMI, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits")


def _rows(ran: Ran, fields: tuple[str, ...]) -> list[dict[str, str]]:
    """Lines that have as many fields as were asked for, and a GPU's identity among them; nothing else is believed."""
    if ran.code != 0:
        return []
    lines = [[field.strip() for field in line.split(",")] for line in ran.text.splitlines()]
    rows = [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]
    return [row for row in rows if any(value.startswith(("GPU-", "MIG-")) for value in row.values())]


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _merged(devices: list[Mapping[str, Any]], rows: list[dict[str, str]]) -> list[Gpu]:
    """GPUs that CUDA shows, with what nvidia-smi says of each; then those that only nvidia-smi shows."""
    left, found = list(rows), []
    for device in devices:
        row = next((row for row in left if row["uuid"].endswith(str(device["uuid"]))), None)
        if row is None:  # of an instance of a divided GPU, nvidia-smi knows the whole one's identity
            row = next((row for row in left if str(device["name"]).startswith(row["name"])), None)
        if row in left:
            left.remove(row)
        found.append(_gpu(device, row))
    return found + [_gpu(None, row) for row in left]


def _gpu(device: Mapping[str, Any] | None, row: Mapping[str, str] | None) -> Gpu:
    told = _told({} if row is None else row)
    if device is None:
        return told
    error = device["error"]
    return replace(
        told,
        name=str(device["name"]),
        capability=str(device["capability"]),
        total=told.total if device["total"] is None else device["total"],
        free=told.free if device["free"] is None else device["free"],
        is_unified=bool(device["integrated"]),
        usable=error is None,
        trouble="" if error is None else str(error),
    )


def _told(row: Mapping[str, str]) -> Gpu:
    """What nvidia-smi says of a GPU, which CUDA does not show."""
    total, free, power, heat, others, used = (
        _number(row.get(field, ""))
        for field in ("memory.total", "memory.free", "power.limit", "temperature.gpu", "others", "others_mib")
    )
    capability = re.fullmatch(r"(\d+)\.(\d)", row.get("compute_cap", ""))
    mask = row.get("slowed", "")
    bits = int(mask, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", mask) else 0
    known = {"Enabled": True, "Disabled": False}
    mode = row.get("compute_mode", "")
    return Gpu(
        name=row.get("name", ""),
        capability=f"sm{capability[1]}{capability[2]}" if capability else None,
        total=None if total is None else int(total) * _MIB,
        free=None if free is None else int(free) * _MIB,
        is_unified=total is None,
        usable=False,
        trouble="CUDA does not show it to this process",
        power_limit=power,
        persistence=known.get(row.get("persistence_mode", "")),
        compute_mode=mode if re.fullmatch(r"[A-Z]\w+", mode) else None,
        mig=known.get(row.get("mig.mode.current", "")),
        celsius=None if heat is None else int(heat),
        slowed=tuple(dict.fromkeys(words for bit, words in _SLOWED.items() if bits & bit)),
        others=(0, 0) if others is None or used is None else (int(others), int(used) * _MIB),
    )
