"""Work ahead of its use: in order, no more of it than said, and errors in their turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from llava_deploy.exporter.ahead import WORKERS, in_order


def test_results_come_in_the_order_of_the_jobs() -> None:
    def job(number: int) -> int:
        time.sleep(0.02 if number % 2 == 0 else 0)
        return number

    assert list(in_order(partial(job, number) for number in range(20))) == list(range(20))


def test_no_more_than_a_few_results_are_there() -> None:
    begun: list[int] = []

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(20):
            begun.append(number)
            yield partial(int, number)

    for taken in in_order(jobs()):
        assert len(begun) <= taken + 1 + WORKERS


def test_the_first_error_in_order_is_raised_and_what_is_behind_it_is_not_begun() -> None:
    done: list[int] = []

    def job(number: int) -> int:
        if number in (3, 4):
            time.sleep(0.05 if number == 3 else 0)  # the second one is there first
            raise ValueError(str(number))
        done.append(number)
        return number

    with pytest.raises(ValueError, match="3"):
        list(in_order(partial(job, number) for number in range(50)))
    assert max(done) <= 3 + WORKERS + 1
    assert not any(thread.name.startswith("export") for thread in threading.enumerate())


def test_jobs_have_one_thread_of_pytorch_each_and_others_keep_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(in_order(iter([torch.get_num_threads] * 4))) == [1] * 4
        found: list[int] = []
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert [torch.get_num_threads(), *found] == [2, 2]
    finally:
        torch.set_num_threads(before)
