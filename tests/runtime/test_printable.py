"""Names that others chose, on their way to a terminal: nothing of them commands it, and JSON stays JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from llava_deploy.runtime.printable import as_argument, printable, printable_json

Invoke = Callable[..., Result]
EVIL = "\x1b]0;title\x07\x1b[31mred\x9b2J[bold]x[/y]\u202e\r\nsecond é🙂"


@pytest.fixture
def evil(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose manifest was written by somebody who means harm, in a directory of a harmful name."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "a\x1b[31m[/y]"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"].update(name=EVIL, vision=EVIL, layout=EVIL)
    manifest["tools"] = {EVIL: EVIL}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def commands_in(text: str) -> list[str]:
    return [char for char in text if char not in "\n\t" and (ord(char) < 32 or 127 <= ord(char) < 160)]


@pytest.mark.parametrize("arguments", [["inspect"], ["doctor"], ["plan"], ["inspect", "--json"], ["doctor", "--json"]])
def test_nothing_of_a_manifest_commands_the_terminal(arguments: list[str], evil: Path, invoke: Invoke) -> None:
    result = invoke(*arguments, evil)
    assert commands_in(result.stdout + result.stderr) == []
    assert "second" in result.stdout


def test_nor_of_an_archive(evil: Path, tmp_path: Path, invoke: Invoke) -> None:
    archive = tmp_path / "m.lvd"
    packed = invoke("pack", evil, "--without-goldens", "-o", archive)
    assert packed.exit_code == 0
    unpacked = invoke("unpack", archive, "-o", tmp_path / "b")
    for result in (packed, invoke("inspect", archive), unpacked):
        assert commands_in(result.stdout + result.stderr) == []
    assert len(unpacked.stderr.splitlines()) == 2


def test_nor_of_an_error(tmp_path: Path, invoke: Invoke, error_line: Callable[[Result], str]) -> None:
    assert commands_in(error_line(invoke("inspect", tmp_path / "\x1b[31m\x9b2J"))) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_in_any_encoding(encoding: str, evil: Path, child_environment: dict[str, str]) -> None:
    code = f"from llava_deploy.cli import main; main(['inspect', {str(evil)!r}, '--json'])"
    environment = {**child_environment, "PYTHONIOENCODING": encoding}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert json.loads(found.stdout.decode(encoding))["model"]["name"] == EVIL


def test_what_has_nothing_to_hide_stays() -> None:
    assert printable("tab\t, line\n, é🙂 “x”") == "tab\t, line\n, é🙂 “x”"
    assert printable("\x1b[31m") == "\N{REPLACEMENT CHARACTER}[31m"
    assert json.loads(printable_json(json.dumps(EVIL, ensure_ascii=False))) == EVIL


@pytest.mark.parametrize(
    ("path", "typed"), [("b/c", "b/c"), ("-b", "./-b"), ("a b", "'a b'"), ("-a b", "'./-a b'"), ("/x/-y", "/x/-y")]
)
def test_a_path_can_be_typed(path: str, typed: str) -> None:
    assert as_argument(Path(path)) == typed


def test_streams_that_are_closed(demo_bundle: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    archive = tmp_path / "m.lvd"
    code = (
        "from llava_deploy.cli import main\n"
        f"main(['pack', {str(demo_bundle)!r}, '--without-goldens', '-o', {str(archive)!r}])"
    )
    shell = f'exec "{sys.executable}" -c "$0" <&- >&- 2>&-'
    subprocess.run(["/bin/bash", "-c", shell, code], check=True, env=child_environment)
    assert archive.stat().st_size > 0


def test_a_directory_that_is_gone(demo_bundle: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    (tmp_path / "gone").mkdir()
    arguments = ["pack", str(demo_bundle), "--without-goldens", "-o", "m.lvd"]
    code = f"import os; os.rmdir(os.getcwd()); from llava_deploy.cli import main; main({arguments!r})"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=child_environment,
        cwd=tmp_path / "gone",
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr == "error: the directory that this was called in is gone; change to one that is there\n"
