"""ONNX Runtime on an NVIDIA GPU: what keeps it from running on which machine, and the line that would install it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_machine import FakeMachine

from llava_deploy.engines.names import Backend
from llava_deploy.runtime.doctor.diagnosis import Diagnosis
from llava_deploy.runtime.doctor.findings import Finding
from llava_deploy.runtime.doctor.system import Ran
from llava_deploy.runtime.doctor.verdicts import BackendVerdict

Diagnose = Callable[[], Diagnosis]
FindingOf = Callable[[str], Finding]
VerdictOn = Callable[[Backend], BackendVerdict]

NO_CUBLAS = "OSError: libcublasLt.so.13: cannot open shared object file: No such file or directory"
NO_CUDNN = "NotImplemented: [ONNXRuntimeError] : 9 : cuDNN is unavailable or disabled for CUDA Execution Provider"
NO_CODE = (
    "Fail: [ONNXRuntimeError] : 1 : FAIL : CUDA error cudaErrorNoKernelImageForDevice:no kernel image is available"
)
INSTALL = "pip install 'llava-deploy[gpu]' 'onnxruntime-gpu[cuda,cudnn]'"


@pytest.fixture
def h100(machine: FakeMachine) -> FakeMachine:
    """A driver for CUDA 13, and ONNX Runtime for the CPU."""
    machine.add_card("580.65.06", 13000)
    machine.become("NVIDIA H100 80GB HBM3", "sm90")
    return machine


def test_an_h100_is_told_to_get_onnxruntime_gpu(h100: FakeMachine, finding: FindingOf, verdict: VerdictOn) -> None:
    hint = finding("but no ONNX Runtime on CUDA: bundles run on the CPU")
    assert hint.level == "hint"
    assert hint.found.startswith("NVIDIA H100 80GB HBM3, driver 580.65.06 (CUDA 13.0)")
    assert hint.advice == f"pip uninstall onnxruntime, then {INSTALL}"
    found = verdict("onnxruntime-cuda")
    assert (found.runs, found.lacks) == (False, ("package",))
    assert found.how == "ONNX Runtime 1.32.0 is the one for the CPU, without CUDAExecutionProvider"
    del h100.packages["onnxruntime"], h100.probes["module onnxruntime"]
    assert finding("but no ONNX Runtime on CUDA").advice == INSTALL


def test_an_h100_that_has_it_runs_it(h100: FakeMachine, diagnose: Diagnose, verdict: VerdictOn) -> None:
    h100.add_onnxruntime_gpu()
    found = verdict("onnxruntime-cuda")
    assert (found.runs, found.missing) == (True, ())
    assert found.how == "ONNX Runtime 1.31.1 for CUDA 13 on NVIDIA H100 80GB HBM3 (sm90)"
    assert not verdict("tensorrt-rtx").runs
    assert {each.level for each in diagnose().findings} == {"ok"}


def test_beside_a_gpu_the_provider_is_run_and_not_only_loaded(h100: FakeMachine, verdict: VerdictOn) -> None:
    h100.add_onnxruntime_gpu()
    h100.probes["provider CUDAExecutionProvider"] = {"error": "was only loaded"}
    assert verdict("onnxruntime-cuda").runs
    assert not any(words.endswith(("provider CUDAExecutionProvider", "module cuda")) for words in h100.asked)


@pytest.mark.parametrize("trouble", [NO_CUBLAS, NO_CUDNN])
@pytest.mark.parametrize(("version", "cuda"), [("1.31.1", "13.0"), ("1.26.0", "12.8")])
def test_missing_libraries_are_installed_for_the_release_there_is(
    h100: FakeMachine, finding: FindingOf, trouble: str, version: str, cuda: str
) -> None:
    h100.add_onnxruntime_gpu(version, cuda, trouble)
    fault = finding("finds not all of CUDA's libraries")
    assert (fault.level, trouble in fault.found) == ("fault", True)
    assert fault.advice == f"pip install 'onnxruntime-gpu[cuda,cudnn]=={version}'"


def test_a_laptop_whose_cuda_libraries_are_missing(
    machine: FakeMachine, diagnose: Diagnose, verdict: VerdictOn
) -> None:
    """It has a GPU that TensorRT for RTX serves better, so both are named; and it runs on the CPU."""
    machine.add_card("580.65.06", 13000)
    machine.add_onnxruntime_gpu(trouble=NO_CUBLAS)
    diagnosis = diagnose()
    told = [(each.level, each.advice) for each in diagnosis.findings if each.level != "ok"]
    assert told == [
        ("fault", "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'"),
        ("hint", "pip install 'llava-deploy[rtx]'"),
    ]
    assert (verdict("onnxruntime").runs, verdict("onnxruntime-cuda").runs) == (True, False)
    machine.add_tensorrt_rtx()
    assert {each.level for each in diagnose().findings} == {"ok"}


def test_without_a_gpu_nobody_misses_cudas_libraries(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_onnxruntime_gpu(trouble=NO_CUBLAS)
    diagnosis = diagnose()
    assert {each.level for each in diagnosis.findings} == {"ok"}
    assert diagnosis.packages.onnxruntime.cuda == 13
    found = next(each for each in diagnosis.backends if each.backend == "onnxruntime-cuda")
    assert (found.how, found.missing) == ("no NVIDIA GPU", ())


def test_a_gtx_1660_is_sent_to_onnx_runtime(machine: FakeMachine, finding: FindingOf, verdict: VerdictOn) -> None:
    """TensorRT for RTX runs there only where it was told to build for 7.5."""
    machine.add_card("580.65.06", 13000)
    machine.become("NVIDIA GeForce GTX 1660", "sm75")
    assert finding("but no ONNX Runtime on CUDA").advice == f"pip uninstall onnxruntime, then {INSTALL}"
    machine.add_tensorrt_rtx()
    assert verdict("tensorrt-rtx").how == "TensorRT for RTX 1.7.1.116 on NVIDIA GeForce GTX 1660 (sm75)"
    machine.add_onnxruntime_gpu()
    assert verdict("onnxruntime-cuda").runs


@pytest.mark.parametrize(
    ("capability", "driver", "cuda", "release"),
    [
        ("sm90", "580.65.06", 13000, ""),
        ("sm90", "550.54.14", 12040, "<1.27"),
        ("sm75", "535.183.01", 12020, "<1.27"),
        ("sm70", "580.65.06", 13000, "<1.27"),
        ("sm100", "580.65.06", 13000, "<1.29"),
        ("sm103", "580.65.06", 13000, "<1.27"),
        ("sm100", "570.86.15", 12080, "<1.27"),
    ],
)
def test_the_release_is_one_for_the_driver_and_the_gpu(
    machine: FakeMachine, finding: FindingOf, capability: str, driver: str, cuda: int, release: str
) -> None:
    machine.add_card(driver, cuda)
    machine.become("NVIDIA GPU", capability)
    advice = finding("but no ONNX Runtime on CUDA").advice
    wanted = f"pip install 'llava-deploy[gpu]' 'onnxruntime-gpu[cuda,cudnn]{release}'"
    assert advice.endswith(f"{wanted} 'cuda-python==12.*'" if cuda < 13000 else wanted)


def test_on_arm_there_are_no_wheels_for_cuda_12(h100: FakeMachine, finding: FindingOf) -> None:
    h100.machine = "aarch64"
    h100.become("NVIDIA GH200 480GB", "sm90")
    assert finding("but no ONNX Runtime on CUDA").advice.endswith("'onnxruntime-gpu[cuda,cudnn]'")
    h100.add_card()  # with a driver for CUDA 12.4
    h100.become("NVIDIA GH200 480GB", "sm90")
    advice = finding("but no ONNX Runtime on CUDA").advice
    assert advice.endswith(f"update the NVIDIA driver to 580 or later, then {INSTALL}")
    h100.add_onnxruntime_gpu(trouble="CUDA failure 35: CUDA driver version is insufficient")
    assert finding("the driver is too old").advice == "update the NVIDIA driver to 580 or later"


def test_a_driver_for_an_older_cuda(h100: FakeMachine, finding: FindingOf, verdict: VerdictOn) -> None:
    h100.add_card()  # for CUDA 12.4
    h100.become("NVIDIA H100 PCIe", "sm90")
    h100.add_onnxruntime_gpu(trouble="Fail: CUDA failure 35: CUDA driver version is insufficient")
    fault = finding(
        "ONNX Runtime 1.31.1: the driver is too old: it is for CUDA 12.4, and what is installed is for CUDA 13"
    )
    assert fault.level == "fault"
    assert fault.advice == (
        "update the NVIDIA driver to 580 or later, or pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"
    )
    assert verdict("onnxruntime-cuda").lacks == ("driver",)


def test_a_driver_for_cuda_11(h100: FakeMachine, finding: FindingOf) -> None:
    h100.add_card("470.223.02", 11040)
    h100.become("Tesla T4", "sm75")
    advice = finding("but no ONNX Runtime on CUDA").advice
    assert "update the NVIDIA driver to 525 or later, then pip install" in advice
    assert advice.endswith("<1.27'")


def test_a_wheel_without_code_for_the_gpu_names_one_that_has(h100: FakeMachine, finding: FindingOf) -> None:
    h100.become("NVIDIA B200", "sm100")
    h100.add_onnxruntime_gpu(trouble=NO_CODE)
    fault = finding("ONNX Runtime 1.31.1 has no code to run on NVIDIA B200 (sm100)")
    assert fault.advice == "pip install 'onnxruntime-gpu[cuda,cudnn]<1.29'"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Ran(-11, ""), "killed by SIGSEGV"),
        (Ran(None, "", "python gave no answer within 40 s", "no answer"), "no answer within 40 s"),
        ({"error": "RuntimeException: CUDA failure 2: out of memory"}, "out of memory"),
    ],
)
def test_what_nobody_foresaw_is_said_as_it_is(
    h100: FakeMachine, finding: FindingOf, answer: Ran | dict[str, str], words: str
) -> None:
    h100.add_onnxruntime_gpu()
    h100.probes["provider CUDAExecutionProvider run"] = answer
    fault = finding("ONNX Runtime 1.31.1 does not run on NVIDIA H100 80GB HBM3 (sm90)")
    assert (words in fault.found, fault.advice) == (True, "")


def test_both_kinds_at_once_beside_a_gpu(h100: FakeMachine, finding: FindingOf) -> None:
    h100.packages["onnxruntime-gpu"] = "1.31.1"
    assert finding("installed at once").advice == (
        "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'llava-deploy[gpu]'"
    )


def test_a_jetson_is_not_sent_for_a_wheel_that_is_not_there(machine: FakeMachine, verdict: VerdictOn) -> None:
    machine.become_orin_nano("MAXN_SUPER")
    found = verdict("onnxruntime-cuda")
    assert (found.missing, found.how.endswith("no wheel of onnxruntime-gpu is for a Jetson")) == ((), True)


def test_a_gpu_that_nothing_is_for(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card("470.223.02", 11040)
    machine.become("NVIDIA GeForce GTX 750", "sm50")
    assert finding("nothing here is for sm50: bundles run on the CPU").level == "hint"
