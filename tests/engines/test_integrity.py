from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines import integrity
from llava_deploy.engines.errors import BundleError, OptionError
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import FileEntry, describe_file

CONTENT = bytes(range(200))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    bundle = tmp_path / "bundle"
    (bundle / "deep").mkdir(parents=True)
    (bundle / "deep" / "weights").write_bytes(CONTENT)
    return bundle


@pytest.fixture
def entry(root: Path) -> FileEntry:
    return describe_file(root, "deep/weights")


def error_of(root: Path, entry: FileEntry, how: Integrity = Integrity.FULL) -> str:
    with pytest.raises(BundleError) as raised:
        check_files(root, [entry], how, remedy="mend it")
    return str(raised.value)


@pytest.mark.parametrize("how", Integrity)
def test_whole_files_pass(root: Path, entry: FileEntry, how: Integrity) -> None:
    check_files(root, [entry], how, remedy="")
    check_files(root, [], how, remedy="")


@pytest.mark.parametrize("how", Integrity)
@pytest.mark.parametrize("place", [0, 77, 199])
def test_one_altered_byte(root: Path, entry: FileEntry, how: Integrity, place: int) -> None:
    altered = bytearray(CONTENT)
    altered[place] ^= 1
    (root / entry.path).write_bytes(altered)
    text = error_of(root, entry, how)
    assert text.startswith(f"{root / entry.path}: want sha256 {entry.sha256[:12]}…, found ")
    assert text.endswith(": the file was altered; mend it")


@pytest.mark.parametrize("content", [CONTENT[:-1], b"", CONTENT + b"x"])
def test_another_size(root: Path, entry: FileEntry, content: bytes) -> None:
    (root / entry.path).write_bytes(content)
    text = error_of(root, entry, Integrity.QUICK)
    assert text == f"{root / entry.path}: want 200 bytes, found {len(content)}: the file was altered; mend it"


def test_a_missing_file(root: Path, entry: FileEntry) -> None:
    (root / entry.path).unlink()
    assert error_of(root, entry) == f"{root / entry.path}: want a file of 200 bytes, found none; mend it"


def test_a_directory_in_a_files_place(root: Path, entry: FileEntry) -> None:
    (root / entry.path).unlink()
    (root / entry.path).mkdir()
    assert "want a file of 200 bytes, found none" in error_of(root, entry)


def test_a_link_inside_is_followed_and_one_that_leads_out_is_not(root: Path, entry: FileEntry) -> None:
    weights, twin = root / entry.path, root / "twin"
    twin.write_bytes(CONTENT)
    weights.unlink()
    weights.symlink_to(twin)
    check_files(root, [entry], Integrity.FULL, remedy="")
    outside = root.parent / "outside"
    twin.rename(outside)
    weights.unlink()
    weights.symlink_to(outside)
    assert error_of(root, entry) == f"{weights}: leads out of the bundle to {outside}; mend it"


def test_a_bundle_that_is_itself_reached_by_a_link(root: Path, entry: FileEntry) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    check_files(link, [entry], Integrity.FULL, remedy="")


def test_the_name_of_an_integrity_is_not_taken_for_the_weaker_one(root: Path, entry: FileEntry) -> None:
    wrong: Any = "full"
    with pytest.raises(OptionError, match=r"integrity: want Integrity\.QUICK or Integrity\.FULL, got 'full'"):
        check_files(root, [entry], wrong, remedy="")


def test_quick_leaves_large_files_to_full(root: Path, entry: FileEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "QUICK_LIMIT", 199)
    (root / entry.path).write_bytes(CONTENT[::-1])
    check_files(root, [entry], Integrity.QUICK, remedy="")
    assert "the file was altered" in error_of(root, entry, Integrity.FULL)
