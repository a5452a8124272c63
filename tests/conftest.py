"""The shipped checkpoint and the bundles made of it, once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo import scenes
from llava_deploy.exporter.export import export


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
def child_environment() -> dict[str, str]:
    """For processes that tests start: one thread, and no colour."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
