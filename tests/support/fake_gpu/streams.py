"""Streams that run their work late: when somebody waits. Events, captures and graphs with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

Work: TypeAlias = "Callable[[], None]"


@dataclass(eq=False)
class Capture:
    """Work that is recorded in place of being queued."""

    work: list[Work] = field(default_factory=list)
    valid: bool = True


@dataclass(eq=False)
class Graph:
    """A captured piece of work."""

    work: list[Work]


@dataclass(eq=False)
class Stream:
    """A queue; ``done`` counts what was run of it."""

    queue: deque[Work] = field(default_factory=deque)
    queued: int = 0
    done: int = 0
    capture: Capture | None = None

    def add(self, work: Work) -> None:
        """Queue work, or record it."""
        if self.capture is not None:
            self.capture.work.append(work)
            return
        self.queue.append(work)
        self.queued += 1

    def run(self, until: int | None = None) -> None:
        """Run what is queued, up to the work of that number."""
        while self.queue and (until is None or self.done < until):
            work = self.queue.popleft()
            self.done += 1
            work()


@dataclass(eq=False)
class Event:
    """A place in a stream."""

    stream: Stream | None = None
    at: int = 0

    def wait(self) -> None:
        """Run its stream up to it."""
        if self.stream is not None:
            self.stream.run(self.at)
