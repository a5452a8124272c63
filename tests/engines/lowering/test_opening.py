"""Models whose weights have several names on the disk, or lie elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.lowering.opening import open_model
from llava_deploy.engines.manifest import VISION_GRAPH

WEIGHT = "projector.0.weight"


@pytest.fixture
def graph(demo_bundle_fp16: Path, tmp_path: Path) -> Path:
    for name in (VISION_GRAPH, f"{VISION_GRAPH}.data"):
        shutil.copyfile(demo_bundle_fp16 / name, tmp_path / name)
    return tmp_path / VISION_GRAPH


def values(path: Path) -> np.ndarray:
    tensor = open_model(path).graph.initializers[WEIGHT].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def test_weights_with_a_second_hard_link_are_read(graph: Path, tmp_path: Path) -> None:
    alone = values(graph)
    os.link(tmp_path / f"{VISION_GRAPH}.data", tmp_path / "backup")
    np.testing.assert_array_equal(values(graph), alone)
    assert np.abs(alone).max() > 0


def test_weights_outside_of_the_directory_are_refused(graph: Path, tmp_path: Path) -> None:
    data, elsewhere = tmp_path / f"{VISION_GRAPH}.data", tmp_path.parent / f"{tmp_path.name}-elsewhere"
    data.rename(elsewhere)
    data.symlink_to(elsewhere)
    with pytest.raises(BundleError, match="leads out of"):
        values(graph)


def test_what_is_no_model_is_named(graph: Path) -> None:
    graph.write_bytes(b"not ONNX")
    with pytest.raises(BundleError, match=r"vision\.onnx: cannot be read as ONNX"):
        open_model(graph)
