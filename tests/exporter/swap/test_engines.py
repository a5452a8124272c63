"""Engines after a swap: none answers with the old weights, and what became of each is said."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
from finetuned import DECODER, PROJECTOR, finetuned, logits_of

from llava_deploy.engines.build_command import build_command
from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, EngineKey, read_engine_manifest
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.engines.names import SwapPart
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.engines.onnxruntime_cuda import cuda_key
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.quantization.plan import round_to_nearest
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.swap.swap import swap
from llava_deploy.runtime import Llava

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

BEGINNINGS: dict[SwapPart, tuple[str, ...]] = {"projector": PROJECTOR, "decoder": DECODER}


@pytest.fixture
def bundle(demo_bundle_fp16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle_fp16, tmp_path / "bundle"))


@pytest.fixture
def swapped(demo_checkpoint: Path) -> Callable[[Path, SwapPart], list[str]]:
    """Put a fine-tuned part into a bundle; what was said."""

    def act(bundle: Path, part: SwapPart) -> list[str]:
        says: list[str] = []
        swap(finetuned(open_checkpoint(demo_checkpoint), BEGINNINGS[part]), bundle, part, say=says.append)
        return says

    return act


def engines(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / ENGINES).iterdir()) if (bundle / ENGINES).exists() else []


@pytest.mark.parametrize("part", BEGINNINGS)
def test_that_of_onnxruntime_is_built_again(
    bundle: Path, swapped: Callable[[Path, SwapPart], list[str]], part: SwapPart
) -> None:
    engine = build_onnxruntime(bundle)
    unlike, stays = logits_of(Llava.load(bundle)), "decoder" if part == "projector" else "vision"
    inode = (engine / f"{stays}.onnx.data").stat().st_ino
    says = swapped(bundle, part)
    assert says == [f"engine {engine.name} was built again"]
    assert (engine / f"{stays}.onnx.data").stat().st_ino == inode
    llava = Llava.load(bundle)
    assert engine.name in llava.backend
    found = logits_of(llava)
    built = {path.name: path.read_bytes() for path in engine.iterdir()}
    shutil.rmtree(engine)
    assert build_onnxruntime(bundle) == engine
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == built
    np.testing.assert_array_equal(found, logits_of(Llava.load(bundle)))
    assert np.abs(found - unlike).max() > 0.1


@pytest.mark.parametrize(("part", "graph"), [("projector", "vision.onnx"), ("decoder", "decoder.onnx")])
def test_that_of_onnxruntime_on_cuda_is_built_again_and_the_old_files_stay(
    bundle: Path, swapped: Callable[[Path, SwapPart], list[str]], tmp_path: Path, part: SwapPart, graph: str
) -> None:
    """It has the bundle's weights under a second name, through which nothing is written."""
    engine = build_onnxruntime_cuda(bundle)
    weights = [f"{name}.data" for name in ("vision.onnx", "decoder.onnx")]
    before = {name: (bundle / name).read_bytes() for name in weights}
    for name in weights:
        (tmp_path / name).hardlink_to(engine / name)
    assert swapped(bundle, part) == [f"engine {engine.name} was built again"]
    assert read_engine_manifest(engine).key == cuda_key(read_manifest(bundle))
    for name in weights:
        assert (tmp_path / name).read_bytes() == before[name]
        assert (engine / name).samefile(bundle / name)
        assert ((bundle / name).read_bytes() == before[name]) == (name != f"{graph}.data")


def test_with_the_options_that_it_was_built_with(
    demo_checkpoint: Path, tmp_path: Path, swapped: Callable[[Path, SwapPart], list[str]]
) -> None:
    bundle = tmp_path / "int4"
    export(round_to_nearest(open_checkpoint(demo_checkpoint), QuantizeOptions(32, False, "fp16")), bundle, "int4")
    engine = build_onnxruntime(bundle, accuracy_level=1)
    swapped(bundle, "decoder")
    assert read_engine_manifest(engine).key.accuracy_level == 1
    assert engine.name in Llava.load(bundle).backend


