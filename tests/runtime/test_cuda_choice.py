"""When ONNX Runtime on CUDA is taken, and what is said where it is not; sessions are the CPU's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from click.testing import Result

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, EngineManifest, read_engine_manifest
from llava_deploy.engines.errors import BackendError, BundleError, OptionError
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.onnxruntime_cuda import CUDA_PROVIDER
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.runtime import Llava, backend_choice, cuda_choice, onnxruntime_cuda
from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import pack
from llava_deploy.runtime.archive.unpack import unpack
from llava_deploy.runtime.backend_choice import OnnxRuntimeChoice, Wanted, choose
from llava_deploy.runtime.bundle import open_bundle
from llava_deploy.runtime.cuda_choice import CudaChoice
from llava_deploy.runtime.cuda_provider import Provider
from llava_deploy.runtime.loading import open_sessions

NAME = "onnxruntime-cuda-1.25-cuda"


@pytest.fixture
def bundle(demo_bundle_fp16: Path, tmp_path: Path) -> Path:
    """A bundle of its own, with an engine."""
    bundle = shutil.copytree(demo_bundle_fp16, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    build_onnxruntime_cuda(bundle)
    return bundle


def installed(monkeypatch: pytest.MonkeyPatch, version: str, *providers: str) -> None:
    found = SimpleNamespace(__version__=version, get_available_providers=lambda: [*providers])
    monkeypatch.setattr(cuda_choice, "import_onnxruntime", lambda: found)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime that has the provider; where it loads graphs, the CPU's does."""
    installed(monkeypatch, "1.31.1", CUDA_PROVIDER, "CPUExecutionProvider")
    on_the_cpu = Provider("CPUExecutionProvider", "cpu", captures=False)
    for name in ("OnnxRuntimeCudaVision", "OnnxRuntimeCudaDecoder"):
        monkeypatch.setattr(getattr(onnxruntime_cuda, name).__init__, "__defaults__", (on_the_cpu,))


def chosen(bundle: Path, wanted: Wanted) -> object:
    return choose(open_bundle(bundle), wanted, Integrity.QUICK)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["auto", "onnxruntime-cuda"])
def test_an_engine_that_runs_here_is_taken(bundle: Path, backend: str) -> None:
    found = chosen(bundle, Wanted(backend))  # type: ignore[arg-type]
    home = bundle / ENGINES / NAME
    reason = f"ONNX Runtime 1.31.1 on CUDA, engine {NAME}"
    assert found == CudaChoice(home / "vision.onnx", home / "decoder.onnx", reason)
    assert found.backend == "onnxruntime-cuda"


@pytest.mark.usefixtures("gpu")
def test_it_answers_as_the_canonical_graphs_do(bundle: Path) -> None:
    llava = Llava.load(bundle, max_len=128)
    assert llava.backend == f"ONNX Runtime 1.31.1 on CUDA, engine {NAME}"
    plain = Llava.load(bundle, backend="onnxruntime", max_len=128)
    prompts = ["USER: What do you see? ASSISTANT:", "USER: Hello ASSISTANT:"]
    answers = [[answer.token_ids for answer in one.generate(prompts, max_new_tokens=8)] for one in (llava, plain)]
    assert answers[0] == answers[1]
    assert llava.max_len == 128


@pytest.mark.usefixtures("gpu")
def test_an_archive_of_the_engine_alone_answers(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "model.lvd", PackOptions(engines=(NAME,), graphs=False, goldens=False))
    unpack(tmp_path / "model.lvd", tmp_path / "unpacked")
    assert not (tmp_path / "unpacked" / "decoder.onnx").exists()
    llava = Llava.load(tmp_path / "unpacked", max_len=64)
    assert llava.backend.startswith("ONNX Runtime 1.31.1 on CUDA")
    (answer,) = llava.generate(["USER: Hello ASSISTANT:"], max_new_tokens=2)
    assert len(answer.token_ids) == 2


@pytest.mark.usefixtures("gpu")
def test_without_a_max_len_the_cache_is_as_long_as_on_the_cpu(bundle: Path) -> None:
    sessions = open_sessions(open_bundle(bundle), Wanted("onnxruntime-cuda"), Integrity.QUICK)
    assert sessions.decoder.max_len == open_bundle(bundle).manifest.decoder.max_positions
    assert sessions.backend == "onnxruntime-cuda"


