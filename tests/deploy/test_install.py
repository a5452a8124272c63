"""install.sh and uninstall.sh for real: below a root of their own, with paths that have spaces."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
AIM = 150_000_000
"""Bytes on the disk, of an installation that answers on a CPU."""

Run = subprocess.CompletedProcess[str]


def run(*command: object, environment: dict[str, str], code: int = 0) -> str:
    result: Run = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert result.returncode == code, (result.stdout, result.stderr)
    return result.stdout + result.stderr


def tree(root: Path) -> dict[str, tuple[int, int, int, str]]:
    """Everything below a folder: kind and mode, size, time, and where links lead."""
    return {
        str(path.relative_to(root)): (
            (status := path.lstat()).st_mode,
            status.st_size,
            status.st_mtime_ns,
            str(path.readlink()) if path.is_symlink() else "",
        )
        for path in root.rglob("*")
    }


def program(root: Path) -> Path:
    return root / "usr" / "local" / "bin" / "llava-deploy"


@pytest.fixture(scope="module")
def install(package: Path, wheels: Path, archive: Path, deploy_environment: dict[str, str]) -> Callable[..., str]:
    """Call install.sh; what it said."""

    def call(root: Path, *options: object, code: int = 0, wheel: Path = package, model: Path = archive) -> str:
        common = ("--root", root, "--wheel", wheel, "--offline", wheels, "--archive", model, "--python", sys.executable)
        return run(DEPLOY / "install.sh", *common, *options, environment=deploy_environment, code=code)

    return call


@pytest.fixture(scope="module")
def installed(install: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation below a root; tests leave it working."""
    root = tmp_path_factory.mktemp("a root")
    said = install(root)
    assert "pass: 3 goldens replayed, every stage within its tolerance" in said
    assert re.search(r"^Done: llava-deploy is at ", said, re.MULTILINE)
    return root


