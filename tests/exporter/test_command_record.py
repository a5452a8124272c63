"""``record`` and ``export --goldens`` as people meet them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from llava_deploy.engines.goldens import has_goldens, read_goldens
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import read_manifest

Invoke = Callable[..., Result]
SAID = "goldens recorded: one-picture, text-only, two-pictures, "


def test_export_with_goldens_is_export_and_record(invoke: Invoke, demo_checkpoint: Path, tmp_path: Path) -> None:
    at_once, later = tmp_path / "at-once", tmp_path / "later"
    result = invoke(
        *("export", demo_checkpoint, "-o", at_once, "--precision", "int4", "--group-size", 32),
        *("--goldens", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.stderr
    assert SAID in result.stderr
    assert result.stdout == f"{at_once}\n"
    manifest = read_manifest(at_once)
    check_files(at_once, manifest.files, Integrity.FULL, remedy="")
    assert len(read_goldens(at_once, manifest).goldens) == 3

    assert invoke("export", demo_checkpoint, "-o", later, "--precision", "int4", "--group-size", 32).exit_code == 0
    assert not has_goldens(read_manifest(later))
    result = invoke("record", demo_checkpoint, later)
    assert result.exit_code == 0, result.stderr
    assert SAID in result.stderr
    assert result.stdout == f"{later}\n"
    assert read_manifest(later) == manifest


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    invoke: Invoke, error_line: Callable[[Result], str], demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    result = invoke("export", demo_checkpoint, "-o", tmp_path / "bundle", "--goldens", "--device", "cuda:64")
    assert result.exit_code == 2
    assert "--device: want cuda:64, torch finds" in error_line(result)
    assert not (tmp_path / "bundle").exists()
    assert "--device: want cpu" in error_line(invoke("record", demo_checkpoint, demo_bundle, "--device", "tpu"))
    result = invoke("export", demo_checkpoint, "-o", tmp_path / "bundle", "--device", "cpu")
    assert "--device: of use with" in error_line(result)


def test_what_is_left_out_is_said(invoke: Invoke, demo_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(demo_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "chat_template.jinja").write_text(
        "{% for part in messages[0]['content'] %}{{ part['text'] or raise_exception('texts only') }}{% endfor %}"
    )
    result = invoke("export", checkpoint, "-o", tmp_path / "bundle", "--goldens")
    assert result.exit_code == 0, result.stderr
    for name in ("one-picture", "two-pictures"):
        assert f"golden left out: {name} (the chat template does not take it)" in result.stderr
    goldens = read_goldens(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))
    assert [golden.name for golden in goldens.goldens] == ["text-only"]


def test_not_a_bundle(
    invoke: Invoke, error_line: Callable[[Result], str], demo_checkpoint: Path, tmp_path: Path
) -> None:
    result = invoke("record", demo_checkpoint, tmp_path)
    assert result.exit_code != 0
    assert "want a bundle directory" in error_line(result)
