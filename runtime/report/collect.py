"""Bundles measured one after the other, by the code of ``selftest``, ``bench`` and ``eval``, into a record."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from llava_deploy.engines.engine_manifest import built_engines, source_digest, weights_size
from llava_deploy.engines.errors import BackendError, InputError
from llava_deploy.engines.manifest import Manifest
from llava_deploy.runtime.backend_choice import BackendName, Wanted
from llava_deploy.runtime.bench.bench import BoundOf, run_benchmark
from llava_deploy.runtime.bench.device import open_device
from llava_deploy.runtime.bench.options import QUICK, STANDARD
from llava_deploy.runtime.bench.report import Report as Speed
from llava_deploy.runtime.bundle import open_bundle
from llava_deploy.runtime.comparison import BundleReport, Comparison, require_same_tokens
from llava_deploy.runtime.evaluation import EvalOptions, Question
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.report.power_files import PowerFiles
from llava_deploy.runtime.report.record import (
    SCHEMA_VERSION,
    Accuracy,
    Asked,
    BuiltEngine,
    BundleRecord,
    Card,
    Record,
    Tested,
)
from llava_deploy.runtime.report.tested import run_selftest
from llava_deploy.runtime.report.verdict import (
    ACCURACY_LOSS,
    check_accuracy,
    check_memory,
    check_run,
    check_tested,
    decide,
)
from llava_deploy.runtime.report.walk import Way
from llava_deploy.runtime.report.walking import Journey, Measuring, take_walk

Stage: TypeAlias = Callable[[str], "AbstractContextManager[Callable[[int, int], None]]"]
"""A progress bar for something: gets how much of it is done, and of how much."""

_ANSWER = 32
"""Tokens of an answer to a question, at most."""


@dataclass(frozen=True)
class ReportOptions:
    """What to measure.

    Attributes:
        title: of the report; ``None``: the first bundle's name.
        backend: what runs the bundles; also ``threads``.
        quick: less of everything.
    """

    title: str | None
    backend: BackendName
    threads: int | None
    quick: bool

    @property
    def wanted(self) -> Wanted:
        """What is asked of the backend."""
        return Wanted(self.backend, None, self.threads)

    def way(self, directory: Path) -> Way:
        """What to do while the memory is looked at."""
        return Way(str(directory), self.backend, self.threads, 32 if self.quick else 256, 0.0, 0.0)

    def measuring(self) -> Measuring:
        """How long to measure power."""
        return Measuring(0.5, 1.0) if self.quick else Measuring(3.0, 10.0)


@dataclass(frozen=True)
class Exam:
    """What bundles are asked, what guessing gets right of each kind where that is known, and the questions' source."""

    questions: Sequence[Question]
    chance: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class _Found:
    card: Card
    tested: Tested
    journey: Journey
    speed: Speed | None


def collect(
    bundles: Sequence[Path], exam: Exam, options: ReportOptions, bound_of: Callable[[Path], BoundOf], stage: Stage
) -> Record:
    """Measure bundles of one model; what takes little time and shows most comes first.

    Args:
        bundles: directories; the first is what the others are held against.
        exam: what they are asked.
        options: what to measure.
        bound_of: a bundle's directory to what a bandwidth allows of decoding it: the planner's.
        stage: shows how far it is.

    Raises:
        InputError: the bundles are not of one model, or one stands twice.
        BundleError: one is none, or damaged.
        BackendError: the first bundle does not run here; of another one that is said in the record.
    """
    began = time.perf_counter()
    if len({bundle.resolve() for bundle in bundles}) != len(bundles):
        raise InputError(f"want different bundles, got {', '.join(map(str, bundles))}; name each once")
    require_same_tokens(bundles)
    manifests = [open_bundle(bundle).manifest for bundle in bundles]
    found = [
        _look_at(bundle, manifest, label, options, stage)
        for bundle, manifest, label in zip(bundles, manifests, labels(bundles, manifests), strict=True)
    ]
    _require_first(found[0])  # before the minutes that the others take
    found = [
        one if one.journey.failure is not None else _timed(one, bundle, options, bound_of, stage)
        for one, bundle in zip(found, bundles, strict=True)
    ]
    _require_first(found[0])
    running = [bundle for one, bundle in zip(found, bundles, strict=True) if one.journey.failure is None]
    accuracies = _accuracies(running, exam, options, stage)
    first = found[0].card.label
    return Record(
        schema=SCHEMA_VERSION,
        title=manifests[0].model.name if options.title is None else options.title,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        quick=options.quick,
        accuracy_loss=ACCURACY_LOSS,
        asked=Asked(exam.source, len(exam.questions), dict(exam.chance)),
        seconds=time.perf_counter() - began,
        bundles=tuple(
            _record(one, accuracies.get(bundle), None if one is found[0] else first)
            for one, bundle in zip(found, bundles, strict=True)
        ),
    )


