"""What is said of a backend, and what the reasons have in common: versions of CUDA, drivers, packages.

Source: NVIDIA, "CUDA Compatibility", "Minor Version Compatibility", table 1: a program of CUDA 11.x wants a driver of
450 or later, of 12.x 525, of 13.x 580.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llava_deploy.engines.names import Backend
from llava_deploy.runtime.doctor.gpu import Graphics
from llava_deploy.runtime.doctor.packages import Library

DRIVERS = {11: 450, 12: 525, 13: 580}
"""The least driver for each major version of CUDA."""

OLDER_CUDA = 12
"""The least that there are wheels for; pip takes those for a later one where nothing is said."""

Lack = Literal["GPU", "package", "driver"]
"""What keeps a backend from running: no GPU that it could use; a package is missing, old or broken; an old driver."""


@dataclass(frozen=True)
class BackendVerdict:
    """Whether a backend can run something here.

    Attributes:
        backend: which.
        runs: it can.
        how: with what and on what, or why not, for people.
        missing: what to do so that it can; none where nothing helps.
        lacks: why not, in a word for each reason.
    """

    backend: Backend
    runs: bool
    how: str
    missing: tuple[str, ...]
    lacks: tuple[Lack, ...] = ()


def cuda_major(graphics: Graphics) -> int | None:
    """Major version of CUDA that the driver is for; ``None`` without a driver."""
    if graphics.cuda is not None:
        return int(graphics.cuda.partition(".")[0])
    number = re.match(r"\d+", graphics.driver or "")
    return max((cuda for cuda, least in DRIVERS.items() if number and int(number[0]) >= least), default=None)


def update_driver(cuda: int) -> str:
    """What to do for programs of that major version of CUDA."""
    return f"update the NVIDIA driver to {DRIVERS.get(cuda, DRIVERS[13])} or later"


def older_driver(graphics: Graphics, has: int, wants: int) -> str:
    """That the driver is for an older CUDA than what is installed."""
    return f"the driver is too old: it is for CUDA {graphics.cuda or has}, and what is installed is for CUDA {wants}"


def number_of(capability: str) -> int:
    """``sm89`` as 89."""
    return int(capability.removeprefix("sm"))


def no_gpu(graphics: Graphics) -> str:
    """Why there is none that could be used."""
    if not graphics.cards and not graphics.nodes and graphics.driver is None:
        return "no NVIDIA GPU"
    return f"no NVIDIA GPU that can be used: {graphics.trouble or 'see the findings'}"


def trouble_of(name: str, library: Library, least: tuple[int, int]) -> str:
    """What is wrong with a library; empty where it loads and is recent enough."""
    if library.loads and library.is_at_least(least):
        return ""
    if library.loads:
        return f"{name} {library.version} is older than {least[0]}.{least[1]}"
    if not library.installed:
        return f"{name} is not installed"
    return f"{name} is installed, but cannot be loaded: {library.trouble}"


def anew(library: Library, install: str) -> str:
    """Install it in the place of what does not load."""
    return f"pip uninstall {' '.join(library.packages)}, then {install}" if library.packages else install
