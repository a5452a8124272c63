"""Memory that is read by threads."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llava_deploy.runtime.bench import bandwidth
from llava_deploy.runtime.bench.bandwidth import host_meter, read_bandwidth
from llava_deploy.runtime.bench.report import Report


@pytest.mark.parametrize("threads", [1, 3])
def test_all_threads_bytes_over_the_time_of_the_slowest(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Slow:
        @staticmethod
        def reduce(part: np.ndarray) -> int:
            read.append(part.nbytes)
            time.sleep(0.05)
            return int(part[0])

    monkeypatch.setattr(np, "add", Slow)
    found = read_bandwidth(threads, 3 << 20, 2)
    assert read == [(3 << 20) // threads] * (3 * threads)  # a round warms up
    assert len(found) == 2
    assert all((3 << 20) / 1.0 < rate <= (3 << 20) / 0.05 for rate in found)


def test_the_buffer_is_larger_than_the_caches_and_no_more_than_a_part_of_the_memory(report: Report) -> None:
    def bytes_of(**changes: Any) -> int:
        return host_meter(2, replace(report.machine, **changes)).nbytes

    assert bytes_of(last_level_cache=32 << 20, memory=1 << 40) == bandwidth._HOST_BUFFER
    assert bytes_of(last_level_cache=1 << 30, memory=1 << 40) == 8 << 30
    assert bytes_of(last_level_cache=None, memory=None) == bandwidth._HOST_BUFFER
    assert bytes_of(last_level_cache=32 << 20, memory=1 << 30) == 1 << 27
