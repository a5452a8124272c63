"""When a bundle is shipped."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest

from llava_deploy.runtime.evaluation import Score
from llava_deploy.runtime.report.record import Accuracy, Check, MemorySample, Record, State, Walk
from llava_deploy.runtime.report.verdict import (
    ACCURACY_LOSS,
    check_accuracy,
    check_memory,
    check_run,
    decide,
    loss_bounds,
)


@pytest.mark.parametrize(
    ("states", "decision"),
    [
        (("passed", "passed"), "ship"),
        (("passed", "not shown"), "not shown"),
        (("failed", "not shown"), "do not ship"),
        (("passed", "failed"), "do not ship"),
    ],
)
def test_one_failure_is_enough_and_so_is_one_thing_not_shown(states: tuple[State, ...], decision: str) -> None:
    assert decide([Check("one", state, "") for state in states]).decision == decision


def answered(asked: int, lost: int, gained: int) -> Accuracy:
    return Accuracy(Score(asked, asked - lost), {}, lost, gained, None)


def test_bounds_of_the_loss() -> None:
    """Agresti and Min: half an answer more in each of the four cells."""
    loss, least, most = loss_bounds(answered(500, 5, 2))
    assert loss == pytest.approx(3 / 500)
    spread = 1.645 * sqrt(5.5 + 2.5 - 9 / 502) / 502
    assert (least, most) == (pytest.approx(3 / 502 - spread), pytest.approx(3 / 502 + spread))
    assert loss_bounds(answered(0, 0, 0)) == (0.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("asked", "lost", "gained", "state", "said"),
    [
        (1000, 0, 0, "passed", "0.0 points against fp32; it loses no more than 0.2 points (95 % sure)"),
        (1000, 2, 5, "passed", "+0.3 points against fp32"),
        (25, 0, 0, "not shown", "25 questions do not show that it loses no more than 1.0 points"),
        (500, 4, 0, "not shown", "−0.8 points against fp32, but 500 questions do not show"),
        (25, 1, 0, "not shown", "−4.0 points against fp32, but 25 questions do not show"),
        (500, 40, 32, "not shown", "−1.6 points against fp32, but 500 questions do not show"),
        (500, 6, 0, "failed", "−1.2 points against fp32: more than the 1.0 points that it may lose"),
    ],
)
def test_accuracy_against_the_first(asked: int, lost: int, gained: int, state: str, said: str, record: Record) -> None:
    found = check_accuracy(record.bundles[2].card, answered(asked, lost, gained), "fp32", ACCURACY_LOSS)
    assert found.state == state
    assert said in found.sentence


def test_the_first_has_nothing_to_lose_unless_it_is_quantised(record: Record) -> None:
    whole, _, quantised = (one.card for one in record.bundles)
    assert check_accuracy(whole, answered(10, 1, 0), None, ACCURACY_LOSS).state == "passed"
    found = check_accuracy(quantised, answered(1000, 1, 0), None, ACCURACY_LOSS)
    assert found.state == "not shown"
    assert "name the unquantised bundle first" in found.sentence
    assert check_accuracy(whole, None, None, ACCURACY_LOSS).state == "not shown"


def walked(record: Record) -> Walk:
    walk = record.bundles[0].walk
    assert walk is not None
    return walk


def test_memory_that_was_there_and_that_was_not(record: Record) -> None:
    walk = walked(record)
    took = walk.samples[-1].anonymous - walk.samples[0].anonymous
    assert check_memory(replace(walk, available=took)).state == "passed"
    short = check_memory(replace(walk, available=took - 1))
    assert short.state == "failed"
    assert "at the peak" in short.sentence
    assert check_memory(replace(walk, available=None)).state == "not shown"
    assert check_memory(replace(walk, samples=())).state == "not shown"
    assert check_memory(None).state == "not shown"


def test_memory_on_the_disk_and_on_the_gpu(record: Record) -> None:
    walk = walked(record)
    last = walk.samples[-1]
    swapping = (*walk.samples[:-1], replace(last, swapped=5_000_000))
    found = check_memory(replace(walk, samples=swapping))
    assert found.state == "failed"
    assert "5.0 MB of it went to the disk (swap)" in found.sentence
    on_gpu = replace(walk, samples=(*walk.samples, MemorySample(1.0, 1, 1, 0, 3 << 30)))
    assert (
        "3.2 GB of 4.3 GB that were free on the GPU" in check_memory(replace(on_gpu, device_available=4 << 30)).sentence
    )
    assert check_memory(replace(on_gpu, device_available=2 << 30)).state == "failed"


def test_what_does_not_run_is_not_shipped() -> None:
    assert check_run("no room").state == "failed"
    assert check_run(None).state == "passed"
