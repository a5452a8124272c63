"""What became of a part of the check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "not run"]


class NotRunError(Exception):
    """The part cannot be run on this machine; the message says why."""


class CheckFailedError(Exception):
    """The part ran, and what it found is wrong.

    Attributes:
        result: what it found.
    """

    def __init__(self, reason: str, result: dict[str, Any]) -> None:
        super().__init__(reason)
        self.result = result


@dataclass(frozen=True)
class Outcome:
    """Of one part.

    Attributes:
        reason: why it failed or was not run; empty where it passed.
        seconds: that it took, its process's start included.
        result: what it found or measured.
    """

    name: str
    status: Status
    reason: str
    seconds: float
    result: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def not_run(name: str, reason: str) -> Outcome:
    return Outcome(name, "not run", reason, 0.0, {})
