"""What is packed comes back, and equal bundles are equal bytes."""

from __future__ import annotations

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
from tiny_archive import ENGINE, EVERYTHING, FILES, members_of, not_packed, packed, tar_in, tree, write_bundle

from llava_deploy.engines.manifest import MANIFEST_NAME, parse_manifest, read_manifest
from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import pack
from llava_deploy.runtime.archive.unpack import unpack

GRAPHS = ["decoder.onnx", "decoder.onnx.data", "vision.onnx", "vision.onnx.data"]


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
    assert "want goldens" in not_packed(tmp_path / "small", PackOptions())
    assert f"llava-deploy record CHECKPOINT {tmp_path / 'small'}" in not_packed(tmp_path / "small", PackOptions())


def test_all_engines(bundle: Path) -> None:
    assert packed(bundle, PackOptions(engines=("all",))) == packed(bundle)


def test_progress_goes_to_the_end(bundle: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    pack(bundle, tmp_path / "new.lvd", on_progress=lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] > 0
