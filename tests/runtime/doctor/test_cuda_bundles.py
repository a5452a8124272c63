"""What bundles could do with ONNX Runtime on a GPU that is only described; their engines are real ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import FakeMachine

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, read_engine_manifest
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.runtime.doctor.bundles import BundleBackend
from llava_deploy.runtime.doctor.diagnosis import Diagnosis

Diagnose = Callable[..., Diagnosis]
ENGINE = "onnxruntime-cuda-1.25-cuda"


@pytest.fixture
def machine(machine: FakeMachine) -> FakeMachine:
    """An H100 with what it takes."""
    machine.add_card("580.65.06", 13000)
    machine.become("NVIDIA H100 80GB HBM3", "sm90")
    machine.add_onnxruntime_gpu()
    return machine


@pytest.fixture(scope="module")
def built(demo_bundle_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of float16 with an engine; not to be written to."""
    bundle = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(demo_bundle_fp16, bundle, ignore=shutil.ignore_patterns(ENGINES))
    assert build_onnxruntime_cuda(bundle).name == ENGINE
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(built, tmp_path / "bundle")


def on_cuda(diagnosis: Diagnosis) -> BundleBackend:
    return next(each for each in diagnosis.bundles[0].backends if each.backend == "onnxruntime-cuda")


def test_an_engine_runs_on_any_gpu_and_release(built: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    found = on_cuda(diagnose(built))
    assert (found.state, found.next) == ("runs", "")
    assert found.how == f"ONNX Runtime 1.31.1 on NVIDIA H100 80GB HBM3, engine {ENGINE}"
    machine.become("NVIDIA GeForce GTX 1660", "sm75")
    machine.add_onnxruntime_gpu("1.26.0", "12.8")
    found = on_cuda(diagnose(built))
    assert (found.state, found.how) == ("runs", f"ONNX Runtime 1.26.0 on NVIDIA GeForce GTX 1660, engine {ENGINE}")
    assert diagnose(built).trouble == ""


def test_without_an_engine_a_build_comes_next(demo_bundle_fp16: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    diagnosis = diagnose(demo_bundle_fp16)
    found = on_cuda(diagnosis)
    assert (found.state, found.how) == ("build first", "no engine")
    assert found.next in diagnosis.bundles[0].next
    assert found.next.endswith("--backend onnxruntime-cuda")
    del machine.packages["onnx-ir"]
    found = on_cuda(diagnose(demo_bundle_fp16))
    assert (found.state, found.next) == ("cannot", "pip install 'llava-deploy[build]'")


def test_a_bundle_of_float32_cannot(demo_bundle: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    diagnosis = diagnose(demo_bundle)
    found = on_cuda(diagnosis)
    assert (found.state, found.fits, found.next) == ("cannot", None, "")
    assert "wants a bundle of float16, found float32; export it with --precision fp16" in found.how
    assert not any("onnxruntime-cuda" in command for command in diagnosis.bundles[0].next)
    assert diagnosis.trouble == ""  # it runs on the CPU


def test_what_is_missing_is_said_before_what_could_be_built(
    bundle: Path, machine: FakeMachine, diagnose: Diagnose
) -> None:
    machine.add_onnxruntime_gpu(trouble="OSError: libcublasLt.so.13: cannot open shared object file")
    found = on_cuda(diagnose(bundle))
    assert (found.state, found.next) == ("cannot", "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'")
    assert found.how.endswith("; it has an engine of ONNX Runtime on CUDA")
    shutil.rmtree(bundle / ENGINES)
    assert on_cuda(diagnose(bundle)).next == ""


def test_an_engine_of_other_graphs_or_a_damaged_one_is_built_again(
    bundle: Path, machine: FakeMachine, diagnose: Diagnose
) -> None:
    directory = bundle / ENGINES / ENGINE
    graph = directory / "decoder.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    found = on_cuda(diagnose(bundle))
    assert (found.state, "decoder.onnx" in found.how) == ("build first", True)
    graph.write_bytes(content)
    engine = read_engine_manifest(directory)
    other = replace(engine, key=replace(engine.key, source="0" * 64))
    (directory / ENGINE_MANIFEST).write_text(other.to_json(), encoding="utf-8")
    found = on_cuda(diagnose(bundle))
    assert (found.state, "was built from other graphs" in found.how) == ("build first", True)
    (directory / ENGINE_MANIFEST).write_text("{}", encoding="utf-8")
    assert "cannot be read" in on_cuda(diagnose(bundle)).how
