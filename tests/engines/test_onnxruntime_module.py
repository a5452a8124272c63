from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_deploy.engines.onnxruntime_module import NO_REPORTS

LOAD = "import sys; from llava_deploy.runtime import Llava; Llava.load(sys.argv[1], threads=1)"


def load(bundle: Path, home: Path, environment: dict[str, str]) -> set[str]:
    """Load a bundle in a process with a home of its own; the files that are there afterwards."""
    own = {name: value for name, value in environment.items() if name != NO_REPORTS and not name.startswith("XDG_")}
    run = [sys.executable, "-c", LOAD, str(bundle)]
    subprocess.run(run, check=True, timeout=120, env={**own, "HOME": str(home)})
    return {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}


def test_nothing_is_reported(demo_bundle: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    assert load(demo_bundle, tmp_path, child_environment) == set()


def test_who_wants_reports_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_deploy.engines.onnxruntime_module import import_onnxruntime

    monkeypatch.setenv(NO_REPORTS, "0")
    import_onnxruntime()
    assert os.environ[NO_REPORTS] == "0"
    monkeypatch.delenv(NO_REPORTS)
    import_onnxruntime()
    assert os.environ[NO_REPORTS] == "1"
    monkeypatch.undo()
