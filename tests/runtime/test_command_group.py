"""Signals that end a command, as its process sees them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import signal, sys, time
from pathlib import Path
import click
from llava_deploy.engines.staging import staged_directory
from llava_deploy.runtime.command_group import CommandLine

@click.group("program", CommandLine)
def main():
    pass

@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("seconds", type=float)
def write(output, seconds):
    with staged_directory(output, replace=False) as staging:
        (staging / "half").write_text("half")
        print("begun", flush=True)
        time.sleep(seconds)

for number in map(int, sys.argv[3:]):
    signal.signal(number, signal.SIG_IGN)
main(["write", *sys.argv[1:3]])
"""


def ended_by(number: signal.Signals, place: Path, seconds: float, *ignored: signal.Signals) -> tuple[int, list[str]]:
    """Exit code of a command that gets a signal while it writes, and the names that are left."""
    run = [sys.executable, "-c", COMMAND, str(place / "output"), str(seconds), *(str(int(one)) for one in ignored)]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        code = process.wait(timeout=60)
    return code, sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_was_begun_is_removed(number: signal.Signals, tmp_path: Path) -> None:
    assert ended_by(number, tmp_path, 60) == (128 + number, [])


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    assert ended_by(signal.SIGHUP, tmp_path, 0.5, signal.SIGHUP) == (0, ["output"])
