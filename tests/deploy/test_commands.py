"""What install.sh would run, as it says itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).resolve().parents[2] / "deploy" / "install.sh"


def dry_run(*options: object, environment: dict[str, str]) -> str:
    command = [str(part) for part in (INSTALL, "--dry-run", *options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout.replace("\\", "")


def test_root_never_reads_an_archive(
    package: Path, archive: Path, tmp_path: Path, deploy_environment: dict[str, str]
) -> None:
    """A dry run on this machine itself: below a root of its own, it is whoever calls."""
    sudo = tmp_path / "sudo"
    sudo.write_text("#!/bin/sh\nexit 1\n")
    sudo.chmod(0o755)
    environment = {**deploy_environment, "PATH": f"{tmp_path}:{deploy_environment['PATH']}"}
    options = ("--wheel", package, "--archive", archive, "--python", sys.executable, "--no-service")
    commands = re.findall(r"^  \$ (.*)", dry_run(*options, environment=environment), re.MULTILINE)
    steps = [line for line in commands if str(archive) in line or "selftest /" in line]
    assert [re.findall(r" -r |unpack|selftest", line)[-1] for line in steps] == [" -r ", "unpack", "selftest"]
    plain = r"(sudo )?setsid -w setpriv --reuid=nobody --regid=\w+ --clear-groups --no-new-privs env -i "
    assert all(re.match(plain, line) for line in steps)
    last = commands.index(steps[-1])
    assert re.search(r"chown nobody -- ", commands[commands.index(steps[0]) + 1])
    after = zip(commands[last + 1 :], ("chown root: -- ", "chown -hR root: -- ", "chmod -R go-w -- "), strict=False)
    assert all(wanted in line for line, wanted in after)


@pytest.mark.parametrize(
    ("extras", "drop_in", "wanted"),
    [
        ("cpu", None, "[cpu]"),
        ("cpu,rtx,build", "gpu", "[cpu,rtx,build]"),
        ("gpu,build", "gpu", "[gpu,build] onnxruntime-gpu[cuda,cudnn]"),
        ("jetson", "jetson", "[build] cuda-python>=12.6"),
    ],
)
def test_what_a_machine_gets(
    extras: str, drop_in: str | None, wanted: str, package: Path, tmp_path: Path, deploy_environment: dict[str, str]
) -> None:
    """As far as the commands go: no GPU beside a systemd, and no Jetson, was at hand."""
    python, root = tmp_path / "python", tmp_path / "root"
    root.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$3" = "import tensorrt" ] || exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    options = ("--root", root, "--wheel", package, "--python", python, "--extras", extras)
    said = dry_run(*options, environment=deploy_environment)
    assert ("--system-site-packages" in said) == (extras == "jetson")
    (installs,) = re.findall(r"-m pip install .*", said)
    assert re.sub(r"<1[.]2\d$", "", installs).endswith(f"{package.name}{wanted}")  # an older one for an older driver
    assert re.findall(r"@\.service\.d/(\w+)\.conf$", said, re.MULTILINE) == ([drop_in] if drop_in else [])


def test_for_onnx_runtime_on_a_gpu_the_engine_is_built_before_the_self_test(
    package: Path, archive: Path, tmp_path: Path, deploy_environment: dict[str, str]
) -> None:
    options = ("--root", tmp_path, "--wheel", package, "--archive", archive, "--python", sys.executable)
    said = dry_run(*options, "--extras", "gpu,build", environment=deploy_environment)
    steps = re.findall(r"^  \$ .* (unpack|build|selftest) /.*", said, re.MULTILINE)
    assert steps == ["unpack", "build", "selftest"]
    assert re.search(r"^  \$ .* build /\S+/model --backend onnxruntime-cuda$", said, re.MULTILINE)
    said = dry_run(*options, "--extras", "cpu,build", environment=deploy_environment)
    assert "onnxruntime-cuda" not in said


def test_a_command_of_somebody_else_stays(package: Path, tmp_path: Path, deploy_environment: dict[str, str]) -> None:
    command = tmp_path / "usr" / "local" / "bin" / "llava-deploy"
    options = ("--root", tmp_path, "--wheel", package, "--python", sys.executable, "--no-service")
    assert "usr/local/bin/llava-deploy" in dry_run(*options, environment=deploy_environment)
    command.parent.mkdir(parents=True)
    command.symlink_to("/somewhere/else")
    said = dry_run(*options, environment=deploy_environment)
    assert f"{command} is something else, and stays" in said
    assert not re.search(r"^  \$ .*usr/local", said, re.MULTILINE)
