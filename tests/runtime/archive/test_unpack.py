from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_archive import ENGINE, tree, write_bundle

from llava_deploy.engines.errors import BundleError, InputError, LlavaDeployError
from llava_deploy.engines.manifest import read_manifest
from llava_deploy.runtime.archive.archive import open_archive
from llava_deploy.runtime.archive.pack import pack
from llava_deploy.runtime.archive.unpack import unpack


def test_an_archive_says_what_it_is_before_it_is_unpacked(archive: Path, bundle: Path) -> None:
    with open_archive(archive) as opened:
        assert opened.manifest == read_manifest(bundle)
        assert opened.listing.engines == (ENGINE,)
        assert (opened.listing.model, opened.listing.precision) == ("tiny", "fp32")
        assert opened.size == archive.stat().st_size


def test_it_gives_the_manifest_and_new_directories(archive: Path, bundle: Path, tmp_path: Path) -> None:
    assert unpack(archive, tmp_path / "deep" / "er" / "again") == read_manifest(bundle)
    assert tree(tmp_path / "deep" / "er" / "again") == tree(bundle)


def test_modes_are_those_of_new_files(archive: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        unpack(archive, tmp_path / "again")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert (tmp_path / "again" / "engines").stat().st_mode & 0o777 == 0o750


def test_large_members_in_many_pieces(tmp_path: Path) -> None:
    """A member of no whole number of pieces, blocks of the frame of each kind, and a path in an extended header."""
    contents = {
        "decoder.onnx.data": os.urandom(3_000_001) + bytes(2_000_000) + b"abcdefg" * 200_000,
        f"goldens/{'größer' * 20}.npy": b"x" * 5,
    }
    bundle = write_bundle(tmp_path / "bundle", contents)
    pack(bundle, tmp_path / "model.lvd")
    shutil.rmtree(bundle / "engines")
    steps: list[tuple[int, int]] = []
    unpack(tmp_path / "model.lvd", tmp_path / "again", on_progress=lambda done, total: steps.append((done, total)))
    assert tree(tmp_path / "again") == tree(bundle)
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] == sum(map(len, tree(bundle).values()))


def test_a_bundle_that_is_there(archive: Path, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    unpack(archive, output)
    (output / "engines" / ENGINE / "mine").write_bytes(b"x")
    with pytest.raises(InputError, match="exists already; choose another directory, or replace it with --force"):
        unpack(archive, output)
    assert (output / "engines" / ENGINE / "mine").exists()
    unpack(archive, output, replace=True)
    assert tree(output) == tree(bundle)


def test_only_a_bundle_is_replaced(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for place in (tmp_path / "home", archive):
        with pytest.raises(InputError, match="exists and is not a bundle, which is all that --force replaces"):
            unpack(archive, place, replace=True)


def test_after_an_error_the_old_bundle_is_as_it_was(archive: Path, bundle: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the checksum, the last that is read
    before = tree(bundle)
    with pytest.raises(BundleError):
        unpack(archive, bundle, replace=True)
    assert tree(bundle) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "model.lvd"]


def test_a_full_disk_is_known_beforehand(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(LlavaDeployError, match=r"the disk is full: the bundle wants [\d,]+ bytes, .* has 5 free"):
        unpack(archive, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full, nothing was written"), (errno.EACCES, "not written (Permission denied")],
)
def test_errors_while_it_is_written(
    code: int, message: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really: Callable[..., object] = Path.open

    def fail(self: Path, mode: str = "r", *rest: object, **named: object) -> object:
        if self.name == "vision.onnx.data" and mode == "xb":
            raise OSError(code, os.strerror(code), str(self))
        return really(self, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(LlavaDeployError) as raised:
        unpack(archive, tmp_path / "again")
    assert message in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.lvd"]


def test_an_archive_that_cannot_be_read(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object) -> object:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(LlavaDeployError, match=r"model.lvd: cannot be read \(Permission denied\)"):
        unpack(archive, tmp_path / "again")


def test_what_is_no_file(tmp_path: Path, bundle: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, found in ((tmp_path / "none", "found nothing"), (bundle, "a directory"), (tmp_path / "pipe", "mode p")):
        with pytest.raises(BundleError, match=found):
            unpack(place, tmp_path / "again")
