"""Work that is done ahead of its use: what is computed for the next weights while the last ones are written."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

WORKERS = 2
"""Threads; two round more than a disk takes, and each holds the weight that it is at."""

_T = TypeVar("_T")


def in_order(jobs: Iterator[Callable[[], _T]]) -> Iterator[_T]:
    """The results of jobs, in the order of the jobs, which some threads carry out ahead of whoever takes the results.

    At most ``WORKERS + 1`` results are there at once, beside the one that was taken. A job's error is raised in its
    turn; jobs behind it come to nothing.
    """
    torch = sys.modules.get("torch")  # jobs that need it come with it imported; an export of floats does without
    threads = 1 if torch is None else torch.get_num_threads()
    begun: deque[Future[_T]] = deque()
    try:
        with ThreadPoolExecutor(WORKERS, "export", _take_one_thread) as pool:
            try:
                for job in jobs:
                    begun.append(pool.submit(job))
                    if len(begun) > WORKERS:
                        yield begun.popleft().result()
                while begun:
                    yield begun.popleft().result()
            finally:
                for future in begun:
                    future.cancel()
    finally:
        if torch is not None:
            torch.set_num_threads(threads)  # what a worker sets is taken for every thread to come, too


def _take_one_thread() -> None:
    """A worker's own share of PyTorch: two workers with two threads each would wait for each other."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
