"""What bundles could do on machines that are only described; engines are files that nothing deserialises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import GB, FakeMachine

from llava_deploy.engines.engine_manifest import (
    ENGINE_FORMAT_VERSION,
    ENGINE_MANIFEST,
    ENGINES,
    EngineKey,
    EngineManifest,
    source_digest,
)
from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, read_manifest
from llava_deploy.engines.tensorrt_recipe import EngineLimits, TensorRtRecipe
from llava_deploy.runtime.doctor.bundles import BundleBackend
from llava_deploy.runtime.doctor.diagnosis import Diagnosis

Diagnose = Callable[..., Diagnosis]
RECIPE = TensorRtRecipe(
    "1.7", "in-place", (4,), EngineLimits(1, 64, 32, 1, 1, 16, 32, 1), ("sm86", "sm89"), None, False, False
)


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own, without engines."""
    return shutil.copytree(demo_bundle, tmp_path / "a bundle", ignore=shutil.ignore_patterns(ENGINES))


def add_engine(bundle: Path, version: str = "1.7.1.116", recipe: TensorRtRecipe = RECIPE, source: str = "") -> None:
    digest = source or source_digest(read_manifest(bundle))
    key = EngineKey("tensorrt-rtx", version, "-".join(recipe.capabilities), digest, None, recipe)
    directory = bundle / key.directory
    directory.mkdir(parents=True)
    (directory / ENGINE_MANIFEST).write_text(EngineManifest(ENGINE_FORMAT_VERSION, key, {}, ()).to_json())


def on(diagnosis: Diagnosis, backend: str) -> BundleBackend:
    return next(each for each in diagnosis.bundles[0].backends if each.backend == backend)


def leave_graphs_out(bundle: Path) -> None:
    """As an archive may do."""
    manifest = read_manifest(bundle)
    out = tuple(entry for entry in manifest.files if ".onnx" in entry.path)
    for entry in out:
        (bundle / entry.path).unlink()
    kept = tuple(entry for entry in manifest.files if entry not in out)
    (bundle / MANIFEST_NAME).write_text(replace(manifest, files=kept, left_out=out).to_json(), encoding="utf-8")


def test_on_a_laptop_it_runs_on_the_canonical_graphs(bundle: Path, diagnose: Diagnose) -> None:
    diagnosis = diagnose(bundle)
    found = on(diagnosis, "onnxruntime")
    assert (found.state, found.fits) == ("runs", True)
    assert found.how == "ONNX Runtime 1.32.0 on the CPU, canonical graphs"
    assert on(diagnosis, "tensorrt-rtx").how == "no NVIDIA GPU"
    assert diagnosis.bundles[0].next == (
        f"llava-deploy chat '{bundle}' --image PICTURE",
        f"llava-deploy build '{bundle}' --backend onnxruntime",
        f"llava-deploy record CHECKPOINT '{bundle}'",
    )
    assert (diagnosis.trouble, diagnosis.bundles[0].goldens) == ("", False)