def test_one_that_is_of_other_graphs_already_is_built_whole(
    bundle: Path, swapped: Callable[[Path, SwapPart], list[str]]
) -> None:
    engine = build_onnxruntime(bundle)
    manifest = read_engine_manifest(engine)
    key = dataclasses.replace(manifest.key, source="0" * 64)
    (engine / ENGINE_MANIFEST).write_text(dataclasses.replace(manifest, key=key).to_json())
    inode = (engine / "decoder.onnx.data").stat().st_ino
    assert swapped(bundle, "projector") == [f"engine {engine.name} was built again"]
    assert (engine / "decoder.onnx.data").stat().st_ino != inode
    assert engine.name in Llava.load(bundle).backend


def test_those_that_cannot_be_made_here_are_dropped(
    bundle: Path, swapped: Callable[[Path, SwapPart], list[str]], fake_gpu: FakeGpu
) -> None:
    engine = build_onnxruntime(bundle)
    other = engine.rename(engine.with_name("onnxruntime-1.25.0-cpu"))
    manifest = read_engine_manifest(other)
    key = dataclasses.replace(manifest.key, version="1.25.0")
    (other / ENGINE_MANIFEST).write_text(dataclasses.replace(manifest, key=key).to_json())
    plain = fake_gpu.write_engine(bundle)
    (bundle / ENGINES / "tensorrt-9-sm89").mkdir()
    (bundle / ENGINES / ".onnxruntime-1.partial-x").mkdir()
    old, damaged, rtx = swapped(bundle, "projector")
    assert f"it is for ONNX Runtime 1.25.0, and {onnxruntime.__version__} is installed; build it with: llava-" in old
    assert "engine tensorrt-9-sm89 is dropped: " in damaged
    assert f"engine {plain.name} is dropped: {plain}: was built without --refit" in rtx
    assert f"build it with: llava-deploy build {bundle} --backend tensorrt-rtx --max-batch 4 --max-len 256" in rtx
    assert engines(bundle) == []


def test_those_of_tensorrt_are_refitted(
    bundle: Path, swapped: Callable[[Path, SwapPart], list[str]], fake_gpu: FakeGpu
) -> None:
    engine = fake_gpu.write_engine(bundle, refittable=True)
    unlike = logits_of(Llava.load(bundle, backend="tensorrt-rtx"))
    for part in BEGINNINGS:
        said = swapped(bundle, part)[-1]
        assert said.startswith(f"engine {engine.name} was refitted, which no GPU has been seen to do yet")
        found = logits_of(Llava.load(bundle, backend="tensorrt-rtx"))
        assert np.abs(found - unlike).max() > 0.1
        unlike = found
    shutil.rmtree(engine)
    fake_gpu.write_engine(bundle)
    np.testing.assert_array_equal(unlike, logits_of(Llava.load(bundle, backend="tensorrt-rtx")))


def test_without_a_gpu_they_are_dropped(
    bundle: Path, swapped: Callable[[Path, SwapPart], list[str]], fake_gpu: FakeGpu
) -> None:
    fake_gpu.write_engine(bundle, refittable=True)
    fake_gpu.driver = 0
    (said,) = swapped(bundle, "decoder")
    assert "no GPU can be used here" in said
    assert said.endswith("--parts 1 --sm sm89 --refit")
    assert engines(bundle) == []


def test_the_command_that_builds_one_again(bundle: Path, fake_gpu: FakeGpu) -> None:
    key = read_engine_manifest(fake_gpu.write_engine(bundle, capabilities=("sm86", "sm89"), parts=(2, 2))).key
    assert key.tensorrt is not None
    assert build_command(Path("my bundle"), key) == (
        "llava-deploy build 'my bundle' --backend tensorrt-rtx --max-batch 4 --max-len 256 --max-images 3 --max-seq 96 "
        "--opt-batch 1 --opt-seq 64 --opt-total 64 --opt-images 1 --parts 2 --sm sm86 --sm sm89"
    )
    recipe = dataclasses.replace(key.tensorrt, release="10.3", workspace=3 << 20, version_compatible=True)
    old = dataclasses.replace(key, backend="tensorrt", version="11.4.0", tensorrt=recipe)
    assert build_command(Path("b"), old).endswith("--parts 2 --workspace 3 --version-compatible --trt-version 10.3")
    cpu = EngineKey("onnxruntime", "1.25.0", "cpu", "", 1, None, ("vision", "prefill"))
    assert build_command(Path("b"), cpu) == (
        "llava-deploy build b --backend onnxruntime --accuracy-level 1 --int8 vision --int8 prefill"
    )
