"""Programs with a time limit, probes in processes of their own, and this very machine."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_deploy.engines.onnxruntime_module import NO_REPORTS
from llava_deploy.runtime.doctor import system as module
from llava_deploy.runtime.doctor.system import Ran, free_bytes, installed_version, run_program, this_system


def test_a_programs_text_and_status() -> None:
    assert run_program(("sh", "-c", "echo out; echo err >&2; exit 3"), 10) == Ran(3, "out\nerr\n")
    assert run_program(("no-such-program-here",), 10) == Ran.not_installed("no-such-program-here")
    refused = run_program((str(Path(__file__)),), 10)
    assert ("cannot be run" in refused.trouble, refused.outcome) == (True, "cannot be run")
    assert run_program(("sh", "-c", "kill -SEGV $$"), 10).code == -11


def test_what_is_probed_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NO_REPORTS, raising=False)
    assert run_program(("sh", "-c", f"echo ${NO_REPORTS}"), 10).text == "1\n"
    monkeypatch.setenv(NO_REPORTS, "0")
    assert run_program(("sh", "-c", f"echo ${NO_REPORTS}"), 10).text == "0\n"


@pytest.mark.parametrize("script", ["sleep 60", "trap '' TERM INT; sleep 60 & sleep 60", "exec >&-; sleep 60", "yes"])
def test_one_that_hangs_or_has_no_end_is_stopped(script: str) -> None:
    began = time.monotonic()
    ran = run_program(("sh", "-c", script), 0.4)
    assert time.monotonic() - began < 5
    assert (ran.code, ran.trouble, ran.outcome) == (None, "sh gave no answer within 0 s", "no answer")
    assert len(ran.text) <= 2 << 20


def test_files_are_read_below_the_root(tmp_path: Path) -> None:
    system = dataclasses.replace(this_system(), root=tmp_path)
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys" / "value").write_bytes(b" 42\0\n")
    (tmp_path / "sys" / "text").write_bytes(b"\xff")
    assert (system.read("/sys/value"), system.number("/sys/value")) == ("42", 42)
    assert (system.number("/sys/text"), system.read("/none"), system.read("/sys")) == (None, None, None)
    assert system.find("/sys/*") == ["/sys/text", "/sys/value"]
    assert (system.exists("/sys/value"), system.exists("/proc/cpuinfo")) == (True, False)


def test_probes_of_what_is_installed_here() -> None:
    system = this_system()
    said = system.probe("module", "onnxruntime")
    assert said["version"] == system.version("onnxruntime")
    assert "CPUExecutionProvider" in said["providers"]
    assert system.probe("provider", "CPUExecutionProvider") == {"loaded": True}
    assert system.probe("module", "no_such_module")["error"].startswith("ModuleNotFoundError")
    assert {"loaded"} <= system.probe("cuda").keys()
    assert "error" in system.probe("no such probe")
    assert installed_version("no-such-package") is None


def test_a_probe_that_crashes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text("import os; print('hello'); os.abort()", encoding="utf-8")
    (tmp_path / "hanging.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert this_system().probe("module", "crashing") == {"error": "killed by SIGABRT while it was loaded"}
    monkeypatch.setattr(module, "PROBE_PATIENCE", 1.0)
    assert "no answer within 1 s" in this_system().probe("module", "hanging")["error"]


def test_the_disks_room_is_known_where_nothing_is_yet(tmp_path: Path) -> None:
    room = free_bytes(tmp_path / "not" / "there")
    assert room is not None
    assert room > 0


BARE = """
import importlib.abc, importlib.metadata, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "onnx_ir", "torch"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
real = importlib.metadata.version

def version(name):
    if name.startswith(("onnx", "tensorrt", "cuda", "torch")):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

importlib.metadata.version = version
"""
RUN = "import sys; from llava_deploy.cli import main; sys.argv[0] = 'llava-deploy'; main()"


def test_the_bare_base_install_is_told_what_it_needs(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """Every process of it, probes too, finds nothing but the base install."""
    (tmp_path / "sitecustomize.py").write_text(BARE, encoding="utf-8")
    environment = {**child_environment, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-c", RUN, "doctor", "--json"]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120, env=environment)
    said = json.loads(done.stdout)
    assert {
        "level": "fault",
        "found": "ONNX Runtime is not installed",
        "advice": "pip install 'llava-deploy[cpu]'",
    } in (said["findings"])
    assert [backend["runs"] for backend in said["backends"]] == [False] * 4
    assert done.returncode == 1
    assert done.stderr.startswith("error: no backend here can run a bundle")


def test_nothing_that_may_crash_is_imported_here(demo_bundle: Path, child_environment: dict[str, str]) -> None:
    script = f"""
import sys
from pathlib import Path
from llava_deploy.runtime.doctor.diagnosis import examine
from llava_deploy.runtime.doctor.system import this_system
before = sorted(Path({str(demo_bundle)!r}).rglob("*"))
diagnosis = examine(this_system(), [Path({str(demo_bundle)!r})], lambda bundle, room: {{}})
assert diagnosis.bundles[0].runs, diagnosis.bundles
assert sorted(Path({str(demo_bundle)!r}).rglob("*")) == before
print(sorted({{*sys.modules}} & {{"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.bindings.runtime", "onnx_ir"}}))
"""
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120, env=child_environment)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_no_rights_of_root_are_needed() -> None:
    system = this_system()
    assert system.may_use(Path(os.devnull))
    assert not system.may_use(Path("/none"))
