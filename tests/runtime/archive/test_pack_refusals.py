"""What is not packed: bundles that are not as their manifests say, options that cannot be, places that are taken."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_archive import ENGINE, EVERYTHING, not_packed, packed, write_bundle

from llava_deploy.engines import staging
from llava_deploy.engines.errors import BundleError, InputError, OptionError
from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, read_manifest
from llava_deploy.runtime.archive import frame
from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import pack
from llava_deploy.runtime.archive.unpack import unpack


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PackOptions(engines=("other",)), f"engine: want {ENGINE}, or all, got 'other'"),
        (PackOptions(engines=("../goldens",)), f"engine: want {ENGINE}, or all, got '../goldens'"),
        (PackOptions(graphs=False), "no_graphs: nothing would be left that runs; choose an engine too"),
    ],
)
def test_options_that_cannot_be(bundle: Path, options: PackOptions, message: str) -> None:
    assert message in not_packed(bundle, options)


def test_a_bundle_without_engines_has_none_to_choose(bundle: Path) -> None:
    shutil.rmtree(bundle / "engines")
    for name in ("all", "x"):
        assert "want an engine, of which the bundle has none" in not_packed(bundle, PackOptions(engines=(name,)))


def test_a_bundle_packed_without_graphs_needs_its_engine(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "a.lvd", replace(EVERYTHING, graphs=False))
    unpack(tmp_path / "a.lvd", tmp_path / "again")
    assert packed(tmp_path / "again") == (tmp_path / "a.lvd").read_bytes()
    assert "has no graphs, since it was packed without" in not_packed(tmp_path / "again", PackOptions())


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _device(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("tokenizer.json", _link, "stands in no manifest"),
        ("goldens", _link, "a link to"),
        ("engines", _link, "stands in no manifest"),
        (f"engines/{ENGINE}", _link, "a link to"),
        (f"engines/{ENGINE}/vision.onnx", _link, "stands in no manifest"),
        ("tokenizer.json", _device, "want a file, found p"),
        ("tokenizer.json", lambda path: path.unlink(), "want a file, found none"),
        ("tokenizer.json", lambda path: path.write_bytes(b"{]"), "want sha256"),
        ("tokenizer.json", lambda path: path.write_bytes(b"{ }"), "want 2 bytes, found more"),
        ("tokenizer.json", lambda path: path.write_bytes(b"{"), "want 2 bytes, found 1"),
        ("notes.txt", lambda path: path.write_bytes(b"x"), "notes.txt: stands in no manifest"),
        ("goldens/.hidden", lambda path: path.write_bytes(b"x"), "goldens/.hidden: stands in no manifest"),
        (f"engines/{ENGINE}/more", lambda path: path.write_bytes(b"x"), "more: stands in no manifest"),
        (f"engines/{ENGINE}/vision.onnx", lambda path: path.write_bytes(b"x" * 55), "want sha256"),
        (f"engines/{ENGINE}/engine.json", lambda path: path.write_bytes(b"{"), "engine.json: cannot be read"),
        ("manifest.json", lambda path: path.write_bytes(b"{"), "manifest.json: not JSON"),
        ("manifest.json", lambda path: path.write_bytes(b" " * (5 << 20)), "want at most 4,194,304 bytes"),
        ("manifest.json", lambda path: path.unlink(), "want a bundle directory with manifest.json, found none"),
        ("goldens/goldens.json", lambda path: path.write_bytes(b"{"), "goldens.json: cannot be read"),
    ],
)
def test_bundles_that_are_not_as_their_manifests_say(
    path: str, change: Callable[[Path], object], message: str, bundle: Path
) -> None:
    change(bundle / path)
    assert message in not_packed(bundle)


def test_a_link_alone_in_the_place_of_a_file(bundle: Path, tmp_path: Path) -> None:
    (bundle / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (bundle / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert f"a link to {tmp_path / 'tokenizer.json'}; an archive holds none" in not_packed(bundle)


def test_an_engine_of_other_graphs(bundle: Path) -> None:
    (bundle / "vision.onnx").write_bytes(b"another")
    manifest = read_manifest(bundle)
    files = tuple(describe_file(bundle, entry.path) for entry in manifest.files)
    (bundle / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    assert "was built from other graphs than the bundle's" in not_packed(bundle)
    assert packed(bundle, PackOptions())


def test_a_file_that_changes_while_it_is_packed(bundle: Path, tmp_path: Path) -> None:
    def change(done: int, _total: int) -> None:
        if done:
            (bundle / "vision.onnx.data").write_bytes(b"\1" * 100)

    with pytest.raises(BundleError, match=r"vision.onnx.data: want sha256 .*: the file was altered"):
        pack(bundle, tmp_path / "new.lvd", on_progress=change)
    assert not (tmp_path / "new.lvd").exists()


@pytest.mark.parametrize("output", ["bundle/model.lvd", "bundle/goldens/model.lvd"])
def test_an_archive_inside_its_bundle(output: str, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lies in the bundle that is to be packed"):
        pack(bundle, tmp_path / output)


def test_what_is_there_stays(bundle: Path, archive: Path, tmp_path: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(InputError, match="exists already; choose another name, or replace it with --force"):
        pack(bundle, archive)
    (tmp_path / "thesis.doc").write_bytes(b"years of work")
    for place in (tmp_path / "thesis.doc", tmp_path, tmp_path / "dangling"):
        if not place.exists():
            place.symlink_to("nowhere")
        with pytest.raises(InputError, match="exists and is no archive, which is all that --force replaces"):
            pack(bundle, place, replace=True)
    assert (tmp_path / "thesis.doc").read_bytes() == b"years of work"
    (tmp_path / "link.lvd").symlink_to(archive)
    pack(bundle, tmp_path / "link.lvd", PackOptions(), replace=True)
    assert (tmp_path / "link.lvd").is_symlink()
    assert archive.read_bytes() != before


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full, nothing was written"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), "not written (Permission denied at there)"),
    ],
)
def test_errors_of_the_disk(error: OSError, message: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr(staging, "_sync", fail)
    assert message in not_packed(bundle)


def test_a_file_that_may_not_be_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return really(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    assert "tokenizer.json: cannot be read (Permission denied)" in not_packed(bundle)


def test_what_would_be_refused_as_a_bomb_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_deploy.runtime.archive.pack.HARMLESS", 1 << 20)
    bundle = write_bundle(tmp_path / "bundle", {"decoder.onnx.data": bytes(2 << 20)})
    assert f"less than 1 in {frame.LARGEST_FACTOR}: its weights are all but the same number" in not_packed(bundle)


def test_option_errors_name_their_options(bundle: Path) -> None:
    with pytest.raises(OptionError) as raised:
        pack(bundle, bundle.parent / "new.lvd", PackOptions(graphs=False))
    assert raised.value.option == "no_graphs"
