"""GPUs and their drivers: whole, missing, too old, hidden, in use, and tools that do not answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_machine import CARD, GB, NO_LIBRARY, ROW, RTX_4090, FakeMachine, smi

from llava_deploy.engines.names import Backend
from llava_deploy.runtime.doctor.diagnosis import Diagnosis
from llava_deploy.runtime.doctor.findings import Finding
from llava_deploy.runtime.doctor.system import Ran
from llava_deploy.runtime.doctor.verdicts import BackendVerdict

Diagnose = Callable[[], Diagnosis]
VerdictOn = Callable[[Backend], BackendVerdict]
FindingOf = Callable[[str], Finding]


def test_a_laptop_without_a_gpu_runs_onnx_runtime(diagnose: Diagnose) -> None:
    diagnosis = diagnose()
    assert [(each.backend, each.runs) for each in diagnosis.backends] == [
        ("onnxruntime", True),
        ("onnxruntime-cuda", False),
        ("tensorrt", False),
        ("tensorrt-rtx", False),
    ]
    assert {finding.level for finding in diagnosis.findings} == {"ok"}
    assert (diagnosis.trouble, diagnosis.graphics.gpus) == ("", ())


def test_a_card_without_tensorrt_says_what_to_install(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card()
    hint = finding("but no TensorRT for RTX")
    assert hint.level == "hint"
    assert "NVIDIA GeForce RTX 4090, driver 550.54.14 (CUDA 12.4)" in hint.found
    assert hint.advice == "pip install 'llava-deploy[rtx]'"
    machine.add_card("580.65.06", 13000)
    assert finding("but no TensorRT for RTX").advice == "pip install 'llava-deploy[rtx]'"


def test_a_card_with_tensorrt_for_rtx_runs_it(machine: FakeMachine, diagnose: Diagnose, verdict: VerdictOn) -> None:
    machine.add_card(**{"power.limit": "320.50"})
    machine.add_tensorrt_rtx()
    diagnosis = diagnose()
    found = verdict("tensorrt-rtx")
    assert (found.runs, found.how) == (True, "TensorRT for RTX 1.7.1.116 on NVIDIA GeForce RTX 4090 (sm89)")
    gpu = diagnosis.graphics.gpus[0]
    assert (gpu.power_limit, gpu.celsius, gpu.persistence, gpu.mig, gpu.slowed) == (320.5, 41, True, None, ())
    assert (gpu.free, gpu.total, diagnosis.graphics.driver, diagnosis.graphics.cuda) == (
        24 * GB,
        25 * GB,
        "550.54.14",
        "12.4",
    )
    assert {each.level for each in diagnosis.findings} == {"ok"}


@pytest.mark.parametrize("form", ["UNIX Open Kernel Module for x86_64", "UNIX x86_64 Kernel Module"])
def test_the_drivers_version_is_read_of_both_kinds(machine: FakeMachine, diagnose: Diagnose, form: str) -> None:
    machine.add_card()
    machine.write("/proc/driver/nvidia/version", f"NVRM version: NVIDIA {form}  560.35.03  Release Build\n")
    assert diagnose().graphics.driver == "560.35.03"


def test_a_driver_too_old_for_the_wheel_names_the_other_wheel(
    machine: FakeMachine, diagnose: Diagnose, verdict: VerdictOn
) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx(cuda=13)
    assert (verdict("tensorrt-rtx").runs, verdict("tensorrt-rtx").lacks) == (False, ("driver",))
    fault = diagnose().findings[0]
    assert fault.level == "fault"
    assert "the driver is too old: it is for CUDA 12.4, and what is installed is for CUDA 13" in fault.found
    assert "580 or later" in fault.advice
    assert "pip install tensorrt-rtx-cu12 'cuda-python==12.*'" in fault.advice


def test_a_library_that_speaks_of_something_too_old_is_no_old_driver(
    machine: FakeMachine, diagnose: Diagnose, verdict: VerdictOn
) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    machine.probes["module tensorrt_rtx"] = {"error": "ImportError: libstdc++.so.6 is too old"}
    assert verdict("tensorrt-rtx").lacks == ("package",)
    assert any(each.found.startswith(f"{RTX_4090['name']} is there, but: ") for each in diagnose().findings)


def test_a_driver_too_old_for_all_has_to_be_updated(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_card("470.223.02", 11040)
    machine.add_tensorrt_rtx()
    fault = diagnose().findings[0]
    assert (fault.level, fault.advice) == ("fault", "update the NVIDIA driver to 525 or later")


@pytest.mark.parametrize(
    ("capability", "backend", "words"),
    [
        ("sm90", "tensorrt-rtx", "TensorRT for RTX 1.7 does not run on sm90"),
        ("sm61", "tensorrt", "TensorRT wants sm75 or later, found sm61"),
        ("sm52", "onnxruntime-cuda", "ONNX Runtime on CUDA wants sm60 or later, found sm52"),
    ],
)
def test_a_gpu_that_a_backend_does_not_know(
    machine: FakeMachine, verdict: VerdictOn, capability: str, backend: Backend, words: str
) -> None:
    machine.add_card()
    machine.become("NVIDIA GPU", capability)
    assert verdict(backend).how.startswith(words)
    assert verdict(backend).lacks == ("GPU",)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [("sm70", False), ("sm87", False), ("sm90", False), ("sm100", False)]
    + [(capability, True) for capability in ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")],
)
def test_where_tensorrt_for_rtx_runs(machine: FakeMachine, verdict: VerdictOn, capability: str, runs: bool) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    machine.become("NVIDIA GPU", capability)
    assert verdict("tensorrt-rtx").runs == runs


def test_nouveau_instead_of_nvidia(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card()
    (machine.root / "proc/driver/nvidia/version").unlink()
    for node in ("nvidia0", "nvidiactl"):
        (machine.root / "dev" / node).unlink()
    machine.programs.clear()
    machine.probes["cuda"] = NO_LIBRARY
    machine.write("/sys/module/nouveau/version")
    assert finding("nouveau instead of NVIDIA's driver").level == "warning"
    (machine.root / "sys/module/nouveau/version").unlink()
    (machine.root / "sys/module/nouveau").rmdir()
    assert finding("1 NVIDIA device on the bus, but no driver").level == "warning"


def test_a_container_without_device_nodes(machine: FakeMachine, finding: FindingOf) -> None:
    machine.write("/.dockerenv")
    machine.probes["cuda"] = {"loaded": True, "cuda": 12040, "code": 100, "error": "cuInit: CUDA_ERROR_NO_DEVICE (100)"}
    fault = finding("no device node in /dev: container (docker) without its GPU")
    assert (fault.level, "--gpus all" in fault.advice) == ("fault", True)


def test_a_container_without_the_drivers_libraries(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card()
    machine.write("/run/.containerenv")
    machine.probes["cuda"] = NO_LIBRARY
    fault = finding("CUDA's library is not there")
    assert (fault.level, "NVIDIA_DRIVER_CAPABILITIES" in fault.advice) == ("fault", True)


@pytest.mark.parametrize(
    ("code", "words"), [(803, "of different versions"), (34, "stub"), (999, "does not start"), (2, "cannot be used")]
)
def test_cudas_errors_come_in_words(machine: FakeMachine, finding: FindingOf, code: int, words: str) -> None:
    machine.add_card()
    machine.programs.clear()
    machine.probes["cuda"] = {"loaded": True, "cuda": 12040, "code": code, "error": f"cuInit: CUDA_ERROR ({code})"}
    fault = finding(words)
    assert (fault.level, f"({code})" in fault.found) == ("fault", True)


def test_a_hidden_gpu_is_told_from_a_missing_one(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_card()
    machine.environment["CUDA_VISIBLE_DEVICES"] = "3"
    machine.probes["cuda"] = {"loaded": True, "cuda": 12040, "code": 100, "error": "cuInit: CUDA_ERROR_NO_DEVICE (100)"}
    found = [each.found for each in diagnose().findings]
    assert "CUDA_VISIBLE_DEVICES is '3', which shows no GPU" in found
    assert "NVIDIA GeForce RTX 4090: CUDA does not show it to this process" in found


def test_a_device_that_this_user_may_not_use(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card()
    machine.denied = {"/dev/nvidia0"}
    fault = finding("this user may not use /dev/nvidia0")
    assert (fault.level, "video,render" in fault.advice) == ("fault", True)


def test_what_slows_a_gpu_and_who_uses_it(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card()
    machine.probes["cuda"]["devices"][0]["free"] = 9 * GB
    row = {
        **ROW,
        "persistence_mode": "Disabled",
        "compute_mode": "Exclusive_Process",
        "mig.mode.current": "Enabled",
        "clocks_event_reasons.active": "0x00000000000000A4",
    }
    others = [(CARD, "4242", "15000"), (CARD, "4243", "[N/A]"), ("GPU-other", "1", "7")]
    machine.programs["nvidia-smi"] = smi(row, apps=others)
    assert finding("slowed down").found.endswith("too hot and the power supply says so")
    crowd = finding("are in use")
    assert (crowd.level, crowd.found.endswith("16.0 GB of 25.0 GB are in use, by 2 processes with 15.7 GB")) == (
        "warning",
        True,
    )
    assert finding("sleeps when nobody uses it").level == "hint"
    assert finding("one process alone").level == "hint"
    assert finding("divided (MIG)").level == "hint"


def test_a_prohibited_gpu(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card(compute_mode="Prohibited")
    machine.probes["cuda"]["devices"][0]["error"] = "no context can be made on it (CUDA_ERROR_DEVICE_UNAVAILABLE (46))"
    assert finding("compute mode is Prohibited").level == "fault"
    assert finding("no context can be made").level == "warning"


def test_older_drivers_name_their_reasons_otherwise(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card()
    old = {name: value for name, value in ROW.items() if "clocks" not in name}
    machine.programs["nvidia-smi"] = smi({**old, "clocks_throttle_reasons.active": "0x40"})
    assert finding("slowed down, too hot").level == "warning"


@pytest.mark.parametrize(
    "answer",
    [
        Ran(None, "", "nvidia-smi gave no answer within 8 s", "no answer"),
        "\x00\xff garbage, with, commas\n" * 50,
        "",
        Ran(9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"),
        ", , , , , , , , , , , \n",
        Ran(-11, "Segmentation fault"),
    ],
)
def test_an_nvidia_smi_that_hangs_or_babbles_is_a_finding(
    machine: FakeMachine, diagnose: Diagnose, verdict: VerdictOn, answer: str | Ran
) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    machine.programs["nvidia-smi"] = answer
    diagnosis = diagnose()
    warnings = [each for each in diagnosis.findings if each.level != "ok"]
    assert [each.found.partition(":")[0] for each in warnings] == ["no use of nvidia-smi"]
    assert verdict("tensorrt-rtx").runs
    assert diagnosis.graphics.gpus[0].free == 24 * GB


def test_wsl_has_its_nvidia_smi_elsewhere(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.programs["/usr/lib/wsl/lib/nvidia-smi"] = smi(ROW)
    machine.write("/dev/dxg")
    machine.probes["cuda"] = {"loaded": True, "cuda": 12040, "code": None, "devices": [dict(RTX_4090)]}
    assert diagnose().graphics.driver == "550.54.14"
    assert diagnose().graphics.gpus[0].power_limit == 450


def test_cudas_first_gpu_is_the_first(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_card()
    second = {**ROW, "uuid": "GPU-99", "index": "1", "name": "NVIDIA L4", "temperature.gpu": "70"}
    machine.programs["nvidia-smi"] = smi(ROW, second)
    machine.probes["cuda"]["devices"] = [{**RTX_4090, "uuid": "99", "name": "NVIDIA L4"}, dict(RTX_4090)]
    graphics = diagnose().graphics
    assert [(gpu.name, gpu.celsius) for gpu in graphics.gpus] == [("NVIDIA L4", 70), ("NVIDIA GeForce RTX 4090", 41)]
    assert graphics.first is graphics.gpus[0]
