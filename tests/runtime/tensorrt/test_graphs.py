"""Buckets of visible slots, and how many steps are kept."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_deploy.runtime.tensorrt.cuda import DeviceMemoryError
from llava_deploy.runtime.tensorrt.graphs import STEPS_KEPT, Steps, bucket


@given(st.integers(1, 40_000).flatmap(lambda most: st.tuples(st.just(most), st.integers(1, most))))
def test_a_bucket_holds_its_total_and_little_more(case: tuple[int, int]) -> None:
    most, total = case
    found = bucket(total, most)
    assert total <= found <= most
    assert found < max(total + 64, total * 1.25)
    assert bucket(found, most) == found


def test_buckets_are_few() -> None:
    assert [bucket(total, 4096) for total in (1, 64, 65, 640, 1024, 1025, 4096)] == [64, 64, 128, 640, 1024, 1280, 4096]
    assert len({bucket(total, 4096) for total in range(1, 4097)}) == 20
    assert bucket(250, 251) == 251


def test_the_step_used_longest_ago_goes() -> None:
    made: list[tuple[int, int]] = []

    def make(batch: int, total: int) -> Any:
        made.append((batch, total))
        return object()

    steps = Steps(make)
    first = steps.get(1, 0)
    for total in range(1, STEPS_KEPT):
        steps.get(1, total)
    assert steps.get(1, 0) is first
    steps.get(2, 0)
    assert steps.get(1, 0) is first
    steps.get(1, 1)
    assert made[STEPS_KEPT:] == [(2, 0), (1, 1)]


def test_others_go_where_there_is_no_room_for_another() -> None:
    room = {"left": 2}

    def make(batch: int, total: int) -> Any:
        if room["left"] < total:
            raise DeviceMemoryError("full")
        room["left"] -= total
        return _Held(room, total)

    steps = Steps(make)
    steps.get(1, 1)
    steps.get(2, 1)
    assert steps.get(1, 2).size == 2
    with pytest.raises(DeviceMemoryError):
        steps.get(1, 3)
    assert steps.get(1, 2).size == 2


class _Held:
    """Gives its room back when it goes."""

    def __init__(self, room: dict[str, int], size: int) -> None:
        self.room, self.size = room, size

    def __del__(self) -> None:
        self.room["left"] += self.size