@pytest.mark.parametrize(
    ("version", "providers", "found"),
    [
        ("1.32.0", ["CPUExecutionProvider"], "1.32.0 with CPUExecutionProvider"),
        ("1.24.4", [CUDA_PROVIDER, "CPUExecutionProvider"], "1.24.4 with CUDAExecutionProvider, CPUExecutionProvider"),
    ],
)
def test_what_is_installed_does_not_do(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, version: str, providers: list[str], found: str
) -> None:
    installed(monkeypatch, version, *providers)
    message = f"want ONNX Runtime 1.25 or later with CUDAExecutionProvider, found {found}; put onnxruntime-gpu in the"
    with pytest.raises(BackendError, match=message):
        chosen(bundle, Wanted("onnxruntime-cuda"))
    fallen_back = chosen(bundle, Wanted())
    assert isinstance(fallen_back, OnnxRuntimeChoice)
    assert f"; not ONNX Runtime on CUDA: {message}" in fallen_back.reason


def test_a_damaged_engine_is_of_no_concern_where_none_could_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with TensorRT's: a machine without a GPU answers on the CPU."""
    (bundle / ENGINES / NAME / ENGINE_MANIFEST).write_text("{}")
    installed(monkeypatch, "1.31.1", "CPUExecutionProvider")
    assert isinstance(chosen(bundle, Wanted()), OnnxRuntimeChoice)
    installed(monkeypatch, "1.31.1", CUDA_PROVIDER)
    with pytest.raises(BundleError, match=r"engine\.json: cannot be read .*; build it again with: llava-deploy build"):
        chosen(bundle, Wanted())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("option", ["threads", "accuracy_level"])
def test_options_of_the_cpu_are_refused(bundle: Path, option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}: only ONNX Runtime on the CPU has it; leave it out for ONNX Run"):
        Llava.load(bundle, backend="onnxruntime-cuda", **{option: 1})  # type: ignore[arg-type]


@pytest.mark.usefixtures("gpu")
def test_an_engine_of_other_graphs_is_not_taken(bundle: Path) -> None:
    path = bundle / ENGINES / NAME / ENGINE_MANIFEST
    plain = json.loads(path.read_text())
    plain["key"]["source"] = "0" * 64
    path.write_text(json.dumps(plain))
    with pytest.raises(BackendError, match=f"engine {NAME} was built from others; build it again with: llava-deploy b"):
        chosen(bundle, Wanted("onnxruntime-cuda"))


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_lists_too_little_is_damaged(bundle: Path) -> None:
    home = bundle / ENGINES / NAME
    manifest = read_engine_manifest(home)
    listed = tuple(entry for entry in manifest.files if entry.path != "decoder.onnx")
    (home / ENGINE_MANIFEST).write_text(EngineManifest(manifest.format_version, manifest.key, {}, listed).to_json())
    with pytest.raises(BundleError, match=r"want decoder\.onnx in its manifest, found none; llava-deploy build .*--fo"):
        chosen(bundle, Wanted())


@pytest.mark.usefixtures("gpu")
def test_a_bundle_without_an_engine(demo_bundle_fp16: Path, demo_bundle: Path) -> None:
    build = f"no engine of it; build one with: llava-deploy build {demo_bundle_fp16} --backend onnxruntime-cuda"
    with pytest.raises(BackendError, match=build):
        chosen(demo_bundle_fp16, Wanted("onnxruntime-cuda"))
    with pytest.raises(BackendError, match="wants a bundle of float16, found float32; export it with --precision fp16"):
        chosen(demo_bundle, Wanted("onnxruntime-cuda"))


def test_a_gpu_that_lies_idle_is_pointed_out(
    demo_bundle_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_choice, "_GPU_FILES", (tmp_path,))
    found = chosen(demo_bundle_fp16, Wanted())
    assert isinstance(found, OnnxRuntimeChoice)
    command = f"llava-deploy build {demo_bundle_fp16} --backend onnxruntime-cuda makes the bundle run on it"
    assert found.reason.endswith(f"; this machine has an NVIDIA GPU: {command}")


def test_a_session_that_cannot_start_falls_back_and_says_why(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, invoke: Callable[..., Result], error_line: Callable[[Result], str]
) -> None:
    """The provider is there, and its GPU is not: known only when a graph is loaded."""
    if CUDA_PROVIDER in onnxruntime.get_available_providers():
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    installed(monkeypatch, "1.31.1", CUDA_PROVIDER)
    why = "is installed without CUDAExecutionProvider"
    refused = invoke("run", bundle, "--prompt", "hello", "--backend", "onnxruntime-cuda")
    assert refused.exit_code == 1
    assert why in error_line(refused)
    answered = invoke("run", bundle, "--prompt", "hello", "--max-new-tokens", "2")
    assert answered.exit_code == 0
    assert f"not ONNX Runtime on CUDA: ONNX Runtime {onnxruntime.__version__} {why}" in answered.stderr
