"""What TensorRT says while it parses and builds, taken at its word.

It reports much that makes an engine compute something else as a warning, and goes on: an input that nothing reads, an
attribute that it has no use for, a tensor whose type it changed. Those are errors here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_deploy.engines.errors import BackendError

_LONGEST = 400  # characters of a message that go into one of ours

_LOSSES: Mapping[str, re.Pattern[str]] = {
    "an input is not used": re.compile(r"unused input|input .*\b(is|are) (unused|not used)|never used", re.IGNORECASE),
    "something is ignored": re.compile(r"\bignor(e|es|ed|ing)\b|has no effect|not be respected", re.IGNORECASE),
    "a value changes its type": re.compile(
        r"\bcast(ing|ed)? (down|to|.* to)\b|will cast|being converted|converting .*(back )?to|"
        r"performing operation in|insert(ing|ed)? .*cast|type mismatch",
        re.IGNORECASE,
    ),
    "a value changes": re.compile(r"\bclamp|out(side)? (of )?(the )?range|when converted", re.IGNORECASE),
    "a profile contradicts itself": re.compile(r"not self-consistent", re.IGNORECASE),
    "the numbers suffer": re.compile(r"(affect|reduce|loss of|degrade).*(accuracy|precision)", re.IGNORECASE),
}
_HARMLESS = (
    # TensorRT keeps the first logger of a process for all that is made in it.
    re.compile(r"logger passed into .* differs from"),
    # int64 inputs are in the contract, and bound as such.
    re.compile(r"Make sure input .* has Int64 binding"),
    # Between builder and driver, of no meaning to what is computed.
    re.compile(r"CUDA lazy loading|message truncated", re.IGNORECASE),
    # One way to compute a layer that does not fit the machine; it takes another.
    re.compile(r"(skipp|ignor)ing tactic", re.IGNORECASE),
)

_CLEANING_UP = re.compile(r"\[[^\]]*\] Error Code 1: Cuda Runtime \([^()]*\(cudaError (35|100):[^)]*\)\)")
"""Of a build that fails on a machine without a GPU: it cleans up what was never there."""


@dataclass
class Messages:
    """Of one build.

    Attributes:
        errors: in the order in which they came.
        losses: warnings that mean another result, each with what it means.
        warnings: the rest of them.
    """

    errors: list[str] = field(default_factory=list)
    losses: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def error(self, text: str) -> None:
        """Take up an error."""
        if line := one_line(text):
            self.errors.append(line)

    def warning(self, text: str) -> None:
        """Take up a warning, and see what it means."""
        text = one_line(text)
        if any(each.search(text) for each in _HARMLESS):
            return
        meaning = _loss(text)
        if meaning is None:
            if text not in self.warnings:
                self.warnings.append(text)
        else:
            self.losses.append((meaning, text))

    def require_no_loss(self, graph: Path) -> None:
        """Raise what a warning says, where one says that ``graph`` would not be computed as it is written.

        Raises:
            BackendError: the first of them.
        """
        for meaning, text in self.losses:
            raise BackendError(
                f"{graph.name}: TensorRT would compute something else than the graph says, {meaning}: {text}; "
                "report this, with the version of TensorRT"
            )

    def cause(self) -> str:
        """The first error as one line; those after it are its consequences."""
        return next(iter(self.errors), "it does not say why")


def make_logger(api: Any, messages: Messages) -> Any:
    """An ``ILogger`` that gives errors and warnings to ``messages``."""
    severity = api.ILogger.Severity

    class _Logger(api.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                messages.error(text)
            elif level == severity.WARNING:
                messages.warning(text)

    return _Logger()


def _loss(text: str) -> str | None:
    return next((meaning for meaning, pattern in _LOSSES.items() if pattern.search(text)), None)


def one_line(text: str) -> str:
    """A message of TensorRT's for one of ours: in one line, not too long, without what it says of a missing GPU."""
    line = _CLEANING_UP.sub("", " ".join(text.split())).strip()
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
