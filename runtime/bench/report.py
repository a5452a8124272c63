"""The result of a benchmark: what is written as JSON, and read again to be compared with.

Seconds, bytes and tokens throughout. A change of these classes' fields is a change of :data:`SCHEMA_VERSION`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_deploy.engines.manifest import QuantizationRecipe
from llava_deploy.engines.names import Backend, Precision
from llava_deploy.runtime.bench.options import BenchOptions
from llava_deploy.runtime.result_file import ResultForm

SCHEMA_VERSION = 1
BandwidthKind = Literal["host read", "device copy"]
_AGAIN = "make another with: llava-deploy bench BUNDLE --json FILE"


@dataclass(frozen=True)
class Samples:
    """One quantity, measured once a round or more often.

    Attributes:
        each: in the order in which they were taken.
    """

    median: float
    least: float
    most: float
    each: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Samples:
        """Those of some values, one at least."""
        return cls(statistics.median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True)
class Machine:
    """Where it was measured; ``None`` is what the system does not say.

    Attributes:
        system: kernel and architecture.
        cpu: the processor's name.
        logical_cpus: that this process may use.
        physical_cores: of the machine.
        memory: bytes of it.
        last_level_cache: bytes that one core can reach.
        gpu: its name, where that ran it.
    """

    system: str
    cpu: str
    logical_cpus: int
    physical_cores: int
    memory: int | None
    last_level_cache: int | None
    gpu: str | None


@dataclass(frozen=True)
class BundleCard:
    """What was measured.

    Attributes:
        directory: as it was named.
        digest: of its graphs and embeddings: see :func:`~llava_deploy.engines.engine_manifest.source_digest`.
        weight_bytes: of graphs and embeddings on the disk.
    """

    directory: str
    name: str
    precision: Precision
    parameters: int
    vision: str
    decoder: str
    quantization: QuantizationRecipe | None
    digest: str
    weight_bytes: int


@dataclass(frozen=True)
class BackendCard:
    """What ran it.

    Attributes:
        reason: which engine, and why no better backend.
        threads: that were asked for; ``None``: as many as the backend takes.
        max_len: slots of the KV cache.
        load_seconds: from the bundle's path to a model that can be asked.
    """

    name: Backend
    reason: str
    threads: int | None
    max_len: int
    load_seconds: float


@dataclass(frozen=True)
class Bandwidth:
    """Of the memory that the weights are in.

    Attributes:
        kind: the host's memory, read; or the device's, copied: read and written.
        threads: that read.
        buffer_bytes: that were read or copied at a time.
        bytes_per_second: one for each time.
    """

    kind: BandwidthKind
    threads: int
    buffer_bytes: int
    bytes_per_second: Samples


@dataclass(frozen=True)
class FirstToken:
    """From the call to the first token, in parts that sum up to ``total``, seconds.

    Attributes:
        prompt_tokens: a picture's included.
        pictures: one, or none; each time another.
        preprocess: picture to pixels.
        vision: tower and projector.
        splice: prompt tokenised, embeddings looked up, features put between them.
        prefill: the decoder's backend over the prompt.
        rest: everything else, Python's: inputs of the decoder, choosing the token.
        total: time to first token.
    """

    prompt_tokens: int
    pictures: int
    preprocess: Samples
    vision: Samples
    splice: Samples
    prefill: Samples
    rest: Samples
    total: Samples


@dataclass(frozen=True)
class Decode:
    """Tokens after the first.

    Attributes:
        batch: rows at once.
        context: tokens of each row's prompt.
        new_tokens: of each row's answer.
        tokens_per_second: of all rows together.
        python_seconds: of a step, everything but the backend's run.
        step_bytes: that the memory has to give for a step, at the middle of the answer: weights and cache.
        limit: tokens a second, of all rows, that the measured bandwidth allows.
        share: of the limit that was reached.
    """

    batch: int
    context: int
    new_tokens: int
    tokens_per_second: Samples
    python_seconds: Samples
    step_bytes: int
    limit: float
    share: float


@dataclass(frozen=True)
class Memory:
    """Peak while something was done, in bytes.

    Attributes:
        phase: what was done.
        anonymous: memory that no file stands behind.
        mapped: pages of files.
        device: memory of the GPU in use by all, over what was in use before loading; ``None`` where there is none.
    """

    phase: str
    anonymous: int
    mapped: int
    device: int | None


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    Attributes:
        schema: :data:`SCHEMA_VERSION`.
        date: UTC, in ISO 8601.
        remarks: what was left out, and what has to be known beside the numbers.
    """

    schema: int
    date: str
    machine: Machine
    versions: dict[str, str]
    bundle: BundleCard
    backend: BackendCard
    options: BenchOptions
    bandwidth: Bandwidth
    first_token: FirstToken
    decode: tuple[Decode, ...]
    batches: tuple[Decode, ...]
    memory: tuple[Memory, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> str:
        """Text of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """Read what ``--json`` wrote.

    Raises:
        InputError: no file, not JSON, or of another schema.
    """
    return ResultForm(Report, SCHEMA_VERSION, "llava-deploy bench", "result", _AGAIN).read(path)
