"""A machine to be described, and what the doctor says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_machine import FakeMachine

from llava_deploy.engines.names import Backend
from llava_deploy.engines.planner.fits import fits_here
from llava_deploy.runtime.doctor.diagnosis import Diagnosis, examine
from llava_deploy.runtime.doctor.findings import Finding
from llava_deploy.runtime.doctor.verdicts import BackendVerdict


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """A laptop without a GPU."""
    root = tmp_path / "root"
    root.mkdir()
    return FakeMachine(root)


@pytest.fixture
def diagnose(machine: FakeMachine) -> Callable[..., Diagnosis]:
    """Examine the machine, and bundles on it, as the command does."""
    return lambda *bundles: examine(machine.system(), bundles, fits_here)


@pytest.fixture
def verdict(diagnose: Callable[..., Diagnosis]) -> Callable[[Backend], BackendVerdict]:
    """What this machine could do with a backend."""
    return lambda backend: next(each for each in diagnose().backends if each.backend == backend)


@pytest.fixture
def finding(diagnose: Callable[..., Diagnosis]) -> Callable[[str], Finding]:
    """The only finding on this machine that holds a text."""

    def only(text: str) -> Finding:
        found = [each for each in diagnose().findings if text in each.found]
        assert len(found) == 1, [each.found for each in diagnose().findings]
        return found[0]

    return only
