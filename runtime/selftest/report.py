"""The result of a self-test: what was compared, what was not and why, and the versions of everything that matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from llava_deploy.engines.names import Backend, Precision
from llava_deploy.runtime.bench.report import Machine
from llava_deploy.runtime.stages import StageKind, StageResult

SCHEMA_VERSION = 1
ORDER: tuple[StageKind, ...] = ("files", "pixels", "image features", "prompt", "splice", "logits", "tokens")
"""In which data passes the stages."""

Verdict: TypeAlias = Literal["pass", "fail"]


@dataclass(frozen=True)
class GoldenStage:
    """One stage of one golden; ``golden`` is ``None`` for what is of the whole bundle."""

    golden: str | None
    result: StageResult

    def __str__(self) -> str:
        """For people: ``logits of one-picture``."""
        return self.result.name if self.golden is None else f"{self.result.name} of {self.golden}"


@dataclass(frozen=True)
class NotRun:
    """A golden, or a stage, that was not compared, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class TestedBundle:
    """What was tested.

    Attributes:
        directory: as it was named.
        digest: of its graphs and embeddings: see :func:`~llava_deploy.engines.engine_manifest.source_digest`.
        tools: versions that exported it.
        recorded_with: versions that recorded its goldens.
    """

    directory: str
    name: str
    precision: Precision
    parameters: int
    vision: str
    decoder: str
    digest: str
    tools: dict[str, str]
    recorded_with: dict[str, str]


@dataclass(frozen=True)
class TestedBackend:
    """What ran it: ``reason`` says which engine, and why no better backend; ``max_len`` are slots of the KV cache."""

    name: Backend
    reason: str
    threads: int | None
    max_len: int


@dataclass(frozen=True)
class SelftestReport:
    """The whole self-test.

    Attributes:
        bundle: ``None`` where its files are damaged.
        backend: ``None`` where nothing was loaded.
        versions: of Python, of what runs the model, and of what is around it; of the driver, where a GPU does.
        stages: in the order in which data passes them, of each those of all goldens.
        goldens: how many were replayed.
        not_run: what was not compared.
    """

    schema: int
    date: str
    bundle: TestedBundle | None
    backend: TestedBackend | None
    versions: dict[str, str]
    machine: Machine
    stages: tuple[GoldenStage, ...]
    goldens: int
    not_run: tuple[NotRun, ...]
    seconds: float

    @property
    def first_failure(self) -> GoldenStage | None:
        """The earliest stage that left its tolerance, of the first golden that it left it for."""
        return next((stage for stage in self.stages if not stage.result.ok), None)

    @property
    def ok(self) -> bool:
        """Whether a golden was replayed, and every stage is within its tolerance."""
        return self.goldens > 0 and self.first_failure is None

    @property
    def verdict(self) -> Verdict:
        """In a word."""
        return "pass" if self.ok else "fail"

    @property
    def sentence(self) -> str:
        """The verdict for people, in one line."""
        first = self.first_failure
        if first is not None:
            return f"{first} is the first stage out of tolerance: {first.result.detail}"
        if not self.ok:
            reasons = "; ".join(f"{each.what}: {each.reason}" for each in self.not_run)
            return f"no golden could be replayed, so nothing is known ({reasons})"
        left = f"; {_count(len(self.not_run), 'thing')} not run" if self.not_run else ""
        return f"{_count(self.goldens, 'golden')} replayed, every stage within its tolerance{left}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; a number that is none or endless is ``None``."""
        first = self.first_failure
        stages = [{"golden": stage.golden, **stage.result.to_dict()} for stage in self.stages]
        return {
            "schema": self.schema,
            "ok": self.ok,
            "first_failure": None if first is None else first.result.kind,
            "sentence": self.sentence,
            **{name: value for name, value in dataclasses.asdict(self).items() if name not in ("schema", "stages")},
            "stages": stages,
        }


def in_order(stages: Iterable[GoldenStage]) -> tuple[GoldenStage, ...]:
    """As data passes them, whatever the order in which they were run; what is of one kind stays in its order."""
    return tuple(sorted(stages, key=lambda stage: ORDER.index(stage.result.kind)))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
