"""Refitted engines answer with the new weights, on a GPU that is not there; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from finetuned import DECODER, PROJECTOR, finetuned, logits_of

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, VISION_PLAN, read_engine_manifest
from llava_deploy.engines.errors import BackendError, BundleError
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, describe_file, read_manifest
from llava_deploy.engines.tensorrt.refit import Replaced, refit_tensorrt
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.runtime import Llava

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

GRAPHS = {"decoder": (DECODER_GRAPH, DECODER), "projector": (VISION_GRAPH, PROJECTOR)}
Bundles = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    checkpoint, place = open_checkpoint(demo_checkpoint), tmp_path_factory.mktemp("refit")
    for name, (_, beginnings) in GRAPHS.items():
        export(finetuned(checkpoint, beginnings), place / name, "fp16")
    export(checkpoint, place / "old", "fp16")
    return {path.name: path for path in place.iterdir()}


@pytest.fixture
def bundles(exported: dict[str, Path], tmp_path: Path) -> Bundles:
    """The bundle as it was, and with another decoder or projector."""

    def copies(part: str) -> tuple[Path, Path]:
        old, new = shutil.copytree(exported["old"], tmp_path / "old"), shutil.copytree(exported[part], tmp_path / "new")
        return Path(old), Path(new)

    return copies


def replaced(old: Path, part: str) -> Replaced:
    graph, beginnings = GRAPHS[part]
    return Replaced(graph, beginnings, read_manifest(old))


def logits(bundle: Path) -> np.ndarray:
    return logits_of(Llava.load(bundle, backend="tensorrt-rtx", integrity=Integrity.FULL))


@pytest.mark.parametrize("part", GRAPHS)
@pytest.mark.parametrize("parts", [None, (1, 1, 1, 1)])
def test_the_new_weights_answer(fake_gpu: FakeGpu, bundles: Bundles, part: str, parts: tuple[int, ...] | None) -> None:
    old, new = bundles(part)
    before = fake_gpu.write_engine(old, parts=parts, refittable=True)
    built = fake_gpu.write_engine(new, parts=parts, refittable=True)
    want, unlike = logits(new), logits(old)
    shutil.rmtree(built)
    directory = refit_tensorrt(new, before, replaced(old, part))
    assert directory == built
    np.testing.assert_array_equal(logits(new), want)
    assert np.abs(want - unlike).max() > 0.1
    np.testing.assert_array_equal(logits(old), unlike)  # which was only read
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_what_stays_is_not_written_again(fake_gpu: FakeGpu, bundles: Bundles) -> None:
    old, new = bundles("decoder")
    before = fake_gpu.write_engine(old, refittable=True)
    directory = refit_tensorrt(new, before, replaced(old, "decoder"))
    assert (directory / VISION_PLAN).stat().st_ino == (before / VISION_PLAN).stat().st_ino
    assert fake_gpu.calls["refit_cuda_engine"] == 1


def test_it_can_be_refitted_again(fake_gpu: FakeGpu, bundles: Bundles) -> None:
    old, new = bundles("projector")
    directory = refit_tensorrt(new, fake_gpu.write_engine(old, refittable=True), replaced(old, "projector"))
    unlike = logits(new)
    back = refit_tensorrt(old, directory, replaced(new, "projector"))
    assert read_engine_manifest(back).key.tensorrt == read_engine_manifest(directory).key.tensorrt
    assert np.abs(logits(old) - unlike).max() > 0.1


def test_the_old_engine_is_not_taken_for_one_of_the_new_weights(fake_gpu: FakeGpu, bundles: Bundles) -> None:
    """Should a refit never come to be."""
    old, new = bundles("projector")
    shutil.copytree(fake_gpu.write_engine(old, refittable=True).parent, new / ENGINES)
    with pytest.raises(BackendError, match="from other graphs than the bundle holds"):
        Llava.load(new, backend="tensorrt-rtx")
    assert Llava.load(new).backend.startswith("ONNX Runtime")


Break = Callable[["FakeGpu", Path], None]
BREAKS: dict[str, tuple[Break, type[Exception], str]] = {
    "no GPU": (lambda gpu, _: setattr(gpu, "driver", 0), BackendError, "no GPU can be used here"),
    "another GPU": (
        lambda gpu, _: setattr(gpu, "capability", (8, 6)),
        BackendError,
        "for sm89, and the GPU is sm86",
    ),
    "another version": (lambda gpu, _: gpu.provide("tensorrt_rtx", "1.8.0.1"), BackendError, "and 1.8.0.1 is in"),
    "not installed": (lambda gpu, _: gpu.withhold("tensorrt_rtx"), BackendError, "tensorrt_rtx cannot be imported"),
    "damaged": (lambda _, old: (old / "decoder.plan").write_bytes(b"{}"), BundleError, "the file was altered"),
    "refused plan": (lambda gpu, _: gpu.fail("deserialize_cuda_engine"), BackendError, "cannot deserialise it: Error"),
    "unknown weight": (
        lambda gpu, _: gpu.unknown_weights.add("lm_head.weight"),
        BackendError,
        r"decoder\.plan: .* does not take its new weights: it knows no lm_head\.weight, nor 0 others",
    ),
    "refused graph": (lambda gpu, _: gpu.fail("refit_from_file"), BackendError, "weights: Failed to refit the weights"),
    "refused weights": (lambda gpu, _: gpu.fail("refit_cuda_engine"), BackendError, "weights are missing"),
    "not serialised": (lambda gpu, _: gpu.fail("serialize_with_config"), BackendError, "cannot be serialised again"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_does_not_fit_leaves_no_engine(fake_gpu: FakeGpu, bundles: Bundles, what: str) -> None:
    old, new = bundles("decoder")
    before = fake_gpu.write_engine(old, refittable=True)
    break_it, error, match = BREAKS[what]
    break_it(fake_gpu, before)
    with pytest.raises(error, match=match):
        refit_tensorrt(new, before, replaced(old, "decoder"))
    assert not any((new / ENGINES).glob("**/*"))


def test_a_plan_with_other_weights_than_its_graph_is_refused(fake_gpu: FakeGpu, bundles: Bundles) -> None:
    """As many as it wants, or none: what is missing would keep its old values."""
    old, new = bundles("decoder")
    before = fake_gpu.write_engine(old, refittable=True, parts=(1, 3))
    first, second = before / "decoder-1-of-2.plan", before / "decoder-2-of-2.plan"
    manifest = read_engine_manifest(before)
    first.write_bytes(second.read_bytes())
    files = tuple(describe_file(before, entry.path) for entry in manifest.files)
    (before / ENGINE_MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(BackendError, match=r"it knows no language_model\.layers\.0\."):
        refit_tensorrt(new, before, replaced(old, "decoder"))


def test_engines_that_were_not_built_for_it(fake_gpu: FakeGpu, bundles: Bundles) -> None:
    old, new = bundles("decoder")
    with pytest.raises(BackendError, match="built without --refit"):
        refit_tensorrt(new, fake_gpu.write_engine(old), replaced(old, "decoder"))
    stale = fake_gpu.write_engine(new, old / ENGINES / "stale", refittable=True)
    with pytest.raises(BundleError, match="built from other graphs"):
        refit_tensorrt(new, stale, replaced(old, "decoder"))
