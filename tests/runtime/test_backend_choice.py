"""Which backend is taken, and what is said of the others: engines that are only files, on a GPU that is only a name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import onnxruntime
import pytest
from click.testing import Result

from llava_deploy.engines.engine_manifest import (
    ENGINE_FORMAT_VERSION,
    ENGINE_MANIFEST,
    ENGINES,
    EngineKey,
    EngineManifest,
    source_digest,
)
from llava_deploy.engines.errors import BackendError, BundleError, LlavaDeployError, OptionError
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.manifest import describe_file, read_manifest
from llava_deploy.engines.tensorrt_module import TensorRtBackend, TensorRtModule
from llava_deploy.engines.tensorrt_recipe import EngineLimits, TensorRtRecipe
from llava_deploy.runtime import Llava, backend_choice, onnxruntime_backend, tensorrt_choice
from llava_deploy.runtime.backend_choice import OnnxRuntimeChoice, Wanted, choose
from llava_deploy.runtime.bundle import open_bundle
from llava_deploy.runtime.tensorrt_choice import TensorRtChoice

VERSIONS: dict[TensorRtBackend, str] = {"tensorrt": "10.13.3.9", "tensorrt-rtx": "1.7.1.116"}
RECIPE = TensorRtRecipe(
    "1.7", "in-place", (4,), EngineLimits(2, 64, 32, 2, 1, 16, 32, 1), ("sm86", "sm89"), None, False, False
)
PLANS = ("vision.plan", "decoder.plan")
ON_THE_CPU = f"ONNX Runtime {onnxruntime.__version__} on the CPU, canonical graphs"
NEW, OLD = "1.7.1.116", "1.6.0.1"
ENGINE = f"tensorrt-rtx-{NEW}-sm86-sm89"
COMMAND = "llava-deploy build BUNDLE --backend tensorrt-rtx"
BUILD = f"; build one for this machine with: {COMMAND}"

AddEngine = Callable[..., Path]


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own, without engines."""
    return shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))


