"""Machines that are only files, programs that only answer, and packages that are only names, for the doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_deploy.runtime.doctor.system import Ran, System

Answer = str | Ran | Callable[[Sequence[str]], Ran]
GB = 10**9

INTEL = "processor\t: 0\nmodel name\t: Abacus 9000\nphysical id\t: 0\ncore id\t: 0\nflags\t: avx2 avx512f avx512_vnni\n"
CORTEX = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n"
UBUNTU = 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.1 LTS"\n'
KERNEL_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12\n"
NVPMODEL = """# modes
< PARAM TYPE=FILE NAME=CPU_ONLINE >
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""
CARD = "GPU-11111111-2222-3333-4444-555555555555"
RTX_4090 = {
    "name": "NVIDIA GeForce RTX 4090",
    "uuid": CARD.removeprefix("GPU-"),
    "capability": "sm89",
    "integrated": False,
    "compute_mode": 0,
    "free": 24 * GB,
    "total": 25 * GB,
    "error": None,
}
ORIN = {**RTX_4090, "name": "Orin", "uuid": "ffff", "capability": "sm87", "integrated": True, "free": 5 * GB}
ROW = {
    "index": "0",
    "uuid": CARD,
    "name": "NVIDIA GeForce RTX 4090",
    "driver_version": "550.54.14",
    "compute_cap": "8.9",
    "memory.total": "24564",
    "memory.free": "23000",
    "power.limit": "450.00",
    "persistence_mode": "Enabled",
    "compute_mode": "Default",
    "mig.mode.current": "[N/A]",
    "temperature.gpu": "41",
    "clocks_event_reasons.active": "0x0000000000000001",
}
NO_LIBRARY = {"loaded": False, "error": "libcuda.so.1: cannot open shared object file: No such file or directory"}