def test_beside_a_gpu_a_build_is_what_comes_next(bundle: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    diagnosis = diagnose(bundle)
    found = on(diagnosis, "tensorrt-rtx")
    assert (found.state, found.how, found.fits) == ("build first", "no engine", True)
    assert f"llava-deploy build '{bundle}' --backend tensorrt-rtx" in diagnosis.bundles[0].next
    del machine.packages["onnx-ir"]
    assert on(diagnose(bundle), "tensorrt-rtx").state == "cannot"


def test_an_engine_for_what_is_here_runs(bundle: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    add_engine(bundle)
    found = on(diagnose(bundle), "tensorrt-rtx")
    assert found.state == "runs"
    assert found.how.endswith("on NVIDIA GeForce RTX 4090, engine tensorrt-rtx-1.7.1.116-sm86-sm89")


@pytest.mark.parametrize(
    ("built", "words"),
    [
        ({"version": "1.6.0.1"}, "built with TensorRT for RTX 1.6.0.1, and 1.7.1.116 is installed"),
        ({"recipe": replace(RECIPE, capabilities=("sm120",))}, "built for sm120, and the GPU is sm89"),
        ({"source": "0" * 64}, "built from other graphs than the bundle holds"),
    ],
)
def test_an_engine_for_something_else_says_for_what(
    bundle: Path, machine: FakeMachine, diagnose: Diagnose, built: dict, words: str
) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    add_engine(bundle, **built)
    found = on(diagnose(bundle), "tensorrt-rtx")
    assert (found.state, words in found.how) == ("build first", True)


def test_an_engine_that_cannot_be_read_is_no_crash(bundle: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    add_engine(bundle)
    (bundle / ENGINES / "tensorrt-rtx-1.7.1.116-sm86-sm89" / ENGINE_MANIFEST).write_text("{}", encoding="utf-8")
    assert "cannot be read" in on(diagnose(bundle), "tensorrt-rtx").how


def test_an_engine_without_its_tensorrt_says_what_to_install(
    bundle: Path, machine: FakeMachine, diagnose: Diagnose
) -> None:
    machine.add_card()
    add_engine(bundle)
    found = on(diagnose(bundle), "tensorrt-rtx")
    assert (found.state, found.next) == ("cannot", "pip install 'llava-deploy[rtx]'")
    assert found.how.endswith("it has an engine of TensorRT for RTX")


def test_left_out_graphs_leave_the_engines(bundle: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    add_engine(bundle)
    leave_graphs_out(bundle)
    diagnosis = diagnose(bundle)
    assert "left out" in on(diagnosis, "onnxruntime").how
    assert [on(diagnosis, name).state for name in ("onnxruntime", "tensorrt-rtx")] == ["cannot", "runs"]
    shutil.rmtree(bundle / ENGINES)
    diagnosis = diagnose(bundle)
    assert on(diagnosis, "tensorrt-rtx").how == "no engine, and its graphs, to build one from, were left out"
    assert diagnosis.trouble == f"no backend here runs {bundle} as it is"
    assert diagnosis.findings[0].level == "fault"


def test_what_does_not_fit_says_how_much_would(bundle: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.memory(16_000_000, 100_000)
    room = on(diagnose(bundle), "onnxruntime")
    low, high = 1, 16_000_000
    while high - low > 200:  # kB: between not even one token and the whole length
        machine.memory(16_000_000, (low + high) // 2)
        room = on(diagnose(bundle), "onnxruntime")
        if room.largest_len == 0:
            low = (low + high) // 2
        elif room.fits:
            high = (low + high) // 2
        else:
            break
    assert (room.fits, 0 < (room.largest_len or 0) < 1024) == (False, True)
    warning = next(each for each in diagnose(bundle).findings if "tokens of context" in each.found)
    assert warning.advice.endswith(f"--max-len {room.largest_len}")
    machine.memory(16_000_000, 10_000)
    diagnosis = diagnose(bundle)
    assert (on(diagnosis, "onnxruntime").largest_len, diagnosis.bundles[0].runs) == (0, False)


def test_the_gpus_free_memory_is_what_counts(bundle: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    machine.add_card()
    machine.add_tensorrt_rtx()
    add_engine(bundle)
    machine.probes["cuda"]["devices"][0]["free"] = GB // 1000
    assert on(diagnose(bundle), "tensorrt-rtx").fits is False


def test_goldens_are_replayed_first(bundle: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    manifest = read_manifest(bundle)
    (bundle / "goldens").mkdir()
    (bundle / "goldens/goldens.json").write_text("{}", encoding="utf-8")
    entry = describe_file(bundle, "goldens/goldens.json")
    (bundle / MANIFEST_NAME).write_text(replace(manifest, files=(*manifest.files, entry)).to_json(), encoding="utf-8")
    report = diagnose(bundle).bundles[0]
    assert (report.goldens, report.next[0]) == (True, f"llava-deploy selftest '{bundle}'")


def test_what_is_no_bundle_is_a_finding(bundle: Path, tmp_path: Path, machine: FakeMachine, diagnose: Diagnose) -> None:
    (tmp_path / "empty").mkdir()
    (bundle / "decoder.onnx").write_bytes(b"short")
    diagnosis = diagnose(tmp_path / "empty", bundle)
    assert "manifest.json" in diagnosis.bundles[0].trouble
    assert "decoder.onnx" in diagnosis.bundles[1].trouble
    assert [each.level for each in diagnosis.findings][:2] == ["fault", "fault"]
    assert not any(report.runs for report in diagnosis.bundles)
    assert json.loads(json.dumps(diagnosis.to_dict()))["bundles"][0]["backends"] == []
