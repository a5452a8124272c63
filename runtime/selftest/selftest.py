"""The whole self-test of one bundle: what is installed here against what PyTorch gave where the goldens were made."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava_deploy.engines.engine_manifest import source_digest
from llava_deploy.engines.errors import BackendError, BundleError, OptionError
from llava_deploy.engines.goldens import Goldens
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.manifest import MANIFEST_NAME, Manifest, read_manifest
from llava_deploy.runtime.backend import DecoderSession
from llava_deploy.runtime.backend_choice import OnnxRuntimeChoice, Wanted
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.encoding import PromptEncoder
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.loading import Sessions, open_sessions
from llava_deploy.runtime.selftest.exact import exact_stages, rounds_features, rounds_logits
from llava_deploy.runtime.selftest.files import Checked, check_bundle, engine_of, require_goldens, unreadable
from llava_deploy.runtime.selftest.limits import Arithmetic, Rounding, failed
from llava_deploy.runtime.selftest.replay import (
    Recorded,
    features_stage,
    guarded,
    logits_stage,
    replay_pixels,
    replay_prompt,
    replay_splice,
    replay_tokens,
    replay_twice,
)
from llava_deploy.runtime.selftest.report import (
    SCHEMA_VERSION,
    GoldenStage,
    NotRun,
    SelftestReport,
    TestedBackend,
    TestedBundle,
    in_order,
)
from llava_deploy.runtime.selftest.surroundings import machine_of, versions_of
from llava_deploy.runtime.stages import StageResult


def selftest(directory: Path, wanted: Wanted) -> SelftestReport:
    """Replay a bundle's goldens through what is installed here.

    Args:
        directory: of the bundle.
        wanted: backend, slots of the cache (by default what the goldens need), threads.

    Raises:
        BundleError: no bundle, or one without goldens; a damaged one is a result.
        BackendError: the backend cannot be had, or cannot load the graphs.
        OptionError: an option that cannot be had.
    """
    began = time.perf_counter()
    test = _Selftest(directory, wanted)
    test.run()
    return test.report(time.perf_counter() - began)


class _Selftest:
    """What is known so far."""

    def __init__(self, directory: Path, wanted: Wanted) -> None:
        self._directory = directory
        self._wanted = wanted
        self._stages: list[GoldenStage] = []
        self._not_run: list[NotRun] = []
        self._goldens = 0
        self._manifest: Manifest | None = None
        self._checked: Checked | None = None
        self._sessions: Sessions | None = None

    def run(self) -> None:
        """All stages; the files alone where they are not what was made."""
        try:
            manifest = read_manifest(self._directory)
        except BundleError as error:
            if not (self._directory / MANIFEST_NAME).is_file():
                raise  # no bundle: there is nothing to test
            self._take([GoldenStage(None, unreadable(error))])
            return
        self._manifest = manifest
        require_goldens(self._directory, manifest)
        self._take(self._tested(Bundle(self._directory, manifest), self._wanted))

    def report(self, seconds: float) -> SelftestReport:
        """The result."""
        goldens = None if self._checked is None else self._checked.goldens
        sessions = self._sessions
        backend = None
        if sessions is not None:
            backend = TestedBackend(sessions.backend, sessions.reason, self._wanted.threads, sessions.decoder.max_len)
        return SelftestReport(
            schema=SCHEMA_VERSION,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            bundle=None if self._manifest is None else _card(self._directory, self._manifest, goldens),
            backend=backend,
            versions=versions_of(sessions),
            machine=machine_of(sessions),
            stages=in_order(self._stages),
            goldens=self._goldens,
            not_run=tuple(self._not_run),
            seconds=seconds,
        )

    def _take(self, results: Iterable[GoldenStage | NotRun]) -> None:
        for result in results:
            if isinstance(result, NotRun):
                self._not_run.append(result)
            else:
                self._stages.append(result)

    def _tested(self, bundle: Bundle, wanted: Wanted) -> Iterator[GoldenStage | NotRun]:
        checked = check_bundle(bundle, wanted)
        if not isinstance(checked, Checked):
            yield GoldenStage(None, checked)
            return
        self._checked = checked
        choice = checked.choice
        if not isinstance(choice, OnnxRuntimeChoice):
            self._sessions = open_sessions(bundle, wanted, Integrity.QUICK)
            if isinstance(self._sessions.choice, OnnxRuntimeChoice):
                # Whose files, and whose limits, are others.
                engine = engine_of(bundle, choice)
                yield NotRun(f"engine {engine.name if engine else choice.backend}", self._sessions.reason)
                self._sessions = None
                yield from self._tested(bundle, replace(wanted, backend="onnxruntime"))
                return
        yield GoldenStage(None, checked.result)
        yield from self._replay(bundle, checked, wanted)

    def _replay(self, bundle: Bundle, checked: Checked, wanted: Wanted) -> Iterator[GoldenStage | NotRun]:
        recorded = [Recorded(bundle, golden) for golden in checked.goldens.goldens]
        choice, sessions = checked.choice, self._sessions
        if isinstance(choice, OnnxRuntimeChoice):
            slots = max(one.slots for one in recorded) if wanted.max_len is None else wanted.max_len
            wanted = replace(wanted, max_len=slots)
            fitting = [one for one in recorded if one.slots <= slots]
            if fitting:
                yield from exact_stages(bundle, choice, fitting, wanted.threads, slots)
        if sessions is None:
            self._sessions = sessions = open_sessions(bundle, wanted, Integrity.QUICK)
        room = sessions.decoder.max_len
        fitting = [one for one in recorded if one.slots <= room]
        for one in recorded:
            if one.slots > room:
                reason = f"it takes {one.slots} tokens of context, and the cache has {room}"
                yield NotRun(f"golden {one.golden.name}", reason)
        self._goldens = len(fitting)
        if fitting:
            yield from _Replay(bundle, sessions).stages(fitting)


class _Replay:
    """All goldens, a stage at a time, through sessions that are open."""

    def __init__(self, bundle: Bundle, sessions: Sessions) -> None:
        self._bundle = bundle
        self._sessions = sessions
        self._encoder = PromptEncoder(bundle, sessions.vision)
        self._features, self._logits = _roundings(bundle, sessions)

    def stages(self, many: list[Recorded]) -> Iterator[GoldenStage | NotRun]:
        """Their results, in the order in which data passes the stages."""
        encoder, sessions = self._encoder, self._sessions
        seeing = [one for one in many if one.golden.pictures]
        for one in seeing:
            yield _named(one, guarded("pixels", "pixels", partial(replay_pixels, one, encoder)))
        yield from replay_twice(features_stage("image features", sessions.vision, self._features), seeing)
        for one in many:
            yield _named(one, guarded("prompt", "prompt", partial(replay_prompt, one, encoder)))
        for one in many:
            yield _named(one, guarded("splice", "splice", partial(replay_splice, one, encoder)))
        noise: dict[str, float] = {}
        for stage in replay_twice(logits_stage("logits", encoder, sessions.decoder, self._logits), many):
            if stage.golden is not None:
                noise[stage.golden] = stage.result.max_abs_error
            yield stage
        yield from self._answers(many, noise)

    def _answers(self, many: list[Recorded], noise: dict[str, float]) -> Iterator[GoldenStage | NotRun]:
        for one in many:
            yield from self._asked("tokens", [one], noise, self._llava())
        again = next((one for one in many if one.golden.pictures), many[0])
        llava = self._llava()
        for _ in self._asked("tokens", [again], noise, llava):
            continue  # which fills the cache
        yield from self._asked("tokens, asked again", [again], noise, llava)
        rows = _rows(self._sessions.decoder, len(many))
        if rows < 2:
            reason = "there is one golden alone" if len(many) == 1 else "the engine or the memory has room for one row"
            yield NotRun("tokens, in a batch", reason)
            return
        for at in range(0, len(many), rows):
            part = many[at : at + rows]
            if len(part) < 2:  # the last one by itself is the first stage once more
                part = many[-2:]
            yield from self._asked(f"tokens, in a batch of {len(part)}", part, noise, self._llava())

    def _asked(self, name: str, many: list[Recorded], noise: dict[str, float], llava: Llava) -> Iterator[GoldenStage]:
        try:
            results = replay_tokens(many, [noise[one.golden.name] for one in many], llava, name)
        except (BackendError, BundleError, ValueError) as error:
            results = [failed(name, "tokens", str(error)) for _ in many]
        for one, result in zip(many, results, strict=True):
            yield _named(one, result)

    def _llava(self) -> Llava:
        """The model with nothing in its cache."""
        self._sessions.decoder.clear()
        return Llava(self._bundle, self._encoder, self._sessions.decoder, self._sessions.reason)


def _roundings(bundle: Bundle, sessions: Sessions) -> tuple[Rounding, Rounding]:
    """Of image features, and of logits."""
    precision, choice = bundle.manifest.model.precision, sessions.choice
    if not isinstance(choice, OnnxRuntimeChoice):
        on_gpu = Rounding(precision, Arithmetic.GPU)
        return on_gpu, on_gpu
    features, logits = (
        Rounding(precision, Arithmetic.INTEGERS if rounds else Arithmetic.FLOATS)
        for rounds in (rounds_features(choice), rounds_logits(choice))
    )
    return features, logits


def _rows(decoder: DecoderSession, most: int) -> int:
    """So many rows at once as there is room for."""
    for rows in range(most, 1, -1):
        try:
            decoder.begin(rows)
        except (OptionError, BackendError):
            continue
        return rows
    return 1


def _named(one: Recorded, result: StageResult) -> GoldenStage:
    return GoldenStage(one.golden.name, result)


def _card(directory: Path, manifest: Manifest, goldens: Goldens | None) -> TestedBundle:
    model = manifest.model
    return TestedBundle(
        directory=str(directory),
        name=model.name,
        precision=model.precision,
        parameters=model.parameters,
        vision=model.vision,
        decoder=model.decoder,
        digest=source_digest(manifest),
        tools=manifest.tools,
        recorded_with={} if goldens is None else goldens.tools,
    )
