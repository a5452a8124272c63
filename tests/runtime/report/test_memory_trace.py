"""Memory over time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_deploy.runtime.report import memory_trace as module
from llava_deploy.runtime.report.memory_trace import memory_trace, thinned
from llava_deploy.runtime.report.record import MemorySample


def test_memory_that_is_taken_is_seen() -> None:
    with memory_trace(None) as samples:
        time.sleep(0.03)
        taken = np.ones(64 << 20, np.uint8)
        time.sleep(0.03)
        before, after = samples[0], samples[-1]
        del taken
    assert after.anonymous - before.anonymous > 60 << 20
    assert len(samples) >= 6
    times = [sample.at for sample in samples]
    assert times == sorted(times)
    assert {sample.device for sample in samples} == {None}


def test_a_gpu_counts_over_what_was_in_use_before() -> None:
    used = iter(range(1000, 10_000, 10))
    with memory_trace(lambda: next(used)) as samples:
        time.sleep(0.02)
    found = [sample.device for sample in samples]
    assert found[:2] == [10, 20]


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_STATUS", tmp_path / "status")
    with memory_trace(None) as samples:
        time.sleep(0.01)
    assert samples == []


def test_thinned_traces_keep_their_ends_and_peaks() -> None:
    flat = [MemorySample(float(at), 100, 10, 0, None) for at in range(1000)]
    peaks = {123: 900, 124: 901, 777: 500}
    samples = [replace(one, anonymous=peaks.get(at, 100)) for at, one in enumerate(flat)]
    kept = thinned(samples, 50)
    assert len(kept) == 50
    assert (kept[0], kept[-1]) == (samples[0], samples[-1])
    assert {901, 500} <= {sample.anonymous for sample in kept}
    assert [sample.at for sample in kept] == sorted(sample.at for sample in kept)
    assert thinned(samples[:50], 50) == samples[:50]
