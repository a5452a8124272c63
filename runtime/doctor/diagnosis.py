"""The whole examination, and its result as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_deploy.engines.host_memory import HostMemory, host_memory
from llava_deploy.runtime.doctor.backends import judge_backends
from llava_deploy.runtime.doctor.bundles import BundleReport, Here, Planner, bundle_findings, look_at_bundle
from llava_deploy.runtime.doctor.findings import LEVELS, Finding, host_findings, package_findings, power_findings
from llava_deploy.runtime.doctor.gpu import Graphics, look_at_graphics
from llava_deploy.runtime.doctor.gpu_findings import accelerator_findings, gpu_findings
from llava_deploy.runtime.doctor.host import Host, Power, look_at_host, look_at_power
from llava_deploy.runtime.doctor.packages import Packages, look_at_packages
from llava_deploy.runtime.doctor.system import System
from llava_deploy.runtime.doctor.verdicts import BackendVerdict

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        host: system and processor.
        memory: of the host.
        disk: bytes that are free where the first bundle is, or else here.
        power: of the board.
        graphics: NVIDIA's GPUs.
        packages: what is installed.
        backends: which of them can run something.
        findings: what there is to say, the worst first.
        bundles: what each of them could do, in the order in which they were named.
    """

    host: Host
    memory: HostMemory
    disk: int | None
    power: Power
    graphics: Graphics
    packages: Packages
    backends: tuple[BackendVerdict, ...]
    findings: tuple[Finding, ...]
    bundles: tuple[BundleReport, ...]

    @property
    def trouble(self) -> str:
        """Why nothing runs here, or which of the bundles do not; empty where all is well enough."""
        if self.bundles:
            idle = [bundle.directory for bundle in self.bundles if not bundle.runs]
            return f"no backend here runs {', '.join(idle)} as it is" if idle else ""
        if any(backend.runs for backend in self.backends):
            return ""
        return "no backend here can run a bundle; install one as the findings say"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"schema": SCHEMA_VERSION, **dataclasses.asdict(self), "trouble": self.trouble}


def examine(system: System, bundles: Sequence[Path], planner: Planner) -> Diagnosis:
    """Look at a machine, and at bundles on it. Nothing is changed, and what cannot be found out is no error.

    Args:
        system: the machine.
        bundles: directories.
        planner: says whether a bundle fits.
    """
    host, memory, power = look_at_host(system), host_memory(system.root), look_at_power(system)
    graphics = look_at_graphics(system)
    packages = look_at_packages(system, has_gpu=graphics.first is not None)
    disk = system.disk(bundles[0] if bundles else Path.cwd())
    verdicts = judge_backends(host, graphics, packages)
    here = Here.of(memory, graphics, packages, verdicts)
    reports = tuple(look_at_bundle(directory, here, planner) for directory in bundles)
    found = [
        *bundle_findings(reports),
        *gpu_findings(host, graphics, system.environment.get("CUDA_VISIBLE_DEVICES")),
        *accelerator_findings(host, graphics, packages, verdicts),
        *package_findings(packages, verdicts, has_gpu=graphics.first is not None),
        *host_findings(host, memory, disk),
        *power_findings(host, power),
    ]
    return Diagnosis(
        host=host,
        memory=memory,
        disk=disk,
        power=power,
        graphics=graphics,
        packages=packages,
        backends=verdicts,
        findings=tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level))),
        bundles=reports,
    )
