"""What an installation is made of: the package as a wheel, the packages that it takes, a model in an archive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def deploy_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A new HOME, one thread, and nothing of this Python's environment."""
    passed = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**passed, "HOME": str(tmp_path_factory.mktemp("a home")), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, made from a copy: a build leaves folders behind."""
    place = tmp_path_factory.mktemp("the wheel")
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "local", "demo-output")
    source = shutil.copytree(ROOT, place / "source", ignore=ignore)
    run = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", place]
    subprocess.run([*run, source], check=True, timeout=300, cwd=place)
    (path,) = place.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def wheels(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the package takes on a CPU, from the index that this machine has."""
    place = tmp_path_factory.mktemp("all wheels")
    run = [sys.executable, "-m", "pip", "download", "-q", "--progress-bar", "off", "-d", place]
    run += ["-c", ROOT / "constraints.txt", f"{package}[cpu]"]
    subprocess.run([str(part) for part in run], check=True, timeout=600, capture_output=True)
    return place


@pytest.fixture(scope="session")
def archive(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint in fp16, with goldens, packed."""
    from click.testing import CliRunner

    from llava_deploy.cli import main

    place = tmp_path_factory.mktemp("a model")
    bundle, packed = str(place / "bundle"), str(place / "tiny.lvd")
    for command in (
        ["export", str(demo_checkpoint), "-o", bundle, "--precision", "fp16", "--goldens"],
        ["pack", bundle, "-o", packed],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    return Path(packed)
