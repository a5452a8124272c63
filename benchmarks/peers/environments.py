"""The peers' virtual environments: one each, of pinned versions; their requirements exclude each other."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements")
# llama.cpp is compiled for the processor it will run on, as whoever cares for its speed would do.
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF", "FORCE_CMAKE": "1"}


def python_of(environments: Path, name: str) -> Path:
    """Its interpreter."""
    return environments / name / "bin" / "python"


def remove_broken_torchvision(python: Path) -> None:
    """Remove a torchvision that cannot be imported beside this torch, as one that was built for CUDA's cannot.

    transformers imports it where it is installed, and does without where it is not.
    """
    code = "import importlib.util as u; u.find_spec('torchvision') and __import__('torchvision')"
    if subprocess.run([str(python), "-c", code], check=False, capture_output=True).returncode:
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)


def make_environment(environments: Path, name: str) -> None:
    """Make the environment, unless it is there.

    Raises:
        CalledProcessError: pip failed; what it had installed is left to look at, and taken up again next time.
    """
    stamp = environments / name / "freeze.txt"
    if stamp.is_file():
        return
    print(f"environment {name}: installing, some minutes", flush=True)
    venv.create(environments / name, with_pip=True)
    pip = [str(python_of(environments, name)), "-m", "pip", "--disable-pip-version-check"]
    jobs = {"CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0)))}
    install = [*pip, "install", "--quiet", "-r", str(REQUIREMENTS / f"{name}.txt")]
    subprocess.run(install, check=True, stdout=sys.stderr, env={**os.environ, **BUILD, **jobs})
    remove_broken_torchvision(python_of(environments, name))
    frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    stamp.write_text(frozen, encoding="utf-8")