def labels(bundles: Sequence[Path], manifests: Sequence[Manifest]) -> list[str]:
    """Short names, all different: precisions, or else directories' names, or else their paths."""
    precisions: list[str] = [manifest.model.precision for manifest in manifests]
    for names in (precisions, [bundle.resolve().name for bundle in bundles]):
        if len({*names}) == len(names):
            return names
    return [str(bundle.resolve()) for bundle in bundles]


def _require_first(found: _Found) -> None:
    if found.journey.failure is not None:
        raise BackendError(f"{found.card.directory}: {found.journey.failure}")


def _look_at(bundle: Path, manifest: Manifest, label: str, options: ReportOptions, stage: Stage) -> _Found:
    card = Card(
        label=label,
        directory=str(bundle),
        model=manifest.model,
        quantization=manifest.quantization,
        vision=manifest.vision,
        decoder=manifest.decoder,
        digest=source_digest(manifest),
        weight_bytes=weights_size(manifest),
        tools=manifest.tools,
        files=manifest.files,
        engines=_engines(bundle),
    )
    with stage(f"looking at {label}"):
        tested = run_selftest(bundle, manifest, options.wanted)
        on_gpu = open_device(bundle, options.backend) is not None
        journey = take_walk(options.way(bundle), options.measuring(), PowerFiles(), on_gpu=on_gpu)
    return _Found(card, tested, journey, None)


def _engines(bundle: Path) -> tuple[BuiltEngine, ...]:
    return tuple(
        BuiltEngine(place.name, sum(path.stat().st_size for path in place.rglob("*") if path.is_file()))
        for place in built_engines(bundle)
    )


def _timed(
    found: _Found, bundle: Path, options: ReportOptions, bound_of: Callable[[Path], BoundOf], stage: Stage
) -> _Found:
    with stage(f"timing {found.card.label}") as step:
        try:
            speed = run_benchmark(bundle, options.wanted, QUICK if options.quick else STANDARD, bound_of(bundle), step)
        except BackendError as error:
            return replace(found, journey=replace(found.journey, failure=str(error)))
    return replace(found, speed=speed)


def _accuracies(bundles: Sequence[Path], exam: Exam, options: ReportOptions, stage: Stage) -> dict[Path, Accuracy]:
    def ask(bundle: Path) -> BundleReport:  # when it returns, nothing holds the model any more
        llava = Llava.load(bundle, backend=options.backend, threads=options.threads)
        with stage(f"asking {bundle}") as step:
            return comparison.ask(llava, lambda outcome: step(outcome.number, len(exam.questions)))

    asked = EvalOptions(max_new_tokens=_ANSWER)
    with contextlib.closing(Comparison(bundles, exam.questions, asked)) as comparison:
        reports = [ask(bundle) for bundle in bundles]
    return {bundle: accuracy_of(report, reports[0]) for bundle, report in zip(bundles, reports, strict=True)}


def accuracy_of(one: BundleReport, first: BundleReport) -> Accuracy:
    """What a bundle answered, beside what the first did; both were asked the same."""
    right = [(before.right, now.right) for before, now in zip(first.report.outcomes, one.report.outcomes, strict=True)]
    return Accuracy(
        total=one.report.total,
        kinds=one.report.kinds,
        lost=right.count((True, False)),
        gained=right.count((False, True)),
        agreement=one.against_first,
    )


def _record(found: _Found, accuracy: Accuracy | None, first: str | None) -> BundleRecord:
    journey = found.journey
    checks = (
        check_run(journey.failure),
        check_tested(found.tested),
        check_accuracy(found.card, accuracy, first, ACCURACY_LOSS),
        check_memory(journey.walk),
    )
    return BundleRecord(
        card=found.card,
        verdict=decide(checks),
        failure=journey.failure,
        tested=found.tested,
        walk=journey.walk,
        energy=journey.energy,
        energy_refusals=journey.energy_refusals,
        speed=found.speed,
        accuracy=accuracy,
    )
