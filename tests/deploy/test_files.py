"""Shell, units and the container file, as far as that goes without a system to run them on."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_deploy.cli import main

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "llava-deploy@.service"
DROP_INS = (DEPLOY / "gpu.conf", DEPLOY / "jetson.conf")
ANALYZE = shutil.which("systemd-analyze")
KNOWN_SINCE_254 = ("RestartSteps", "RestartMaxDelaySec")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed: nothing else reads units")


def shell_files() -> list[Path]:
    """All of the repository: by their names, and CI's, which has none of these."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\0")
    names = {*found, ".ci/run", *(str(path.relative_to(ROOT)) for path in DEPLOY.glob("*.sh"))}
    return [ROOT / name for name in sorted(names) if name.endswith(".sh") or name == ".ci/run"]


def settings(path: Path) -> dict[str, list[str]]:
    """Each key of a unit to its values, all sections together."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("path", shell_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(path: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([shellcheck, "-x", path], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text or text.startswith("# shellcheck shell=bash")
    assert len(text.splitlines()) < 300


def test_shellcheck_sees_something(tmp_path: Path) -> None:
    script = tmp_path / "wrong.sh"
    script.write_text("#!/bin/bash\nrm -rf $1/*\n")
    shellcheck = Path(sys.executable).parent / "shellcheck"
    assert subprocess.run([shellcheck, script], capture_output=True, check=False).returncode == 1


def verify(unit: Path) -> list[str]:
    """What systemd says against a unit, but for keys that this one is too old to know."""
    assert ANALYZE is not None
    checked = subprocess.run([ANALYZE, "verify", unit], capture_output=True, text=True, check=False)
    old = re.compile(rf"Unknown key (name )?'({'|'.join(KNOWN_SINCE_254)})'")
    return [line for line in checked.stderr.splitlines() if not old.search(line)]


def rendered(folder: Path, *drop_ins: Path) -> Path:
    """The unit as an instance, with a program that is there: systemd looks for it."""
    program = folder / "llava-deploy"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = folder / "llava-deploy@tiny.service"
    unit.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/llava-deploy/bin/llava-deploy", str(program)))
    for drop_in in drop_ins:
        place = folder / f"{unit.name}.d"
        place.mkdir(exist_ok=True)
        shutil.copy(drop_in, place)
    return unit


@needs_systemd
@pytest.mark.parametrize("drop_ins", [(), *((path,) for path in DROP_INS)], ids=["alone", "gpu", "jetson"])
def test_systemd_takes_the_unit(drop_ins: tuple[Path, ...], tmp_path: Path) -> None:
    assert verify(rendered(tmp_path, *drop_ins)) == []


@needs_systemd
def test_systemd_sees_what_is_wrong(tmp_path: Path) -> None:
    drop_in = tmp_path / "wrong.conf"
    drop_in.write_text("[Service]\nMemoryMax=a lot\nNoSuchKey=1\n")
    said = "\n".join(verify(rendered(tmp_path, drop_in)))
    assert "wrong.conf:2: Invalid memory limit" in said
    assert "wrong.conf:3: Unknown key" in said


@needs_systemd
def test_little_is_exposed(tmp_path: Path) -> None:
    """0.3 of 10 with systemd 252; the limit is in tenths. A line that is dropped by mistake costs more than is left."""
    assert ANALYZE is not None
    run = [ANALYZE, "security", "--offline=true", "--threshold=5", rendered(tmp_path)]
    checked = subprocess.run(run, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_what_the_unit_promises() -> None:
    unit = settings(UNIT)
    wanted = {
        "Type": "notify", "User": "llava-deploy", "Restart": "on-failure", "NoNewPrivileges": "yes",
        "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes", "PrivateDevices": "yes",
        "PrivateNetwork": "yes", "IPAddressDeny": "any", "RestrictAddressFamilies": "AF_UNIX",
        "CapabilityBoundingSet": "", "RuntimeDirectory": "llava-deploy/%i", "RuntimeDirectoryMode": "0750",
        "MemoryDenyWriteExecute": "yes", "WantedBy": "multi-user.target",
    }  # fmt: skip
    assert {key: unit[key] for key in wanted} == {key: [value] for key, value in wanted.items()}
    assert {"MemoryHigh", "MemoryMax", "WatchdogSec", "TimeoutStartSec", "RestartSec", *KNOWN_SINCE_254} <= unit.keys()
    (start,) = unit["ExecStart"]
    words = start.split()
    options = {option for parameter in main.commands["serve"].params for option in parameter.opts}
    assert words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= options
    for path in DROP_INS:
        assert settings(path)["PrivateDevices"] == ["no"]
        assert not settings(path).keys() & {"NoNewPrivileges", "ProtectSystem", "PrivateNetwork", "User"}


def test_the_container_is_made_of_what_is_here() -> None:
    """No container was ever built of it: structure is all that is known."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if line[:1] != "#")).splitlines()
    steps = [line.partition(" ")[::2] for line in lines if line]
    assert {word for word, _ in steps} <= {
        "ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "STOPSIGNAL", "ENTRYPOINT", "CMD"
    }  # fmt: skip
    copied = [rest.split() for word, rest in steps if word == "COPY"]
    assert copied
    for *sources, _ in copied:
        assert all((ROOT / source).exists() for source in sources if sources[0] != "--from=build")
    images = [rest for word, rest in steps if word == "FROM"]
    assert all(re.match(r"docker\.io/library/python:\$\{PYTHON\}-slim-\w+", image) for image in images)
    words = [word for word, _ in steps]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word == "RUN")
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["llava-deploy", "serve"]
    options = {option for parameter in main.commands["serve"].params for option in parameter.opts}
    assert {word for word in json.loads(dict(steps)["CMD"]) if word.startswith("--")} <= options


def test_the_container_installs_as_the_installer_does() -> None:
    container = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    installer = (DEPLOY / "install.sh").read_text(encoding="utf-8")
    (flags,) = re.findall(r"^flags=\((.*)\)$", installer, re.MULTILINE)
    assert f"-m pip install {flags} -c constraints.txt" in container
    (imports,) = re.findall(r"-c '(import [^']*)'", installer)[-1:]
    assert f"-c '{imports}'" in container


def test_trim_is_for_any_python() -> None:
    tree = ast.parse((DEPLOY / "trim.py").read_text(encoding="utf-8"), feature_version=(3, 10))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_trim_refuses_the_systems_python() -> None:
    base = Path(sys.base_prefix) / "bin" / "python3"
    done = subprocess.run([base, "-I", DEPLOY / "trim.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "want a virtual environment" in done.stderr
