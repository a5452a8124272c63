from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llava_deploy.engines.manifest import MANIFEST_NAME
from llava_deploy.engines.rewriting import rewritten_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A directory like a bundle."""
    place = tmp_path / "bundle"
    for name in (MANIFEST_NAME, "decoder.onnx", "goldens/a/logits.npy", "engines/e/engine.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"old {name}")
    return place


def listing(directory: Path) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): p.read_text() for p in directory.rglob("*") if p.is_file()}


def test_what_stays_is_the_same_file_and_what_changes_is_written(bundle: Path) -> None:
    inode = (bundle / "decoder.onnx").stat().st_ino
    with rewritten_bundle(bundle, keeps=lambda path: not path.startswith("goldens/")) as staging:
        assert listing(staging) == {n: f"old {n}" for n in ("decoder.onnx", "engines/e/engine.json")}
        (staging / MANIFEST_NAME).write_text("new")
        assert listing(bundle)[MANIFEST_NAME] == f"old {MANIFEST_NAME}"
    assert listing(bundle).keys() == {MANIFEST_NAME, "decoder.onnx", "engines/e/engine.json"}
    assert listing(bundle)[MANIFEST_NAME] == "new"
    assert (bundle / "decoder.onnx").stat().st_ino == inode
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_an_error_leaves_the_old_bundle_and_nothing_else(bundle: Path) -> None:
    before = listing(bundle)
    with pytest.raises(RuntimeError), rewritten_bundle(bundle, keeps=lambda _: True) as staging:
        (staging / MANIFEST_NAME).write_text("new")
        raise RuntimeError
    assert listing(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_without_hard_links_files_are_copied(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    inode = (bundle / "decoder.onnx").stat().st_ino
    monkeypatch.setattr(os, "link", refuse)
    with rewritten_bundle(bundle, keeps=lambda _: True) as staging:
        (staging / MANIFEST_NAME).write_text("new")
    assert (bundle / "decoder.onnx").read_text() == "old decoder.onnx"
    assert (bundle / "decoder.onnx").stat().st_ino != inode


def test_a_link_to_a_bundle_stays_a_link(bundle: Path) -> None:
    link = bundle.parent / "current"
    link.symlink_to(bundle.name)
    with rewritten_bundle(link, keeps=lambda _: True) as staging:
        (staging / MANIFEST_NAME).write_text("new")
    assert link.is_symlink()
    assert (bundle / MANIFEST_NAME).read_text() == "new"
