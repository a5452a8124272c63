"""What a report holds, as JSON keeps it; the page is made of this and of nothing else.

Seconds, bytes, watts, joules and tokens throughout. A change of these classes' fields is a change of
:data:`SCHEMA_VERSION`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.errors import InputError
from llava_deploy.engines.manifest import FileEntry, ModelCard, QuantizationRecipe
from llava_deploy.runtime.agreement import Agreement
from llava_deploy.runtime.bench.report import Report as Speed
from llava_deploy.runtime.evaluation import Score
from llava_deploy.runtime.result_file import ResultForm

SCHEMA_VERSION = 1
State = Literal["passed", "failed", "not shown"]
"""Of one check; ``not shown``: it was not made, or too little was measured to say."""

Decision = Literal["ship", "do not ship", "not shown"]
"""Of a bundle: ``ship`` where every check passed, ``do not ship`` where one failed."""

_AGAIN = "make another with: llava-deploy report BUNDLE -o report.html --json FILE"


@dataclass(frozen=True)
class Check:
    """One thing that has to be so before a bundle is shipped, and a sentence on what was found."""

    name: str
    state: State
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """What the checks come to."""

    decision: Decision
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in a bundle: its directory's name, and the bytes of its files."""

    name: str
    size: int


@dataclass(frozen=True)
class Card:
    """What a bundle is.

    Attributes:
        label: what it is called in the report, no other has that name: its precision where that does.
        directory: as it was named.
        model: its manifest's, also ``quantization``, ``vision``, ``decoder``, ``tools`` and ``files``.
        digest: of its graphs and embeddings: see :func:`~llava_deploy.engines.engine_manifest.source_digest`.
        weight_bytes: of graphs and embeddings on the disk.
    """

    label: str
    directory: str
    model: ModelCard
    quantization: QuantizationRecipe | None
    vision: VisionShape
    decoder: DecoderShape
    digest: str
    weight_bytes: int
    tools: dict[str, str]
    files: tuple[FileEntry, ...]
    engines: tuple[BuiltEngine, ...]


@dataclass(frozen=True)
class TestedStage:
    """A stage of the self-test: its name, how it went, and the greatest difference or what else there is to say."""

    name: str
    state: State
    detail: str


@dataclass(frozen=True)
class Tested:
    """What the self-test found; without stages it was not made, and the sentence says why."""

    state: State
    sentence: str
    stages: tuple[TestedStage, ...]


@dataclass(frozen=True)
class Phase:
    """What was done from when to when, in seconds since loading began."""

    name: str
    began: float
    ended: float


@dataclass(frozen=True)
class MemorySample:
    """Memory of the process at a time; see :class:`~llava_deploy.runtime.bench.report.Memory`.

    Attributes:
        at: seconds since loading began.
        swapped: bytes that were put on the disk for want of memory.
        device: of the GPU, in use by all, over what was in use before; ``None`` where there is none.
    """

    at: float
    anonymous: int
    mapped: int
    swapped: int
    device: int | None


@dataclass(frozen=True)
class Walk:
    """A process of its own that loads a bundle, sees a picture, reads a prompt and answers.

    Attributes:
        prompt_tokens: the picture's included.
        new_tokens: of all answers to it, of which there may be several.
        decode_tokens: of them those that were made in the phase ``decode``.
        available: bytes of the host that a process could have when it started; ``None`` where nothing says.
        device_available: likewise of the GPU.
        phases: in their order, without gaps.
        samples: thinned, peaks kept; none where the system does not tell.
    """

    prompt_tokens: int
    pictures: int
    new_tokens: int
    decode_tokens: int
    available: int | None
    device_available: int | None
    phases: tuple[Phase, ...]
    samples: tuple[MemorySample, ...]


@dataclass(frozen=True)
class Energy:
    """What an answer's tokens took, by the board's own meter.

    Attributes:
        source: which meter, and what it counts.
        idle_watts: mean before anything was loaded.
        decode_watts: mean while tokens were made.
        readings: taken meanwhile.
        joules_per_token: of all that the meter counts.
        joules_per_token_over_idle: less what the machine takes when it does nothing; never below 0.
    """

    source: str
    idle_watts: float
    decode_watts: float
    readings: int
    joules_per_token: float
    joules_per_token_over_idle: float


@dataclass(frozen=True)
class Accuracy:
    """Questions answered right.

    Attributes:
        lost: that the first bundle answered right and this one wrong.
        gained: the other way round.
        agreement: how near it stays to the first, token by token; ``None`` for the first itself.
    """

    total: Score
    kinds: dict[str, Score]
    lost: int
    gained: int
    agreement: Agreement | None


@dataclass(frozen=True)
class BundleRecord:
    """All of one bundle; ``None`` is what could not be measured.

    Attributes:
        failure: why it does not run here; then it was neither timed nor asked.
        energy_refusals: why there is no energy, or a better meter was not taken, a sentence each.
    """

    card: Card
    verdict: Verdict
    failure: str | None
    tested: Tested
    walk: Walk | None
    energy: Energy | None
    energy_refusals: tuple[str, ...]
    speed: Speed | None
    accuracy: Accuracy | None


@dataclass(frozen=True)
class Asked:
    """Where the questions are from, how many there were, and what guessing gets right of the kinds where known."""

    source: str
    count: int
    chance: dict[str, float]


@dataclass(frozen=True)
class Record:
    """The whole of a report.

    Attributes:
        date: UTC, in ISO 8601.
        quick: it was a look, with less of everything.
        accuracy_loss: share of the answers that a bundle may lose against the first and be shipped.
        seconds: that everything took.
        bundles: one at least; the first is what the others are held against.
    """

    schema: int
    title: str
    date: str
    quick: bool
    accuracy_loss: float
    asked: Asked
    seconds: float
    bundles: tuple[BundleRecord, ...]

    def to_json(self) -> str:
        """Text of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def read_record(path: Path) -> Record:
    """Read what ``--json`` wrote.

    Raises:
        InputError: no file, not JSON, of another schema, or without a bundle.
    """
    record = ResultForm(Record, SCHEMA_VERSION, "llava-deploy report", "report", _AGAIN).read(path)
    labels = [one.card.label for one in record.bundles]
    if not labels or len({*labels}) != len(labels):
        raise InputError(f"{path}: want bundles of different labels, found {labels}; {_AGAIN}")
    return record
