"""``llava-deploy selftest`` as people and scripts meet it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.manifest import MANIFEST_NAME, read_manifest
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.goldens.record import record

Invoke = Callable[..., Result]
ErrorLine = Callable[[Result], str]
STAGES = ("files", "pixels", "image features", "prompt", "splice", "logits", "tokens")


@pytest.fixture(scope="module")
def recorded(demo_bundle: Path, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With goldens, without an engine."""
    place, leave_out = tmp_path_factory.mktemp("recorded") / "bundle", shutil.ignore_patterns(ENGINES)
    bundle = shutil.copytree(demo_bundle, place, copy_function=os.link, ignore=leave_out)
    record(open_checkpoint(demo_checkpoint), bundle)
    return bundle


@pytest.fixture
def bundle(recorded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(recorded, tmp_path / "bundle", copy_function=os.link)


def test_a_pass_is_a_table_and_exit_code_0(invoke: Invoke, recorded: Path) -> None:
    result = invoke("selftest", recorded, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    for stage in STAGES:
        assert any(line.strip().startswith(stage) for line in result.stdout.splitlines()), stage
    for word in ("Self-test of", "canonical graphs", "recorded with", "numpy", "onnxruntime"):
        assert word in result.stdout
    assert result.stdout.splitlines()[-1].startswith("pass: 3 goldens replayed")


def test_json_alone_on_standard_output(invoke: Invoke, recorded: Path) -> None:
    result = invoke("selftest", recorded, "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["ok"] is True
    assert value["bundle"]["directory"] == str(recorded)
    assert list(dict.fromkeys(stage["kind"] for stage in value["stages"])) == list(STAGES)


def test_a_failure_is_exit_code_1_and_names_the_stage(invoke: Invoke, error_line: ErrorLine, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    (bundle / MANIFEST_NAME).unlink()
    changed = replace(manifest, image=replace(manifest.image, resample=2))
    (bundle / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")
    result = invoke("selftest", bundle, "--threads", 1)
    assert result.exit_code == 1
    assert error_line(result).startswith(
        "error: the self-test failed: pixels of one-picture is the first stage out of tolerance: "
    )
    (line,) = [line for line in result.stdout.splitlines() if "out of tolerance" in line and line.startswith(" pixels")]
    assert "one-picture, of 2: " in line
    result = invoke("selftest", bundle, "--threads", 1, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["first_failure"] == "pixels"


def test_damage_is_a_failure_and_no_bundle_or_no_goldens_an_error(
    invoke: Invoke, error_line: ErrorLine, bundle: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    (bundle / "tokenizer.json").unlink()
    result = invoke("selftest", bundle)
    assert result.exit_code == 1
    assert "tokenizer.json: want a file" in error_line(result)
    assert result.stdout.splitlines()[-1] == "fail: files is the first stage out of tolerance"
    result = invoke("selftest", tmp_path)
    assert result.exit_code == 2
    assert "want a bundle directory" in error_line(result)
    result = invoke("selftest", demo_bundle)
    assert result.exit_code == 2
    assert "llava-deploy record CHECKPOINT" in error_line(result)
    result = invoke("selftest", demo_bundle, "--backend", "tensorrt-rtx", "--threads", 1)
    assert result.exit_code == 2


def test_build_makes_what_is_missing_and_keeps_what_is_there(invoke: Invoke, bundle: Path) -> None:
    result = invoke("selftest", bundle, "--build", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert "no engine for onnxruntime here yet: building it" in result.stderr
    (engine,) = (bundle / ENGINES).iterdir()
    assert f"engine {engine.name}" in result.stdout
    before = engine.stat().st_mtime_ns
    result = invoke("selftest", bundle, "--build", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert "building" not in result.stderr
    assert engine.stat().st_mtime_ns == before


def test_build_of_an_engine_that_is_there_and_that_this_machine_cannot_run(
    invoke: Invoke, error_line: ErrorLine, demo_bundle_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine of onnxruntime-cuda is built anywhere, once."""
    bundle = shutil.copytree(demo_bundle_fp16, tmp_path / "fp16", ignore=shutil.ignore_patterns(ENGINES))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    for said in ("no engine for onnxruntime-cuda here yet: building it", ""):
        result = invoke("selftest", bundle, "--build", "--backend", "onnxruntime-cuda")
        assert result.exit_code != 0
        assert said in result.stderr
        assert said or "building" not in result.stderr


def test_build_where_it_cannot(invoke: Invoke, error_line: ErrorLine, bundle: Path) -> None:
    """Of a damaged bundle nothing is built, and the test says so; for a GPU that is not there the builder says why."""
    result = invoke("selftest", bundle, "--build", "--backend", "tensorrt-rtx")
    assert result.exit_code != 0
    assert "building it" in result.stderr
    (bundle / "embed_tokens.npy").unlink()
    result = invoke("selftest", bundle, "--build")
    assert result.exit_code == 1
    assert "embed_tokens.npy: want a file" in error_line(result)
    assert not (bundle / ENGINES).exists()
