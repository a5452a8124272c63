"""What is installed, what loads, and what excludes each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_machine import FakeMachine

from llava_deploy.runtime.doctor.diagnosis import Diagnosis
from llava_deploy.runtime.doctor.findings import Finding
from llava_deploy.runtime.doctor.packages import LEAST
from llava_deploy.runtime.doctor.system import Ran

Diagnose = Callable[[], Diagnosis]
FindingOf = Callable[[str], Finding]
ROOT = Path(__file__).resolve().parents[3]


def test_both_kinds_of_onnx_runtime_at_once_are_a_fault(machine: FakeMachine, finding: FindingOf) -> None:
    machine.packages["onnxruntime-gpu"] = "1.26.0"
    fault = finding("installed at once")
    assert (fault.level, fault.found.startswith("onnxruntime and onnxruntime-gpu are")) == ("fault", True)
    assert fault.advice == "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'llava-deploy[cpu]'"


def test_onnxruntime_gpu_alone_is_well(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.packages["onnxruntime-gpu"] = machine.packages.pop("onnxruntime")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    machine.probes["module onnxruntime"]["providers"] = providers
    machine.probes["provider CUDAExecutionProvider"] = {"loaded": True}
    diagnosis = diagnose()
    assert diagnosis.packages.providers == {"CUDAExecutionProvider": "", "CPUExecutionProvider": ""}
    assert {each.level for each in diagnosis.findings} == {"ok"}


def test_the_bare_base_install_is_told_to_get_onnx_runtime(machine: FakeMachine, diagnose: Diagnose) -> None:
    del machine.packages["onnxruntime"], machine.probes["module onnxruntime"]
    diagnosis = diagnose()
    assert diagnosis.findings[0] == Finding("fault", "ONNX Runtime is not installed", "pip install 'llava-deploy[cpu]'")
    assert diagnosis.backends[0].missing == ("pip install 'llava-deploy[cpu]'",)
    assert diagnosis.trouble.startswith("no backend here can run a bundle")


def test_without_onnx_runtime_a_gpu_does(machine: FakeMachine, finding: FindingOf, diagnose: Diagnose) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    del machine.packages["onnxruntime"], machine.probes["module onnxruntime"]
    assert finding("ONNX Runtime is not installed").level == "hint"
    assert diagnose().trouble == ""


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Ran(-11, "library says hello\n"), "killed by SIGSEGV while it was loaded"),
        (Ran(3, ""), "ended with exit status 3"),
        (Ran(None, "", "python gave no answer within 40 s", "no answer"), "no answer within 40 s"),
        ({"error": "ImportError: libstdc++.so.6: version GLIBCXX_3.4.30 not found"}, "GLIBCXX_3.4.30"),
        ({"error": "ModuleNotFoundError: No module named 'onnxruntime.capi'"}, "No module named"),
        (Ran(0, '[1, 2]\n"text"\n'), "exit status 0"),
    ],
)
def test_an_onnx_runtime_that_does_not_load(
    machine: FakeMachine, diagnose: Diagnose, answer: Ran | dict, words: str
) -> None:
    machine.probes["module onnxruntime"] = answer
    diagnosis = diagnose()
    fault = diagnosis.findings[0]
    assert (fault.level, words in fault.found) == ("fault", True)
    assert fault.advice == "pip uninstall onnxruntime, then pip install 'llava-deploy[cpu]'"
    assert not diagnosis.backends[0].runs


def test_an_onnx_runtime_that_is_too_old(machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.probes["module onnxruntime"]["version"] = "1.18.1"
    verdict = diagnose().backends[0]
    assert (verdict.runs, verdict.how) == (False, "ONNX Runtime 1.18.1 is older than 1.25")
    assert verdict.missing == ("pip install --upgrade 'llava-deploy[cpu]'",)


def test_tensorrt_that_crashes_is_a_fault_beside_a_gpu_only(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_tensorrt_rtx()
    machine.probes["module tensorrt_rtx"] = Ran(-6, "")
    assert finding("but cannot be loaded: killed by SIGABRT").level == "warning"
    machine.add_card()
    faults = finding("TensorRT for RTX is installed (tensorrt-rtx-cu12 1.7.1.116")
    assert faults.level == "fault"


def test_tensorrt_without_cuda_python(machine: FakeMachine, finding: FindingOf) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    del machine.packages["cuda-python"], machine.probes["cuda-python"]
    fault = finding("cuda-python is not installed")
    assert (fault.level, fault.advice) == ("fault", "pip install 'cuda-python==12.*'")


def test_without_onnx_ir_nothing_is_built(machine: FakeMachine, finding: FindingOf) -> None:
    del machine.packages["onnx-ir"]
    assert finding("onnx-ir is not installed").level == "hint"


def test_the_least_versions_are_those_of_the_extras() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = dict(re.findall(r'"([a-z0-9-]+)>=([\d.]+)"', text))
    found = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu12"}
    assert {name: tuple(map(int, wanted[found[name]].split("."))) for name in LEAST} == LEAST
