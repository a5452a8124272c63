"""The shipped checkpoint and the bundles made of it, once a session, and the command line to call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from llava_deploy.cli import main
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo import scenes
from llava_deploy.exporter.export import export

if TYPE_CHECKING:
    from fake_gpu import FakeGpu


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The shipped checkpoint's directory."""
    return scenes.checkpoint_dir()


@pytest.fixture(scope="session")
def demo_bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint as an fp32 bundle with its ONNX Runtime engine; not to be written to."""
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    export(open_checkpoint(demo_checkpoint), bundle, "fp32")
    build_onnxruntime(bundle)
    return bundle


@pytest.fixture(scope="session")
def demo_bundle_fp16(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint as an fp16 bundle, without an engine; not to be written to."""
    bundle = tmp_path_factory.mktemp("demo") / "bundle-fp16"
    export(open_checkpoint(demo_checkpoint), bundle, "fp16")
    return bundle


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGpu]:
    """A GPU with TensorRT for RTX, in the place of cuda-python and tensorrt_rtx; see ``support/fake_gpu``."""
    from fake_gpu import FakeGpu

    gpu = FakeGpu(monkeypatch, tmp_path_factory.mktemp("fake-gpu"))
    yield gpu
    assert gpu.illegal == []


@pytest.fixture
def child_environment() -> dict[str, str]:
    """For processes that tests start: one thread, and no colour."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Call ``llava-deploy`` in this process; ``stdin`` is its standard input."""
    runner = CliRunner()
    return lambda *args, stdin=None: runner.invoke(main, [str(arg) for arg in args], input=stdin)


@pytest.fixture
def error_line() -> Callable[[Result], str]:
    """The one line on standard error, which must be all of it."""

    def only_line(result: Result) -> str:
        lines = [line for line in result.stderr.splitlines() if line]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return only_line
