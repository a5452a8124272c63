from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from tiny_archive import ENGINE, tree, write_bundle

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda
from llava_deploy.runtime import terminal

Invoke = Callable[..., Result]
ErrorLine = Callable[[Result], str]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def archive(bundle: Path, tmp_path: Path, invoke: Invoke) -> Path:
    result = invoke("pack", bundle, "-o", tmp_path / "model.lvd")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "model.lvd"


def test_pack_says_what_comes_next(bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("pack", bundle, "-o", tmp_path / "model.lvd")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'model.lvd'}\n")
    left, sizes, after = result.stderr.splitlines()
    assert left == f"without {ENGINE}: an engine is for one version and device; --engine takes it along"
    assert " x the weights, in " in sizes
    assert after == "next: take it there, then: llava-deploy unpack model.lvd -o bundle"


def test_pack_says_that_an_engine_has_the_weights_of_the_graphs(
    demo_bundle_fp16: Path, tmp_path: Path, invoke: Invoke
) -> None:
    bundle = shutil.copytree(demo_bundle_fp16, tmp_path / "fp16", ignore=shutil.ignore_patterns(ENGINES))
    engine = build_onnxruntime_cuda(bundle).name
    size = terminal.size(sum(path.stat().st_size for path in bundle.glob("*.data")))
    for options, lines in (((), 1), (("--no-graphs",), 0)):
        result = invoke(
            "pack", bundle, "-o", tmp_path / f"{lines}.lvd", "--without-goldens", "--engine", engine, *options
        )
        assert result.exit_code == 0, result.stderr
        said = [line for line in result.stderr.splitlines() if "twice" in line]
        assert said == [f"{size} are in it twice, of graphs and engine; --no-graphs packs them once"] * lines


def test_unpack_says_what_comes_next(archive: Path, bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("unpack", archive, "-o", tmp_path / "again")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'again'}\n")
    assert result.stderr.splitlines()[0].startswith("tiny in fp32, every file as it was packed, in ")
    assert result.stderr.splitlines()[1] == f"next: llava-deploy selftest {tmp_path / 'again'}"
    assert tree(tmp_path / "again").items() <= tree(bundle).items()


def test_quiet_says_the_path_alone(bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    results = [
        invoke("pack", bundle, "-o", tmp_path / "a.lvd", "-q", "--engine", "all", "--no-graphs", "--without-goldens"),
        invoke("unpack", tmp_path / "a.lvd", "-o", tmp_path / "again", "-q"),
    ]
    assert [result.stderr for result in results] == ["", ""]
    kept = {"manifest.json", "embed_tokens.npy", "tokenizer.json"}
    assert {path for path in tree(tmp_path / "again") if not path.startswith("engines/")} == kept


def test_nothing_is_replaced_without_force(archive: Path, bundle: Path, invoke: Invoke, error_line: ErrorLine) -> None:
    for command in (("pack", bundle, "-o", archive), ("unpack", archive, "-o", bundle)):
        assert "exists already" in error_line(invoke(*command))
        assert invoke(*command, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "x"), f"--engine: want {ENGINE}, or all, got 'x'"),
        (("--no-graphs",), "--no-graphs: nothing would be left that runs; choose an engine too, with --engine"),
    ],
)
def test_options_that_cannot_be(
    options: tuple[str, ...], message: str, bundle: Path, tmp_path: Path, invoke: Invoke, error_line: ErrorLine
) -> None:
    result = invoke("pack", bundle, "-o", tmp_path / "new.lvd", *options)
    assert result.exit_code == 2
    assert message in error_line(result)


def test_no_archive(bundle: Path, tmp_path: Path, invoke: Invoke, error_line: ErrorLine) -> None:
    for place in (bundle / "manifest.json", bundle, tmp_path / "none"):
        result = invoke("unpack", place, "-o", tmp_path / "again")
        assert (result.exit_code, result.stdout) == (2, "")
        assert str(place) in error_line(result)


def test_inspect_says_what_an_archive_is(archive: Path, invoke: Invoke) -> None:
    result = invoke("inspect", archive)
    assert (result.exit_code, result.stderr) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["Archive"] == str(archive)
    assert facts["model"].startswith("tiny (llava-hf layout)")
    assert (facts["engines"], facts["goldens"]) == ("none", "in it")
    found = json.loads(invoke("inspect", archive, "--json").stdout)
    assert found["archive"]["size"] == archive.stat().st_size
    assert found["archive"]["members"][0]["path"] == "manifest.json"
    assert found["manifest"]["model"]["name"] == "tiny"


def test_inspect_of_a_file_that_is_none(bundle: Path, archive: Path, invoke: Invoke, error_line: ErrorLine) -> None:
    assert "want a file that llava-deploy pack made" in error_line(invoke("inspect", bundle / "tokenizer.json"))
    assert "--lora: of no effect on an archive" in error_line(invoke("inspect", archive, "--lora", "x"))