@dataclass
class FakeMachine:
    """A machine to be changed until it is looked at; as it is made, a laptop with ONNX Runtime and without a GPU.

    Attributes:
        root: where its files are.
        programs: what they answer, by name; a function is given all words.
        probes: what probes answer, by their words.
        packages: versions by name.
        denied: files that the user may not use.
    """

    root: Path
    programs: dict[str, Answer] = field(default_factory=dict)
    probes: dict[str, dict[str, Any] | Ran] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    environment: dict[str, str] = field(default_factory=dict)
    machine: str = "x86_64"
    disk: int | None = 100 * GB
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.write("/proc/cpuinfo", INTEL)
        self.write("/etc/os-release", UBUNTU)
        self.memory(16_000_000, 12_000_000)
        self.probes["cuda"] = NO_LIBRARY
        self.packages.update({"llava-deploy": "0.1.0", "numpy": "2.4.6", "onnx-ir": "1.1.0", "onnxruntime": "1.32.0"})
        self.probes["module onnxruntime"] = {"version": "1.32.0", "file": "f", "providers": ["CPUExecutionProvider"]}

    def write(self, name: str, text: str = "") -> None:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def memory(self, total: int, available: int) -> None:
        """In kB."""
        text = f"MemTotal: {total} kB\nMemAvailable: {available} kB\nSwapTotal: 2000 kB\nSwapFree: 1000 kB\n"
        self.write("/proc/meminfo", text)

    def add_card(self, driver: str = "550.54.14", cuda: int = 12040, **row: str) -> None:
        """A GeForce RTX 4090 with its driver; ``row`` is what nvidia-smi says otherwise."""
        self.write("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
        self.write("/sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
        self.write("/proc/driver/nvidia/version", KERNEL_MODULE.format(driver))
        self.write("/dev/nvidia0")
        self.write("/dev/nvidiactl")
        self.probes["cuda"] = {"loaded": True, "cuda": cuda, "code": None, "devices": [dict(RTX_4090)]}
        self.programs["nvidia-smi"] = smi({**ROW, "driver_version": driver, **row})

    def become(self, name: str, capability: str) -> None:
        """With another card than the one that was added."""
        self.probes["cuda"]["devices"][0].update(name=name, capability=capability)

    def add_tensorrt_rtx(self, cuda: int = 12) -> None:
        name = f"tensorrt-rtx-cu{cuda}"
        self.packages.update({name: "1.7.1.116", f"{name}-libs": "1.7.1.116", "cuda-python": f"{cuda}.9.1"})
        self.probes["module tensorrt_rtx"] = {"version": "1.7.1.116", "file": "f"}
        self.probes["cuda-python"] = {"cuda": cuda * 1000 + 90}

    def add_onnxruntime_gpu(self, version: str = "1.31.1", cuda: str = "13.0", trouble: str = "") -> None:
        """In the place of the one for the CPU; ``trouble`` is what its CUDA provider says."""
        self.packages.pop("onnxruntime", None)
        self.packages["onnxruntime-gpu"] = version
        providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
        self.probes["module onnxruntime"] = {"version": version, "file": "f", "providers": providers, "cuda": cuda}
        self.probes["provider TensorrtExecutionProvider"] = {"error": "OSError: libnvinfer.so.10: no such file"}
        said = {"error": trouble} if trouble else {"loaded": True}
        self.probes["provider CUDAExecutionProvider"] = self.probes["provider CUDAExecutionProvider run"] = said

    def become_orin_nano(self, mode: str) -> None:
        """JetPack 6.2 with its TensorRT."""
        self.machine = "aarch64"
        self.write("/proc/cpuinfo", CORTEX)
        self.memory(7_800_000, 6_000_000)
        self.write("/proc/device-tree/model", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0")
        self.write("/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
        self.write("/etc/nvpmodel.conf", NVPMODEL)
        self.write("/dev/nvhost-gpu")
        self.write("/sys/class/devfreq/17000000.gpu/min_freq", "306000000")
        self.write("/sys/class/devfreq/17000000.gpu/max_freq", "1020000000")
        self.programs["nvpmodel"] = f"NV Power Mode: {mode}\n1\n"
        self.programs["dpkg-query"] = "6.2+b77"
        self.probes["cuda"] = {"loaded": True, "cuda": 12060, "code": None, "devices": [dict(ORIN)]}
        self.packages.update({"tensorrt": "10.3.0", "cuda-python": "12.6.0"})
        self.probes["module tensorrt"] = {"version": "10.3.0", "file": "f"}
        self.probes["cuda-python"] = {"cuda": 12060}

    def system(self) -> System:
        """As the doctor sees it."""
        return System(
            root=self.root,
            run=self._run,
            version=self.packages.get,
            may_use=lambda path: f"/{path.relative_to(self.root)}" not in self.denied,
            disk=lambda _: self.disk,
            environment=self.environment,
            machine=self.machine,
            release="6.8.0-31-generic",
            libc="glibc 2.39",
            python="3.12.3",
            processors=8,
        )

    def _run(self, words: Sequence[str], patience: float) -> Ran:
        self.asked.append(" ".join(words))
        if words[0] == sys.executable:
            name = words[3] if words[2:3] == ("module",) else ""
            missing = {"error": f"ModuleNotFoundError: No module named '{name or 'cuda'}'"}
            answer = self.probes.get(" ".join(words[2:]), missing)
            return answer if isinstance(answer, Ran) else Ran(0, f"noise\n{json.dumps(answer)}\n")
        program = self.programs.get(words[0])
        if program is None:
            return Ran.not_installed(words[0])
        if isinstance(program, str):
            return Ran(0, program)
        return program if isinstance(program, Ran) else program(words)


def smi(*rows: dict[str, str], apps: Sequence[tuple[str, str, str]] = ()) -> Callable[[Sequence[str]], Ran]:
    """An nvidia-smi that answers queries with these fields, and refuses those that it does not have."""

    def answer(words: Sequence[str]) -> Ran:
        what, _, fields = words[1].removeprefix("--query-").partition("=")
        if what == "compute-apps":
            return Ran(0, "".join(f"{', '.join(app)}\n" for app in apps))
        for field_ in fields.split(","):
            if field_ not in rows[0]:
                return Ran(2, f'Field "{field_}" is not a valid field to query.\n')
        return Ran(0, "".join(f"{', '.join(row[name] for name in fields.split(','))}\n" for row in rows))

    return answer