def test_a_dry_run_changes_nothing(
    install: Callable[..., str], installed: Path, tmp_path: Path, deploy_environment: dict[str, str]
) -> None:
    home, temporary = Path(deploy_environment["HOME"]), Path(tempfile.gettempdir())
    before = tree(installed), tree(home), set(temporary.glob("llava-deploy.*"))
    said = install(tmp_path, "--dry-run")
    assert [*tmp_path.iterdir()] == []
    steps = re.findall(r"^(\d)\. ", said, re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5", "6"]
    for word in ("-m venv", "pip install", "trim.py", "unpack", "selftest", "ln -sfn", "llava-deploy@.service"):
        assert re.search(rf"^  \$ .*{re.escape(word)}", said, re.MULTILINE), word
    install(installed, "--dry-run")
    run(installed / "opt/llava-deploy/uninstall.sh", "--root", installed, "--purge", "--dry-run",
        environment=deploy_environment)  # fmt: skip
    assert (tree(installed), tree(home), set(temporary.glob("llava-deploy.*"))) == before


def test_a_torch_free_environment_passes_the_selftest(
    installed: Path, archive: Path, tmp_path: Path, deploy_environment: dict[str, str]
) -> None:
    python = installed / "opt" / "llava-deploy" / "current" / "bin" / "python"
    absent = ("torch", "transformers", "onnx", "safetensors", "huggingface_hub", "pip")
    script = f"import importlib.util as u; print([n for n in {absent!r} if u.find_spec(n)])"
    assert run(python, "-c", script, environment=deploy_environment) == "[]\n"
    bundle = tmp_path / "a bundle"
    run(program(installed), "unpack", archive, "-o", bundle, environment=deploy_environment)
    verdict = json.loads(run(program(installed), "selftest", bundle, "--json", "-q", environment=deploy_environment))
    assert "torch" not in verdict.get("versions", {})
    weights = bundle / "decoder.onnx.data"
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    assert "files" in run(program(installed), "selftest", bundle, environment=deploy_environment, code=1)


def test_the_size_of_an_installation(installed: Path) -> None:
    blocks = {path.lstat().st_ino: path.lstat().st_blocks for path in (installed / "opt").rglob("*")}
    assert sum(blocks.values()) * 512 < AIM


def test_the_installed_program_serves(installed: Path, deploy_environment: dict[str, str]) -> None:
    model = installed / "var" / "lib" / "llava-deploy" / "models" / "tiny"
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        path = Path(folder) / "socket"
        service = subprocess.Popen([program(installed), "serve", model, "--socket", path], env=deploy_environment)
        with socket.socket(socket.AF_UNIX) as client:
            for _ in range(600):
                try:
                    client.connect(str(path))
                    break
                except OSError:
                    time.sleep(0.05)
            client.sendall(b'{"prompt": "What is this?", "max_new_tokens": 4, "stream": false}\n')
            with client.makefile() as lines:
                assert json.loads(lines.readline())["done"] is True
        service.terminate()
        assert service.wait(20) == 0
    # ONNX Runtime would keep there what it reports of its use.
    assert not [path for path in Path(deploy_environment["HOME"]).rglob("*") if "Microsoft" in str(path)]


def test_what_fails_half_way_leaves_the_old_one(install: Callable[..., str], installed: Path, tmp_path: Path) -> None:
    before = tree(installed)
    no_wheel = tmp_path / "llava_deploy-9.9-py3-none-any.whl"
    no_wheel.write_bytes(b"PK\x03\x04 not a wheel")
    broken = tmp_path / "tiny.lvd"
    broken.write_bytes(b"\x28\xb5\x2f\xfd not an archive")
    said = install(installed, model=broken, code=2)
    assert "What was there before is as it was, and works on." in said
    after = tree(installed)
    assert after.keys() == before.keys()
    noted = {"opt/llava-deploy/installed", "opt/llava-deploy/venvs", "var/lib/llava-deploy/models"}
    assert {name for name in before if after[name] != before[name]} <= noted
    other = tmp_path / "another root"
    other.mkdir()
    assert "nothing is left of it" in install(other, wheel=no_wheel, code=1)
    assert [*other.iterdir()] == []


def test_what_fails_at_the_last_step_goes_back(
    install: Callable[..., str], installed: Path, deploy_environment: dict[str, str]
) -> None:
    commands, aside = installed / "usr" / "local" / "bin", installed / "usr" / "local" / "aside"
    current = (installed / "opt/llava-deploy/current").readlink()
    models = installed / "var/lib/llava-deploy/models"
    before = tree(models / "tiny")
    commands.rename(aside)
    commands.write_text("no folder to put a link into\n")
    said = install(installed, code=1)
    commands.unlink()
    aside.rename(commands)
    assert "What was there before is as it was, and works on." in said
    assert (installed / "opt/llava-deploy/current").readlink() == current
    assert [path.name for path in models.iterdir()] == ["tiny"]
    assert tree(models / "tiny") == before
    assert re.match(r"llava-deploy, version", run(program(installed), "--version", environment=deploy_environment))


def test_a_second_run_takes_the_place_of_the_first(
    install: Callable[..., str], installed: Path, archive: Path, tmp_path: Path, deploy_environment: dict[str, str]
) -> None:
    prefix = installed / "opt" / "llava-deploy"
    settings = installed / "etc" / "llava-deploy" / "tiny.env"
    settings.write_text("LLAVA_DEPLOY_OPTIONS=--max-len 512\n")
    (prefix / "venvs" / "19700101T000000.1").mkdir()
    before = (prefix / "current").readlink(), sorted(tree(installed).keys() - tree(prefix / "venvs").keys())
    used = [f"{prefix}/{before[0]}/bin/python", "-c", "import numpy; print(flush=True); input()"]
    with subprocess.Popen(used, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        said = install(installed, "--no-service", model=shutil.copy(archive, tmp_path / "tiny.lvd"))
        process.communicate(b"\n")
    assert f"{prefix}/{before[0]} is in use, and stays until the next run" in said
    assert (prefix / "current").readlink() != before[0]
    kept = {(prefix / "current").readlink().name, before[0].name}
    assert {path.name for path in (prefix / "venvs").iterdir()} == kept
    assert [path.name for path in (installed / "var/lib/llava-deploy/models").iterdir()] == ["tiny"]
    assert settings.read_text() == "LLAVA_DEPLOY_OPTIONS=--max-len 512\n"
    assert re.match(r"llava-deploy, version", run(program(installed), "--version", environment=deploy_environment))


LINES = (
    *("tree /etc", "tree /opt/llava-deploy/venvs/../../..", "file /etc/passwd", "link /etc/localtime", "dir relative"),
    *("model /var/lib/llava-deploy/models/..", "rm -rf /", "dir /opt/../etc", "unit ssh.service", ""),
)


def test_uninstall_refuses_what_install_did_not_write(installed: Path, deploy_environment: dict[str, str]) -> None:
    listed = installed / "opt" / "llava-deploy" / "installed"
    right = listed.read_text()
    before = tree(installed).keys()
    for line in LINES:
        listed.write_text(f"{right}{line}\n")
        said = run(DEPLOY / "uninstall.sh", "--root", installed, environment=deploy_environment, code=1)
        assert "nothing was removed" in said
    listed.write_text(right)
    for options in (("--prefix", "/"), ("--prefix", "/../etc"), ("--prefix", "/usr"), ("--root", ""), ("--bogus",)):
        run(DEPLOY / "uninstall.sh", "--root", installed, *options, environment=deploy_environment, code=1)
    assert tree(installed).keys() == before


def test_uninstall_keeps_models_and_purge_leaves_nothing(
    installed: Path, tmp_path: Path, deploy_environment: dict[str, str]
) -> None:
    root = tmp_path / "a copy"
    shutil.copytree(installed, root, symlinks=True)
    (root / "usr" / "local" / "bin" / "mine").write_text("of somebody else\n")
    said = run(root / "opt/llava-deploy/uninstall.sh", "--root", root, environment=deploy_environment)
    assert "tiny stays" in said
    left = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}
    model = "var/lib/llava-deploy/models/tiny/"
    assert {name for name in left if not name.startswith(model)} == {
        "etc/llava-deploy/tiny.env", "opt/llava-deploy/installed", "opt/llava-deploy/uninstall.sh", "usr/local/bin/mine"
    }  # fmt: skip
    assert f"{model}manifest.json" in left
    run(root / "opt/llava-deploy/uninstall.sh", "--root", root, "--purge", environment=deploy_environment)
    assert {name for name in tree(root) if not (root / name).is_dir()} == {"usr/local/bin/mine"}
    (root / "usr" / "local" / "bin" / "mine").unlink()
    for folder in sorted(root.rglob("*"), reverse=True):
        folder.rmdir()  # somebody else's file kept these
    run(DEPLOY / "uninstall.sh", "--root", root, environment=deploy_environment, code=1)
    run(DEPLOY / "uninstall.sh", "--root", installed, "--purge", environment=deploy_environment)
    assert [*installed.iterdir()] == []


REFUSED = [
    (("--prefix", "relative"), "want an absolute path"),
    (("--prefix", "/a/../b"), "want an absolute path"),
    (("--prefix", "/with space"), "want an absolute path"),
    (("--extras", "torch"), "want some of cpu"),
    (("--extras", "cpu,gpu,build"), "want cpu or gpu"),
    (("--name", "../x"), "the model's name"),
    (("--name", "-x"), "the model's name"),
    (("--archive", "/no/file"), "no such file"),
    (("--offline", "/no/folder"), "no such directory"),
    (("--python", "/bin/false"), "want Python 3.11 to 3.13"),
    (("--root", "/no/root"), "make it first"),
    (("--wheel", ""), "got an empty one"),
    (("--source", "/"), "want one of them"),
    (("--bogus",), "not known"),
    (("--prefix",), "want a value behind it"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: " ".join(value) if value[0] else None)
def test_what_cannot_be_is_refused_before_anything_is_done(
    options: tuple[str, ...], message: str, package: Path, tmp_path: Path, deploy_environment: dict[str, str]
) -> None:
    said = run(DEPLOY / "install.sh", "--root", tmp_path, "--wheel", package, "--python", sys.executable, *options,
               environment=deploy_environment, code=1)  # fmt: skip
    assert re.search(rf"^error: .*{re.escape(message)}", said, re.MULTILINE)
    assert [*tmp_path.iterdir()] == []


def test_a_prefix_of_somebody_else_is_left_alone(install: Callable[..., str], tmp_path: Path) -> None:
    theirs = tmp_path / "opt" / "llava-deploy" / "file"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    assert "something else is there, and stays" in install(tmp_path, code=1)
    assert tree(tmp_path).keys() == {"opt", "opt/llava-deploy", "opt/llava-deploy/file"}


def test_help(deploy_environment: dict[str, str]) -> None:
    for script in ("install.sh", "uninstall.sh"):
        text = (DEPLOY / script).read_text(encoding="utf-8")
        said = run(DEPLOY / script, "--help", environment=deploy_environment)
        options = re.findall(r"^  (--[a-z-]+)", said, re.MULTILINE)
        assert len(options) >= 5
        assert all(re.search(rf"^ .*[ |]{option}( \||\))", text, re.MULTILINE) for option in options)
        assert os.access(DEPLOY / script, os.X_OK)
