"""What install.sh takes for a machine, which has to be what the doctor recommends there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fake_machine import KERNEL_MODULE, FakeMachine

from llava_deploy.runtime.doctor.backends import recommended
from llava_deploy.runtime.doctor.cuda_provider import install_cuda
from llava_deploy.runtime.doctor.gpu import look_at_graphics
from llava_deploy.runtime.doctor.host import look_at_host
from llava_deploy.runtime.doctor.packages import Library

MACHINE = Path(__file__).resolve().parents[2] / "deploy" / "machine.sh"
CAPABILITIES = ("sm60", "sm70", "sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121")
DRIVERS = {"535.183.01": 12020, "550.54.14": 12040, "580.65.06": 13000, "595.10": 13020}


def said(call: str, path: str = os.environ["PATH"]) -> str:
    """What a function prints."""
    script = ["bash", "-euo", "pipefail", "-c", f"source '{MACHINE}'; {call}"]
    return subprocess.run(script, capture_output=True, text=True, check=True, env={"PATH": path}).stdout.strip()


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_it_installs_what_the_doctor_recommends(tmp_path: Path, architecture: str, driver: str) -> None:
    machine = FakeMachine(tmp_path, machine=architecture)
    machine.add_card(driver, DRIVERS[driver])
    calls, wanted = [], []
    for capability in CAPABILITIES:
        words = f"{architecture} {driver.partition('.')[0]} {capability.removeprefix('sm')}"
        calls += [f"extras_for {words}", f"onnxruntime_gpu {words}"]
        machine.become("NVIDIA GPU", capability)
        host, graphics = look_at_host(machine.system()), look_at_graphics(machine.system())
        assert graphics.first is not None
        install = install_cuda(host, graphics, Library({}, None, ""))
        best = "cpu,rtx,build" if recommended(host, graphics.first) == "tensorrt-rtx" else "gpu,build"
        wanted += ["cpu" if install.startswith("update the NVIDIA driver") else best, install.split("'")[3]]
    assert said("; ".join(calls)).splitlines() == wanted


def test_what_no_backend_is_for_gets_the_cpus(tmp_path: Path) -> None:
    assert said("extras_for x86_64 580 52; extras_for x86_64 470 89; extras_for x86_64 0 ''") == "cpu\ncpu\ncpu"
    assert said("extras_for x86_64 550 ''") == "cpu,rtx,build"  # a driver, and nobody who says what for
    assert said("onnxruntime_gpu x86_64 0 ''; onnxruntime_gpu aarch64 0 ''") == "\n".join(
        ["onnxruntime-gpu[cuda,cudnn]"] * 2
    )


def test_driver_and_gpu_are_found(tmp_path: Path) -> None:
    version = tmp_path / "a version"
    forms = ("550.54.14", "570.86")
    for form in forms:
        version.write_text(KERNEL_MODULE.format(form), encoding="utf-8")
        assert said(f"cuda_driver '{version}'") == form[:3]
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert said(f"cuda_driver '{version}'; cuda_driver '{tmp_path}/none'") == "580\n0"
    smi = tmp_path / "nvidia-smi"
    path = f"{tmp_path}:{os.environ['PATH']}"
    for answer, number in (("9.0\\n8.9", "90"), ("12.0", "120"), ("[N/A]", ""), ("NVIDIA-SMI has failed", "")):
        smi.write_text(f"#!/bin/sh\nprintf '{answer}\\n'\n")
        smi.chmod(0o755)
        assert said("capability", path) == number
    smi.write_text("#!/bin/sh\necho failed\nexit 9\n")
    assert said("capability", path) == ""
