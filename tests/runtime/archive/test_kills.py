from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import killed_archives
import pytest


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_killed_at_random_moments(what: str, tmp_path: Path, child_environment: dict[str, str]) -> None:
    """Nothing, the old one or the new one is there, whole; the next call succeeds and leaves nothing behind."""
    run = [sys.executable, killed_archives.__file__, str(tmp_path), what, "7"]
    result = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120, env=child_environment)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["half"], found["left"]) == (0, 0)
    assert found["nothing"] + found["old"] + found["new"] == killed_archives.MOMENTS
    # Otherwise the moments were none: the first ones come before anything is written, the last after everything is.
    assert found["killed"] >= 8
    assert found["debris"] >= 4
