"""What there is to say about the host and the packages: from what is well to what is broken, each with what to do.

Sources: the wheels of ONNX Runtime and TensorRT for RTX are ``manylinux_2_28``; ONNX Runtime's packages
exclude each other (its issue 26996: with both, the CUDA provider is gone).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from llava_deploy.engines.host_memory import HostMemory
from llava_deploy.engines.tensorrt_module import SPOKEN
from llava_deploy.runtime.doctor.backends import INSTALL_CPU, INSTALL_GPU
from llava_deploy.runtime.doctor.host import Host, Power
from llava_deploy.runtime.doctor.packages import Library, Packages
from llava_deploy.runtime.doctor.verdicts import BackendVerdict, anew

Level = Literal["fault", "warning", "hint", "ok"]
"""From worst to best: something is broken; it works, but worse than it could; there could be more; well."""

LEVELS: tuple[Level, ...] = get_args(Level)
GB = 10**9
_SCARCE = 0.3
"""Share of the memory below which it is said that little is left."""

_FEW = 2 * GB
"""Bytes likewise."""

_ARCHITECTURES = ("x86_64", "aarch64", "AMD64", "arm64")
_OLDEST_GLIBC = (2, 28)


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: how bad it is.
        found: what.
        advice: what to do; empty where there is nothing.
    """

    level: Level
    found: str
    advice: str = ""


def gigabytes(count: int) -> str:
    """Bytes for people, as ``2.1 GB``."""
    return f"{count / GB:.1f} GB"


def host_findings(host: Host, memory: HostMemory, disk: int | None) -> Iterator[Finding]:
    """About the system, its memory and the disk's room."""
    if host.architecture not in _ARCHITECTURES:
        yield Finding(
            "warning", f"{host.architecture}: there are no wheels of ONNX Runtime for it", "build it from source"
        )
    found = re.fullmatch(r"glibc (\d+)\.(\d+)", host.libc)
    if found is None:
        yield Finding(
            "warning",
            f"the C library is not glibc ({host.libc or 'unknown'}): there may be no wheels for it",
            "use a distribution with glibc, such as Ubuntu or Debian",
        )
    elif (int(found[1]), int(found[2])) < _OLDEST_GLIBC:
        yield Finding("warning", f"{host.libc}: today's wheels want glibc 2.28 or later", "use a later release")
    yield from _memory_findings(memory)
    if disk is not None and disk < _FEW:
        yield Finding(
            "warning", f"{gigabytes(disk)} free on the disk", "an engine takes as much as its bundle's graphs"
        )
    if not host.int8_products:
        yield Finding(
            "hint",
            "the processor has no exact products of 8-bit integers (VNNI)",
            "build for ONNX Runtime without --int8",
        )


def _memory_findings(memory: HostMemory) -> Iterator[Finding]:
    if memory.total is None or memory.available is None:
        yield Finding("warning", "the system does not say how much memory it has", "see whether /proc is mounted")
        return
    whole = memory.total if memory.limit is None else memory.limit
    words = f"{gigabytes(memory.available)} of {gigabytes(whole)} memory available"
    if memory.limit is not None:
        words += f" (limit of the container or service; the machine has {gigabytes(memory.total)})"
    if memory.available < min(_FEW, whole) or memory.available < _SCARCE * whole:
        yield Finding("warning", words, "stop what else runs, or take an int4 bundle and a smaller --max-len")
    else:
        yield Finding("ok", words)


def power_findings(host: Host, power: Power) -> Iterator[Finding]:
    """About power modes, clocks and heat."""
    if power.trouble:
        yield Finding("warning", f"the power mode is not known: {power.trouble}", "ask for it: sudo nvpmodel -q")
    if power.mode is not None and power.highest is not None and power.mode != power.highest:
        yield Finding(
            "warning",
            f"power mode {power.mode}, and this board can do {power.highest}: it runs slower than it could",
            f"sudo nvpmodel -m {power.highest_id}, where supply and cooling allow it",
        )
    elif power.mode is not None:
        yield Finding("ok", f"power mode {power.mode}" + ("" if power.highest is None else ", the highest"))
    if host.is_jetson and power.clocks is not None and power.clocks[0] < power.clocks[1]:
        low, high = (round(clock / 1e6) for clock in power.clocks)
        yield Finding(
            "hint", f"the GPU's clock varies from {low} to {high} MHz", "sudo jetson_clocks fixes it, before measuring"
        )
    if power.throttled:
        yield Finding(
            "warning",
            f"too hot, so that it is slowed down: {', '.join(power.throttled)}",
            "cool it, or take a lower power mode",
        )
    if power.over_current:
        yield Finding(
            "warning",
            f"slowed down {power.over_current} times since the start, since it drew too much current",
            "take a stronger power supply, or a lower power mode",
        )


def package_findings(packages: Packages, verdicts: tuple[BackendVerdict, ...], has_gpu: bool) -> Iterator[Finding]:
    """About what is installed; ``has_gpu`` says that CUDA can use one, without which TensorRT is of no use."""
    is_for_gpu = has_gpu and "onnxruntime-gpu" in packages.onnxruntime.packages
    install = INSTALL_GPU if is_for_gpu else INSTALL_CPU
    yield from _onnxruntime_findings(packages.onnxruntime, install, any(verdict.runs for verdict in verdicts))
    for backend, library in packages.tensorrt.items():
        if library.trouble:
            yield Finding(
                "fault" if has_gpu else "warning",
                f"{SPOKEN[backend]} is installed ({_named(library)}), but cannot be loaded: {library.trouble}",
                "install it again, or take it away",
            )
    if packages.cuda_python.trouble:
        yield Finding(
            "fault" if has_gpu else "warning",
            f"cuda-python is installed ({_named(packages.cuda_python)}), but cannot be loaded: "
            f"{packages.cuda_python.trouble}",
            "pip install --force-reinstall cuda-python, of the driver's major version of CUDA",
        )
    if not packages.can_build:
        yield Finding("hint", "onnx-ir is not installed, without which nothing can be built here", _INSTALL_BUILD)


_INSTALL_BUILD = "pip install 'llava-deploy[build]'; an engine that was built elsewhere runs without it"


def _onnxruntime_findings(library: Library, install: str, something_runs: bool) -> Iterator[Finding]:
    if len(library.packages) > 1:
        yield Finding(
            "fault",
            f"{' and '.join(library.packages)} are installed at once: they overwrite each other's files",
            anew(library, install),
        )
    if not library.installed:
        yield Finding("hint" if something_runs else "fault", "ONNX Runtime is not installed", install)
    elif not library.loads:
        yield Finding(
            "fault",
            f"ONNX Runtime is installed ({_named(library)}), but cannot be loaded: {library.trouble}",
            anew(library, install) if library.packages else f"pip uninstall onnxruntime, then {install}",
        )
    else:
        yield Finding("ok", f"ONNX Runtime {library.version}")


def _named(library: Library) -> str:
    named = ", ".join(f"{name} {version}" for name, version in library.packages.items())
    return named or "by no package that pip knows"
