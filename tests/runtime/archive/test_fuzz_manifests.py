"""Twelve thousand manifests, wrong in random places: each reader takes one, or refuses it in words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import TEXTS, mutated_json, peak_memory, watched
from tiny_archive import ENGINE, GOLDENS, listing_for, members_of, tar_in, write_bundle

from llava_deploy.engines.engine_manifest import loaded_files, read_engine_manifest
from llava_deploy.engines.errors import BundleError, LlavaDeployError
from llava_deploy.engines.goldens import GOLDENS_FILE, read_golden_array, read_goldens
from llava_deploy.engines.manifest import MANIFEST_NAME, Manifest, read_manifest
from llava_deploy.runtime.archive.contents import PackOptions, choose_contents
from llava_deploy.runtime.archive.listing import content_length, parse_listing

COUNT = 3000
Read = Callable[[Path, bytes], object]


def _manifest(bundle: Path, content: bytes) -> object:
    (bundle / MANIFEST_NAME).write_bytes(content)
    manifest = read_manifest(bundle)
    manifest.to_json()
    manifest.vision.spec()
    manifest.decoder.spec()
    return choose_contents(bundle, PackOptions(graphs=False, engines=("all",)))


def _engine(bundle: Path, content: bytes) -> object:
    directory = bundle / "engines" / ENGINE
    (directory / "engine.json").write_bytes(content)
    return loaded_files(read_engine_manifest(directory).key)


def _goldens(bundle: Path, content: bytes) -> object:
    (bundle / GOLDENS_FILE).write_bytes(content)
    manifest = read_manifest(bundle)
    goldens = read_goldens(bundle, manifest)
    for golden in goldens.goldens:
        read_golden_array(bundle, manifest, golden, "logits")
        read_golden_array(bundle, manifest, golden, "inputs_embeds")
    return goldens.to_json()


def _listing(_: Path, content: bytes) -> object:
    listing = parse_listing(content, where="archive.json")
    return content_length(listing, len(content))


READERS: dict[str, Read] = {"manifest": _manifest, "engine": _engine, "goldens": _goldens, "listing": _listing}


@pytest.fixture
def whole(quick_place: Path, archive_bytes: bytes) -> tuple[Path, dict[str, bytes]]:
    """A bundle in memory, and what each reader reads of it as it should be."""
    bundle = write_bundle(quick_place / "bundle")
    return bundle, {
        "manifest": (bundle / MANIFEST_NAME).read_bytes(),
        "engine": (bundle / "engines" / ENGINE / "engine.json").read_bytes(),
        "goldens": GOLDENS.to_json().encode(),
        "listing": listing_for(members_of(tar_in(archive_bytes))).to_bytes(),
    }


@pytest.mark.parametrize("name", READERS)
def test_manifests(name: str, whole: tuple[Path, dict[str, bytes]]) -> None:
    bundle, contents = whole
    read, numbers = READERS[name], random.Random(name)
    read(bundle, contents[name])
    files = sorted(bundle.parent.rglob("*"))
    value = json.loads(contents[name])
    before, messages, taken = peak_memory(), set(), 0
    for _ in range(COUNT):
        with watched():
            try:
                read(bundle, mutated_json(numbers, value))
                taken += 1
            except LlavaDeployError as error:
                messages.add(str(error))
    assert sorted(bundle.parent.rglob("*")) == files
    assert peak_memory() - before < 200 << 20
    assert len(messages) > 100
    assert taken < COUNT // 2


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
@pytest.mark.parametrize("name", READERS)
def test_texts_that_are_no_manifest(name: str, text: str, whole: tuple[Path, dict[str, bytes]]) -> None:
    with watched(), pytest.raises(BundleError):
        READERS[name](whole[0], text.encode("utf-8", "surrogatepass"))


def test_a_bundle_whose_texts_are_none(whole: tuple[Path, dict[str, bytes]]) -> None:
    """Half a character in a name that only people read: taken, shown and packed, or refused in words."""
    bundle, contents = whole
    data = json.loads(contents["manifest"])
    data["model"]["name"] = "\ud800"
    (bundle / MANIFEST_NAME).write_text(json.dumps(data), encoding="ascii")
    manifest: Manifest = read_manifest(bundle)
    assert manifest.model.name == "\ud800"
    assert choose_contents(bundle, PackOptions()).manifest == manifest
    with pytest.raises(BundleError, match="holds text that is none"):
        choose_contents(bundle, PackOptions(goldens=False))