@pytest.fixture
def add_engine(bundle: Path) -> AddEngine:
    """Put an engine into the bundle, built as the arguments say."""

    def add(
        backend: TensorRtBackend = "tensorrt-rtx",
        version: str | None = None,
        recipe: TensorRtRecipe = RECIPE,
        source: str | None = None,
    ) -> Path:
        digest = source_digest(read_manifest(bundle)) if source is None else source
        found = VERSIONS[backend] if version is None else version
        key = EngineKey(backend, found, "-".join(recipe.capabilities), digest, None, recipe)
        directory = bundle / key.directory
        directory.mkdir(parents=True)
        for name in PLANS:
            (directory / name).write_bytes(name.encode())
        files = tuple(describe_file(directory, name) for name in PLANS)
        (directory / ENGINE_MANIFEST).write_text(EngineManifest(ENGINE_FORMAT_VERSION, key, {}, files).to_json())
        return directory

    return add


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both modules and an sm89 GPU are here."""
    gpu = SimpleNamespace(name="a GPU", capability="sm89")
    monkeypatch.setattr(tensorrt_choice, "Device", lambda: gpu)
    monkeypatch.setattr(
        tensorrt_choice,
        "import_tensorrt",
        lambda backend: TensorRtModule(backend, ModuleType("none"), VERSIONS[backend]),
    )


def fail(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    def failing(*_: Any) -> None:
        raise BackendError(message)

    monkeypatch.setattr(tensorrt_choice, name, failing)


def chosen(bundle: Path, **wanted: Any) -> OnnxRuntimeChoice | TensorRtChoice:
    return choose(open_bundle(bundle), Wanted(**wanted), Integrity.QUICK)


def test_a_bundle_without_engines_asks_for_no_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Device", "import_tensorrt"):
        monkeypatch.setattr(tensorrt_choice, name, lambda *_: pytest.fail("nobody asked for TensorRT"))
    monkeypatch.setattr(backend_choice, "_GPU_FILES", ())
    assert chosen(bundle).reason == f"{ON_THE_CPU}; llava-deploy build makes it start sooner"


def test_a_gpu_that_lies_idle_is_pointed_out(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_choice, "_GPU_FILES", (tmp_path,))
    command = f"llava-deploy build {bundle} --backend tensorrt-rtx makes the bundle run on it"
    assert chosen(bundle).reason.endswith(f"; this machine has an NVIDIA GPU: {command}")
    assert "NVIDIA" not in chosen(bundle, backend="onnxruntime").reason


@pytest.mark.parametrize("backend", get_args(TensorRtBackend))
def test_an_engine_that_runs_here_is_taken(bundle: Path, add_engine: AddEngine, backend: TensorRtBackend) -> None:
    directory = add_engine(backend)
    name = {"tensorrt": "TensorRT 10.13.3.9", "tensorrt-rtx": "TensorRT for RTX 1.7.1.116"}[backend]
    for asked in ("auto", backend):
        found = chosen(bundle, backend=asked)
        assert isinstance(found, TensorRtChoice)
        assert (found.directory, found.recipe, found.max_len) == (directory, RECIPE, 64)
        assert found.module.backend == backend
        assert found.reason == f"{name} on a GPU (sm89), engine {directory.name}"
    assert isinstance(chosen(bundle, backend="onnxruntime"), OnnxRuntimeChoice)


def test_of_two_the_full_tensorrt_is_taken(bundle: Path, add_engine: AddEngine) -> None:
    add_engine("tensorrt-rtx")
    full = add_engine("tensorrt")
    found = chosen(bundle)
    assert isinstance(found, TensorRtChoice)
    assert found.directory == full
    other = chosen(bundle, backend="tensorrt-rtx")
    assert isinstance(other, TensorRtChoice)
    assert other.module.backend == "tensorrt-rtx"


def test_of_several_engines_the_one_for_this_gpu(bundle: Path, add_engine: AddEngine) -> None:
    add_engine(recipe=replace(RECIPE, capabilities=("sm120",)))
    add_engine(version=OLD)
    mine = add_engine()
    found = chosen(bundle)
    assert isinstance(found, TensorRtChoice)
    assert found.directory == mine


def test_a_manifest_that_cannot_be_read_is_in_no_other_engines_way(bundle: Path, add_engine: AddEngine) -> None:
    damaged = add_engine(recipe=replace(RECIPE, capabilities=("sm120",)))
    (damaged / ENGINE_MANIFEST).write_text("{")
    again = f"build it again with: llava-deploy build {bundle} --backend tensorrt-rtx"
    with pytest.raises(BundleError, match=f"{re.escape(again)}$"):
        chosen(bundle)
    mine = add_engine()
    found = chosen(bundle)
    assert isinstance(found, TensorRtChoice)
    assert found.directory == mine


def test_a_shorter_cache_than_the_engines(bundle: Path, add_engine: AddEngine) -> None:
    add_engine()
    found = chosen(bundle, max_len=40)
    assert isinstance(found, TensorRtChoice)
    assert found.max_len == 40


Refusal = tuple[Callable[[AddEngine, pytest.MonkeyPatch], object], dict[str, Any], str]

REFUSALS: dict[str, Refusal] = {
    "no GPU": (lambda add, patch: (add(), fail(patch, "Device", "no driver here")), {}, "no driver here"),
    "no module": (lambda add, patch: (add(), fail(patch, "import_tensorrt", "not there")), {}, "not there"),
    "another version": (
        lambda add, _: add(version=OLD),
        {},
        f"{ENGINE.replace(NEW, OLD)} was built with TensorRT for RTX {OLD}, and {NEW} is installed{BUILD}",
    ),
    "another GPU": (
        lambda add, _: add(recipe=replace(RECIPE, capabilities=("sm75", "sm120"))),
        {},
        f"engine tensorrt-rtx-1.7.1.116-sm75-sm120 was built for sm75, sm120, and the GPU is sm89 (a GPU){BUILD}",
    ),
    "other graphs": (
        lambda add, _: add(source="0" * 64),
        {},
        f"engine {ENGINE} was built from other graphs than the bundle holds{BUILD}",
    ),
    "two": (
        lambda add, _: (add(version=OLD), add(source="0" * 64)),
        {},
        f"1.7.1.116 is installed; engine {ENGINE} was built from other graphs than",
    ),
    "too long": (
        lambda add, _: add(),
        {"max_len": 65},
        f"max_len: engine {ENGINE} was built for 64, got 65; build another with: {COMMAND} --max-len 65",
    ),
    "threads": (lambda add, _: add(), {"threads": 2}, "threads: only ONNX Runtime on the CPU has it"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_why_it_does_not_run_is_said(
    bundle: Path, add_engine: AddEngine, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """In the sentence of what runs in its place, or as the error of what was asked for."""
    prepare, wanted, message = REFUSALS[case]
    prepare(add_engine, monkeypatch)
    message = message.replace("BUNDLE", str(bundle))
    found = chosen(bundle, **wanted)
    assert isinstance(found, OnnxRuntimeChoice)
    assert found.reason.startswith(f"{ON_THE_CPU}; llava-deploy build makes it start sooner; not TensorRT for RTX: ")
    assert message in found.reason
    with pytest.raises((BackendError, OptionError)) as caught:
        chosen(bundle, backend="tensorrt-rtx", **wanted)
    assert message in str(caught.value)
    assert "\n" not in found.reason + str(caught.value)


def test_every_backend_that_does_not_run_is_named(
    bundle: Path, add_engine: AddEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_engine("tensorrt-rtx")
    add_engine("tensorrt")
    fail(monkeypatch, "Device", "no driver here")
    monkeypatch.setattr(backend_choice, "_GPU_FILES", (bundle,))  # which is then no news
    ending = "; not TensorRT: no driver here; not TensorRT for RTX: no driver here"
    assert chosen(bundle).reason.endswith(ending)

    def absent() -> str:
        raise BackendError("ONNX Runtime cannot be imported")

    monkeypatch.setattr(backend_choice, "onnxruntime_version", absent)
    with pytest.raises(BackendError, match=f"ONNX Runtime cannot be imported{ending}"):
        chosen(bundle)


@pytest.mark.parametrize(
    ("backend", "built", "compatible", "runs"),
    [
        ("tensorrt", "10.13.3.9", False, True),
        ("tensorrt", "10.13.3.8", True, True),
        ("tensorrt", "10.12.0.1", True, True),
        ("tensorrt", "10.12.0.1", False, False),
        ("tensorrt", "10.14.0.1", True, False),
        ("tensorrt", "9.3.0.1", True, False),
    ],
)
def test_versions_that_run_one_anothers_engines(
    bundle: Path, add_engine: AddEngine, backend: TensorRtBackend, built: str, compatible: bool, runs: bool
) -> None:
    add_engine(backend, built, replace(RECIPE, version_compatible=compatible))
    assert isinstance(chosen(bundle), TensorRtChoice) == runs


def test_an_engine_that_was_asked_for_and_is_not_there(bundle: Path, add_engine: AddEngine) -> None:
    add_engine("tensorrt-rtx")
    (bundle / ENGINES / "tensorrt-notes").mkdir()
    (bundle / ENGINES / ".tensorrt-10.13.3.9-sm89.partial-abcdefgh").mkdir()
    command = f"build one with: llava-deploy build {bundle} --backend tensorrt"
    with pytest.raises(BackendError, match=rf"{bundle}: no engine of TensorRT; {command}$"):
        Llava.load(bundle, backend="tensorrt")


def test_a_backend_that_nobody_knows(bundle: Path) -> None:
    with pytest.raises(
        OptionError,
        match="backend: want one of auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx, got 'cuda'",
    ):
        Llava.load(bundle, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["threads", "accuracy_level"])
def test_onnx_runtimes_options_are_refused_with_another_backend(bundle: Path, option: str) -> None:
    with pytest.raises(
        OptionError, match=f"{option}: only ONNX Runtime on the CPU has it; leave it out for TensorRT for RTX"
    ):
        Llava.load(bundle, backend="tensorrt-rtx", **{option: 1})  # type: ignore[arg-type]


def test_onnx_runtime_is_not_needed_where_tensorrt_runs(
    bundle: Path, add_engine: AddEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_engine()

    def absent() -> None:
        raise LlavaDeployError("nobody needs it")

    monkeypatch.setattr(onnxruntime_backend, "import_onnxruntime", absent)
    assert isinstance(chosen(bundle), TensorRtChoice)


@pytest.mark.parametrize("command", [("run", "--prompt", "hello"), ("eval", "--per-kind", "1")])
def test_the_commands_take_the_backend(
    bundle: Path, add_engine: AddEngine, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...],
    invoke: Callable[..., Result], error_line: Callable[[Result], str],
) -> None:  # fmt: skip
    add_engine()
    fail(monkeypatch, "Device", "no driver here")
    refused = invoke(command[0], bundle, *command[1:], "--backend", "tensorrt-rtx")
    assert (error_line(refused), refused.exit_code) == ("error: no driver here", 1)
    answered = invoke(command[0], bundle, *command[1:], "--max-new-tokens", "2")
    assert answered.exit_code == 0
    assert f"{ON_THE_CPU}; llava-deploy build makes it start sooner; not TensorRT for RTX: no dri" in answered.stderr
