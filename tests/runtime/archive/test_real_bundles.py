"""The demo's bundles there and back, and answers from what came out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_archive import GOLDENS, tree

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.goldens import GOLDENS_FILE, read_goldens
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, read_manifest
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.engines.planner.model import planned_bundle
from llava_deploy.exporter.demo.questions import drawn_picture
from llava_deploy.runtime import Llava
from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import pack
from llava_deploy.runtime.archive.unpack import unpack

PLAIN = PackOptions(goldens=False)


def answer_of(bundle: Path) -> str:
    llava = Llava.load(bundle, integrity=Integrity.FULL)
    parts = [{"type": "image", "image": drawn_picture()}, {"type": "text", "text": "What is in the picture?"}]
    pieces = llava.chat([{"role": "user", "content": parts}], max_new_tokens=24)
    return "".join(piece.text for piece in pieces)


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle with its engine, and goldens of the right form."""
    bundle = tmp_path_factory.mktemp("with-goldens") / "bundle"
    shutil.copytree(demo_bundle, bundle)
    manifest = read_manifest(bundle)
    (golden,) = GOLDENS.goldens
    (bundle / "goldens" / golden.name).mkdir(parents=True)
    (bundle / GOLDENS_FILE).write_text(GOLDENS.to_json(), encoding="utf-8")
    paths = [entry.path for entry in manifest.files] + [GOLDENS_FILE]
    for array in ("inputs_embeds", "logits"):
        paths.append(golden.path(array))
        np.save(bundle / paths[-1], np.zeros(golden.shape(array, manifest), np.float32))
    files = tuple(describe_file(bundle, path) for path in sorted(paths))
    (bundle / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    return bundle


@pytest.mark.parametrize(
    "options",
    [PackOptions(), PackOptions(engines=("all",)), PackOptions(engines=("all",), graphs=False)],
    ids=["graphs", "both", "engine alone"],
)
def test_there_and_back_and_an_answer(options: PackOptions, bundle: Path, tmp_path: Path) -> None:
    packed = pack(bundle, tmp_path / "model.lvd", options)
    manifest = unpack(tmp_path / "model.lvd", tmp_path / "again")
    assert packed.size <= 1.01 * packed.weights
    before, found = tree(bundle), tree(tmp_path / "again")
    if options.graphs:
        assert found.items() <= before.items()
        assert {path.split("/")[0] for path in before.keys() - found.keys()} <= {"engines"}
    else:
        assert before.keys() - found.keys() == {entry.path for entry in manifest.left_out}
    assert bool([path for path in found if path.startswith("engines/")]) == bool(options.engines)
    assert read_goldens(tmp_path / "again", manifest) == GOLDENS
    assert answer_of(tmp_path / "again") == answer_of(bundle)


def test_without_graphs_there_is_nothing_to_count(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "model.lvd", PackOptions(engines=("all",), graphs=False))
    unpacked = tmp_path / "unpacked"
    manifest = unpack(tmp_path / "model.lvd", unpacked)
    with pytest.raises(BundleError, match=f"^{unpacked}: was packed without its graphs.*give the bundle"):
        planned_bundle(unpacked, manifest)


def test_without_graphs_and_without_a_fitting_engine(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "model.lvd", PackOptions(engines=("all",), graphs=False))
    unpack(tmp_path / "model.lvd", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "engines")
    wanted = "was left out when this bundle was packed, and is needed here; pack it again with its graphs or"
    with pytest.raises(BundleError, match=wanted):
        Llava.load(tmp_path / "again")
    with pytest.raises(BundleError, match=wanted):
        build_onnxruntime(tmp_path / "again")


def test_an_engine_that_was_unpacked_is_current(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "model.lvd", PackOptions(engines=("all",), graphs=False))
    unpack(tmp_path / "model.lvd", tmp_path / "again")
    before = tree(tmp_path / "again")
    build_onnxruntime(tmp_path / "again")
    assert tree(tmp_path / "again") == before


def test_half_floats_shrink(demo_bundle_fp16: Path, tmp_path: Path) -> None:
    packed = pack(demo_bundle_fp16, tmp_path / "model.lvd", PLAIN)
    assert packed.size == (tmp_path / "model.lvd").stat().st_size < 0.95 * packed.weights
    unpack(tmp_path / "model.lvd", tmp_path / "again")
    assert answer_of(tmp_path / "again") == answer_of(demo_bundle_fp16)
