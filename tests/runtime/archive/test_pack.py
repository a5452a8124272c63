from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_archive import ENGINE, FILES, members_of, tar_in, tree, write_bundle

from llava_deploy.engines import staging
from llava_deploy.engines.errors import BundleError, InputError, LlavaDeployError, OptionError
from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, parse_manifest, read_manifest
from llava_deploy.runtime.archive import frame
from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import pack
from llava_deploy.runtime.archive.unpack import unpack

EVERYTHING = PackOptions(engines=(ENGINE,))
GRAPHS = ["decoder.onnx", "decoder.onnx.data", "vision.onnx", "vision.onnx.data"]


def packed(bundle: Path, options: PackOptions = EVERYTHING) -> bytes:
    output = bundle.parent / "packed.lvd"
    pack(bundle, output, options, replace=output.exists())
    return output.read_bytes()


def refused(bundle: Path, options: PackOptions = EVERYTHING) -> str:
    """The message; nothing is left behind."""
    beside = sorted(bundle.parent.iterdir())
    with pytest.raises(LlavaDeployError) as raised:
        pack(bundle, bundle.parent / "new.lvd", options)
    assert sorted(bundle.parent.iterdir()) == beside
    return str(raised.value)


def test_there_and_back(bundle: Path, archive: Path, tmp_path: Path) -> None:
    unpack(archive, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(bundle)
    assert packed(tmp_path / "again") == archive.read_bytes()


def test_without_options_there_is_no_engine(bundle: Path) -> None:
    members = members_of(tar_in(packed(bundle, PackOptions())))
    assert members == {path: content for path, content in tree(bundle).items() if not path.startswith("engines/")}


def test_the_order_is_the_manifest_then_by_path(archive: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(tar_in(archive.read_bytes()))) as opened:
        names = opened.getnames()
    assert names[:2] == ["archive.json", MANIFEST_NAME]
    assert names[2:] == sorted(names[2:])
    assert f"engines/{ENGINE}/engine.json" in names


@pytest.mark.skipif(shutil.which("tar") is None or shutil.which("zstd") is None, reason="needs tar and zstd")
def test_tar_reads_it(bundle: Path, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "by-tar").mkdir()
    run = ["tar", "--zstd", "-xf", archive, "-C", tmp_path / "by-tar"]
    result = subprocess.run(run, check=True, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("", "")
    found = tree(tmp_path / "by-tar")
    assert found.pop("archive.json")
    assert found == tree(bundle)


def _touched(bundle: Path, to: Path) -> Path:
    for path in [*bundle.rglob("*")]:
        os.utime(path, (1, 1))
    return bundle


def _copied(bundle: Path, to: Path) -> Path:
    """Elsewhere, the files made in another order and with another mode."""
    for path, content in reversed(tree(bundle).items()):
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        (to / path).write_bytes(content)
        (to / path).chmod(0o600)
    return to


def _linked(bundle: Path, to: Path) -> Path:
    to.symlink_to(bundle, target_is_directory=True)
    return to


@pytest.mark.parametrize("change", [_touched, _copied, _linked])
def test_equal_bundles_are_equal_bytes(
    change: Callable[[Path, Path], Path], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = packed(bundle)
    (tmp_path / "elsewhere").mkdir()
    other = change(bundle, tmp_path / "elsewhere" / "another name")
    monkeypatch.chdir(tmp_path / "elsewhere")
    mask = os.umask(0o077)
    try:
        assert packed(other) == before
    finally:
        os.umask(mask)


def test_the_bytes_do_not_depend_on_processors_or_moments(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """Large enough for several jobs of the compressor's threads; in a process that may use one processor."""
    rows = os.urandom(1 << 20) + b"abcdefgh" * (3 << 17)
    bundle = write_bundle(tmp_path / "bundle", {"decoder.onnx.data": rows * 5})
    before = packed(bundle, PackOptions())
    assert packed(bundle, PackOptions()) == before
    script = f"""
import os, pathlib
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
from llava_deploy.runtime.archive.pack import pack
pack(pathlib.Path({str(bundle)!r}), pathlib.Path({str(tmp_path / "other.lvd")!r}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=child_environment)
    assert (tmp_path / "other.lvd").read_bytes() == before


def test_without_graphs_they_are_remembered(bundle: Path) -> None:
    members = members_of(tar_in(packed(bundle, replace(EVERYTHING, graphs=False))))
    manifest = parse_manifest(members[MANIFEST_NAME], where="packed")
    assert [entry.path for entry in manifest.left_out] == GRAPHS
    assert not {*GRAPHS} & {entry.path for entry in manifest.files}
    assert not {*GRAPHS} & members.keys()
    before = read_manifest(bundle)
    assert sorted((*manifest.files, *manifest.left_out), key=lambda e: e.path) == [*before.files]


def test_without_goldens_nothing_is_left_of_them(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.lvd"
    pack(bundle, output, PackOptions(goldens=False))
    manifest = unpack(output, tmp_path / "small")
    assert sorted(tree(tmp_path / "small")) == sorted([*FILES, MANIFEST_NAME])
    assert {entry.path for entry in manifest.files} == {*FILES}
    assert manifest.left_out == ()
    assert "want goldens" in refused(tmp_path / "small", PackOptions())
    assert f"llava-deploy record CHECKPOINT {tmp_path / 'small'}" in refused(tmp_path / "small", PackOptions())


def test_all_engines(bundle: Path) -> None:
    assert packed(bundle, PackOptions(engines=("all",))) == packed(bundle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PackOptions(engines=("other",)), f"engine: want {ENGINE}, or all, got 'other'"),
        (PackOptions(engines=("../goldens",)), f"engine: want {ENGINE}, or all, got '../goldens'"),
        (PackOptions(graphs=False), "no_graphs: nothing would be left that runs; choose an engine too"),
    ],
)
def test_options_that_cannot_be(bundle: Path, options: PackOptions, message: str) -> None:
    assert message in refused(bundle, options)


def test_a_bundle_without_engines_has_none_to_choose(bundle: Path) -> None:
    shutil.rmtree(bundle / "engines")
    for name in ("all", "x"):
        assert "want an engine, of which the bundle has none" in refused(bundle, PackOptions(engines=(name,)))


def test_a_bundle_packed_without_graphs_needs_its_engine(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "a.lvd", replace(EVERYTHING, graphs=False))
    unpack(tmp_path / "a.lvd", tmp_path / "again")
    assert packed(tmp_path / "again") == (tmp_path / "a.lvd").read_bytes()
    assert "has no graphs, since it was packed without" in refused(tmp_path / "again", PackOptions())


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
    assert message in refused(bundle)


def test_a_link_alone_in_the_place_of_a_file(bundle: Path, tmp_path: Path) -> None:
    (bundle / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (bundle / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert f"a link to {tmp_path / 'tokenizer.json'}; an archive holds none" in refused(bundle)


def test_an_engine_of_other_graphs(bundle: Path) -> None:
    (bundle / "vision.onnx").write_bytes(b"another")
    manifest = read_manifest(bundle)
    files = tuple(describe_file(bundle, entry.path) for entry in manifest.files)
    (bundle / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    assert "was built from other graphs than the bundle's" in refused(bundle)
    assert packed(bundle, PackOptions())


def test_a_file_that_changes_while_it_is_packed(bundle: Path, tmp_path: Path) -> None:
    def change(done: int, _total: int) -> None:
        if done:
            (bundle / "vision.onnx.data").write_bytes(b"\1" * 100)

    with pytest.raises(BundleError, match=r"vision.onnx.data: want sha256 .*: the file was altered"):
        pack(bundle, tmp_path / "new.lvd", on_progress=change)
    assert not (tmp_path / "new.lvd").exists()


def test_progress_goes_to_the_end(bundle: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    pack(bundle, tmp_path / "new.lvd", on_progress=lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] > 0


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
    assert message in refused(bundle)


def test_a_file_that_may_not_be_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return really(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    assert "tokenizer.json: cannot be read (Permission denied)" in refused(bundle)


def test_what_would_be_refused_as_a_bomb_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_deploy.runtime.archive.pack.HARMLESS", 1 << 20)
    bundle = write_bundle(tmp_path / "bundle", {"decoder.onnx.data": bytes(2 << 20)})
    assert f"less than 1 in {frame.LARGEST_FACTOR}: its weights are all but the same number" in refused(bundle)


def test_option_errors_name_their_options(bundle: Path) -> None:
    with pytest.raises(OptionError) as raised:
        pack(bundle, bundle.parent / "new.lvd", PackOptions(graphs=False))
    assert raised.value.option == "no_graphs"
