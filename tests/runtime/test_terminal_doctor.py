"""The doctor's tables and its command: the same content as its JSON, legible without colour."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from fake_machine import ROW, FakeMachine, smi

from llava_deploy.runtime.doctor import system
from llava_deploy.runtime.doctor.diagnosis import SCHEMA_VERSION, examine
from llava_deploy.runtime.terminal import show
from llava_deploy.runtime.terminal_doctor import diagnosis_tables

Invoke = Callable[..., Result]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A laptop that the command takes for this machine."""
    (tmp_path / "root").mkdir()
    machine = FakeMachine(tmp_path / "root")
    monkeypatch.setattr(system, "this_system", machine.system)
    return machine


def text_of(machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> str:
    show(diagnosis_tables(examine(machine.system(), [], lambda bundle, room: {})))
    return capsys.readouterr().out


def test_a_pc_in_words(machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.add_card()
    text = text_of(machine, capsys)
    assert "NVIDIA GeForce RTX 4090, sm89, 25.0 GB, 24.0 GB free, 450 W, 41 °C" in text
    assert "550.54.14, CUDA 12.4" in text
    assert "Abacus 9000, 1 core, 8 processors for this process, AVX2, AVX-512, AVX-512 VNNI" in text
    hint = next(line for line in text.splitlines() if line.strip().startswith("hint"))
    assert "but no TensorRT for RTX" in hint
    assert "pip install 'llava-deploy[rtx]'" in hint


def test_a_jetson_in_words(machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.become_orin_nano("25W")
    text = text_of(machine, capsys)
    assert "Developer Kit Super, L4T 36.4.3, JetPack 6.2+b77" in text
    assert "Orin, sm87, shares the host's memory" in text
    assert "mode 25W, GPU clock 306 to 1020 MHz" in text
    assert text.index("warning") < text.index("hint   ") < text.rindex("ok ")


def test_an_h100_without_cudas_libraries_in_words(machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.add_card("580.65.06", 13000)
    machine.become("NVIDIA H100", "sm90")
    machine.add_onnxruntime_gpu(trouble="OSError: libcublasLt.so.13: cannot open shared object file")
    text = text_of(machine, capsys)
    assert (
        "1.31.1 (onnxruntime-gpu 1.31.1), for CUDA 13; providers: Tensorrt, not loading; CUDA, not loading; CPU" in text
    )
    fault = next(line for line in text.splitlines() if line.strip().startswith("fault"))
    assert "NVIDIA H100 is there, but: ONNX Runtime 1.31.1 finds not all of CUDA's libraries" in fault
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'" in fault
    assert "TensorRT for RTX 1.7 does not run on sm90 (NVIDIA H100)" in text


def test_every_finding_and_verdict_of_the_json_is_in_the_tables(
    machine: FakeMachine, invoke: Invoke, demo_bundle: Path
) -> None:
    machine.add_card()
    machine.programs["nvidia-smi"] = smi({**ROW, "mig.mode.current": "Enabled"})
    machine.packages["onnxruntime-gpu"] = "1.26.0"
    plain, said = invoke("doctor", demo_bundle), invoke("doctor", demo_bundle, "--json")
    assert (plain.exit_code, said.exit_code) == (0, 0)
    found = json.loads(said.stdout)
    assert (found["schema"], found["trouble"]) == (SCHEMA_VERSION, "")
    squeezed = "".join(plain.stdout.split())
    words = [text for each in found["findings"] for text in (each["level"], each["found"], each["advice"])]
    words += [text for each in found["backends"] for text in (each["backend"], each["how"], *each["missing"])]
    words += [each["how"] for bundle in found["bundles"] for each in bundle["backends"]]
    words += [command for bundle in found["bundles"] for command in bundle["next"]]
    assert {finding["level"] for finding in found["findings"]} >= {"fault", "hint", "ok"}
    short = [text for text in words if len(text) < 60]  # longer ones are folded into columns
    assert len(short) > 15
    assert [text for text in short if "".join(text.split()) not in squeezed] == []
    assert "\x1b" not in plain.stdout


def test_where_nothing_runs_the_command_fails(
    machine: FakeMachine, invoke: Invoke, error_line: Callable[[Result], str]
) -> None:
    del machine.packages["onnxruntime"], machine.probes["module onnxruntime"]
    result = invoke("doctor")
    assert (result.exit_code, "pip install 'llava-deploy[cpu]'" in result.stdout) == (1, True)
    assert error_line(result) == "error: no backend here can run a bundle; install one as the findings say"


def test_a_bundle_that_runs_nowhere_fails(
    machine: FakeMachine, invoke: Invoke, demo_bundle: Path, tmp_path: Path, error_line: Callable[[Result], str]
) -> None:
    result = invoke("doctor", demo_bundle, tmp_path / "[none]", "--json")
    assert result.exit_code == 1
    assert error_line(result) == f"error: no backend here runs {tmp_path / '[none]'} as it is"
    assert [bool(bundle["trouble"]) for bundle in json.loads(result.stdout)["bundles"]] == [False, True]
    assert f"Bundle {tmp_path / '[none]'}" in invoke("doctor", tmp_path / "[none]").stdout
