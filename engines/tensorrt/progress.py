"""How far a build has come, and how it is stopped.

TensorRT builds for minutes in one call, and reports phases within phases from threads of its own. The call runs in a
thread here, so that the caller's thread stays its own: progress is told there, and Ctrl-C arrives there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")
_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class BuildProgress:
    """Of a build.

    Attributes:
        what: the engine at work, ``vision`` or ``decoder``.
        phase: what is being done, in TensorRT's words.
        done: of the whole build, of ``total``; never less than before.
        total: the whole.
    """

    what: str
    phase: str
    done: int
    total: int


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The phases that TensorRT is in; told by its threads, read by the caller's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Phase] = {}
        self._furthest = 0.0
        self._cancelled = threading.Event()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside another or by itself."""
        with self._lock:
            self._open[name] = _Phase(parent if parent in self._open else None, max(1, steps))

    def complete(self, name: str, step: int) -> bool:
        """A step of a phase is done, counted from 0; whether to go on."""
        with self._lock:
            if name in self._open:
                self._open[name].done = step + 1
                self._furthest = max(self._furthest, min(1.0, self._fraction()))
        return not self._cancelled.is_set()

    def finish(self, name: str) -> None:
        """A phase ends, whole or not."""
        with self._lock:
            self._open.pop(name, None)

    def cancel(self) -> None:
        """Have TensorRT stop at its next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was told to stop."""
        return self._cancelled.is_set()

    def now(self) -> tuple[str, float]:
        """The innermost phase that began last, and which part of all is done."""
        with self._lock:
            return next(reversed(self._open), ""), self._furthest

    def _fraction(self) -> float:
        """Of the outermost phase; a phase inside another is a part of the step that the other is at."""
        inside: dict[str | None, float] = {}
        for name, phase in reversed(self._open.items()):  # the inner ones came later
            share = min(1.0, (phase.done + inside.get(name, 0.0)) / phase.steps)
            inside[phase.parent] = max(share, inside.get(phase.parent, 0.0))
        return inside.get(None, 0.0)


def make_monitor(api: Any, phases: Phases) -> Any:
    """An ``IProgressMonitor`` that tells ``phases``."""

    class _Monitor(api.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return _Monitor()


def run_watched(
    work: Callable[[], _T],
    phases: Phases,
    on_change: Callable[[str, float], None],
    on_look: Callable[[], None] = lambda: None,
) -> _T:
    """Run ``work`` in a thread and give its result; tell ``on_change``, here, of phases and parts done.

    Ten times a second, before it looks for news, it calls ``on_look``. An error of these two and Ctrl-C stop TensorRT
    at its next step, and are raised when it has stopped; Ctrl-C a second time does not hurry it.
    """
    told: tuple[str, float] | None = None
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            while wait([future], timeout=_EVERY).not_done:
                on_look()
                if (now := phases.now()) != told:
                    told = now
                    on_change(*now)
            return future.result()
        except BaseException:
            phases.cancel()
            while not future.done():  # a process that ends with TensorRT at work in it is aborted
                with contextlib.suppress(KeyboardInterrupt):
                    wait([future])
            raise
