"""Phases within phases as one part of a whole, and a build that is stopped from the thread that asked for it."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from llava_deploy.engines.tensorrt.progress import Phases, run_watched


def test_steps_of_an_inner_phase_are_parts_of_the_outer_ones_step() -> None:
    phases = Phases()
    phases.start("outer", None, 4)
    assert phases.now() == ("outer", 0.0)
    assert phases.complete("outer", 0)
    assert phases.now() == ("outer", 0.25)
    phases.start("inner", "outer", 2)
    phases.complete("inner", 0)
    assert phases.now() == ("inner", 0.375)
    phases.start("innermost", "inner", 5)
    phases.complete("innermost", 3)
    assert phases.now() == ("innermost", pytest.approx((1 + (1 + 4 / 5) / 2) / 4))
    phases.finish("innermost")
    phases.finish("inner")
    phases.complete("outer", 1)
    assert phases.now() == ("outer", 0.5)


def test_it_never_goes_back() -> None:
    phases = Phases()
    phases.start("first", None, 2)
    phases.complete("first", 1)
    assert phases.now()[1] == 1.0
    phases.finish("first")
    phases.start("second", None, 8)
    phases.complete("second", 0)
    assert phases.now() == ("second", 1.0)


def test_of_phases_side_by_side_the_furthest_counts() -> None:
    phases = Phases()
    phases.start("outer", None, 2)
    phases.start("left", "outer", 10)
    phases.start("right", "outer", 10)
    phases.complete("left", 4)
    phases.complete("right", 0)
    assert phases.now() == ("right", 0.25)


@pytest.mark.parametrize("name", ["unknown", "ended"])
def test_what_nobody_has_begun_is_passed_over(name: str) -> None:
    phases = Phases()
    phases.start("ended", "never begun", 0)
    phases.finish("ended")
    assert phases.complete(name, 3)
    phases.finish(name)
    assert phases.now() == ("", 0.0)


def steps(phases: Phases, ended: threading.Event, *, count: int = 1000) -> bool:
    """Work as TensorRT does it: step after step until it is told to stop."""
    phases.start("build", None, count)
    try:
        for step in range(count):
            time.sleep(0.005)
            if not phases.complete("build", step):
                return False
        return True
    finally:
        ended.set()


def test_it_is_told_in_the_thread_that_called() -> None:
    phases, ended, told = Phases(), threading.Event(), []
    done = run_watched(
        lambda: steps(phases, ended, count=60),
        phases,
        lambda phase, part: told.append((phase, part, threading.current_thread())),
    )
    assert done
    assert {thread for *_, thread in told} == {threading.main_thread()}
    parts = [part for _, part, _ in told]
    assert parts == sorted(set(parts))
    assert len(parts) >= 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_stops_the_work_and_is_raised_when_it_has_stopped(error: type[BaseException]) -> None:
    phases, ended = Phases(), threading.Event()

    def interrupt(phase: str, part: float) -> None:
        if part > 0.01:
            raise error

    began = time.perf_counter()
    with pytest.raises(error):
        run_watched(lambda: steps(phases, ended), phases, interrupt)
    assert ended.is_set()
    assert time.perf_counter() - began < 3


def test_a_second_interruption_does_not_leave_the_work_behind() -> None:
    phases, ended, cancelled = Phases(), threading.Event(), threading.Event()

    def work() -> None:
        while not phases.cancelled:
            time.sleep(0.001)
        cancelled.set()
        time.sleep(0.5)
        ended.set()

    def impatient() -> None:
        cancelled.wait()
        signal.raise_signal(signal.SIGINT)

    def interrupt(phase: str, part: float) -> None:
        raise KeyboardInterrupt

    again = threading.Thread(target=impatient)
    again.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_watched(work, phases, interrupt)
        assert ended.is_set()
    finally:
        again.join()


def test_an_error_of_the_work_is_raised() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_watched(fail, Phases(), lambda *_: None)


def test_it_looks_again_and_again_while_the_work_goes_on() -> None:
    seen = threading.Event()
    looks: list[int] = []

    def look() -> None:
        looks.append(threading.get_ident())
        if len(looks) == 3:
            seen.set()

    assert run_watched(lambda: seen.wait(30), Phases(), lambda *_: None, on_look=look)
    assert set(looks) == {threading.get_ident()}
