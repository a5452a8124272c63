"""Polygraphy's comparator over the graphs' hidden states: it passes what is right, and names what is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from llava_deploy.engines.manifest import read_manifest

GpuCheck = Callable[[str], ModuleType]


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_polygraphy_finds_the_graphs_equal_to_pytorch(
    gpu_check: GpuCheck, demo_bundles: dict[str, Path], weights: str
) -> None:
    result = gpu_check("stage_by_stage").compare(str(demo_bundles[weights]), "onnxruntime", "cpu")
    layers = read_manifest(demo_bundles[weights]).decoder.layers
    for feed in (1, 2):  # a prompt, and a token behind it
        for layer in range(layers):
            assert result["outputs"][f"decoder present.{layer}.key, feed {feed} of 2"]["ok"]
            assert 0 < result["outputs"][f"decoder hidden_states.{layer + 1}, feed {feed} of 2"]["error"] < 1e-2
    assert "vision tower_features, feed 1 of 1" in result["outputs"]


def test_polygraphy_names_the_layer_that_is_off(
    gpu_check: GpuCheck, demo_bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundles["fp16"], bundle)
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    (weight,) = (t for t in graph.initializer if t.name == "language_model.layers.1.mlp.down_proj.weight")
    where = {entry.key: entry.value for entry in weight.external_data}
    place = bundle / where["location"]
    np.memmap(place, np.float16, "r+", int(where["offset"]), tuple(weight.dims))[:] *= np.float16(1.1)
    with pytest.raises(gpu_check("outcome").CheckFailedError) as caught:
        gpu_check("stage_by_stage").compare(str(bundle), "onnxruntime", "cpu")
    outputs = caught.value.result["outputs"]
    wrong = [name for name, output in outputs.items() if not output["ok"]]
    assert "decoder hidden_states.2, feed 1 of 2" in wrong
    assert not any(name in " ".join(wrong) for name in ("vision", "hidden_states.1,", "present.0", "present.1"))


def test_polygraphy_builds_for_tensorrt(
    gpu_check: GpuCheck, demo_bundles: dict[str, Path], tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """Without a GPU: to the engine's bytes; in a process of its own, as Polygraphy reads its variable at its import."""
    code = f"""
from pathlib import Path
from stage_by_stage import _Mark
from tensorrt_runner import engine_bytes
from llava_deploy.engines.manifest import read_manifest
bundle = Path({str(demo_bundles["fp16"])!r})
for graph, slots in (("vision.onnx", 0), ("decoder.onnx", 68)):
    place = Path({str(tmp_path)!r}) / graph
    place.mkdir()
    plan = engine_bytes("tensorrt-rtx", bundle / graph, read_manifest(bundle), slots, [_Mark()], place, [(8, 9)])()
    print("bytes", len(memoryview(plan)))
"""
    directory = Path(gpu_check("parts").__file__).parent
    path = os.pathsep.join([str(directory), str(directory.parent)])
    environment = {**child_environment, "PYTHONPATH": path, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(line.split()[1]) > 1_000_000 for line in done.stdout.splitlines() if "bytes" in line[:6]] == [True] * 2
