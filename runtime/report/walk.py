"""A bundle from its path to its last token, in a process of its own, with a watch on what it takes.

Run by :mod:`llava_deploy.runtime.report.walking`. A line of JSON goes to standard output as each phase begins, so that
it is known how far the process came, and one with all that was seen at the end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llava_deploy.engines.errors import LlavaDeployError, OptionError
from llava_deploy.engines.host_memory import host_memory
from llava_deploy.engines.names import Backend
from llava_deploy.engines.plain import from_plain
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.bench.device import open_device, used_bytes
from llava_deploy.runtime.bench.options import BenchOptions, fitting
from llava_deploy.runtime.bench.prompts import Prompts
from llava_deploy.runtime.bench.sessions import Loaded, load
from llava_deploy.runtime.report.memory_trace import memory_trace, thinned
from llava_deploy.runtime.report.record import MemorySample

SAMPLES = 240
"""Kept of a trace, at most."""

_FEWEST = 2
"""Tokens of an answer: the one that the prompt ends with, and one that is decoded."""


@dataclass(frozen=True)
class Way:
    """What to do.

    Attributes:
        directory: of the bundle.
        backend: what runs it; also ``threads``.
        new_tokens: of an answer, where that fits.
        idle: seconds to do nothing before, with nothing loaded.
        least: seconds that tokens are made for, one answer after the other; one answer at least.
    """

    directory: str
    backend: Backend | Literal["auto"]
    threads: int | None
    new_tokens: int
    idle: float
    least: float


@dataclass(frozen=True)
class Walked:
    """What was seen, as :class:`~llava_deploy.runtime.report.record.Walk` has it; times are of :func:`time.monotonic`.

    Attributes:
        backend: what ran it.
        began: of each phase, by its name, and of the ``end``.
    """

    backend: str
    prompt_tokens: int
    pictures: int
    new_tokens: int
    decode_tokens: int
    available: int | None
    device_available: int | None
    began: dict[str, float]
    samples: tuple[MemorySample, ...]


def walk(way: Way) -> Walked:
    """Go the whole way.

    Raises:
        BundleError: no bundle, or a damaged one.
        BackendError: the backend cannot be had, or fails.
    """
    began: dict[str, float] = {}

    def phase(name: str) -> None:
        began[name] = time.monotonic()
        _say({"phase": name})

    directory, available = Path(way.directory), host_memory().available
    device = open_device(directory, way.backend)
    free = None if device is None else device.memory()[0]
    phase("idle")
    time.sleep(way.idle)
    with memory_trace(None if device is None else partial(used_bytes, device)) as samples:
        phase("load")
        loaded = load(directory, Wanted(way.backend, None, way.threads))
        phase("picture")
        prompt_tokens, has_picture, new_tokens, decoded = _answers(loaded, way, began)
        began["end"] = time.monotonic()
    on_gpu = loaded.backend != "onnxruntime"
    kept = thinned(samples, SAMPLES)
    return Walked(
        backend=loaded.backend,
        prompt_tokens=prompt_tokens,
        pictures=int(has_picture),
        new_tokens=new_tokens,
        decode_tokens=decoded,
        available=available,
        device_available=free if on_gpu else None,
        began=began,
        samples=tuple(kept if on_gpu else [dataclasses.replace(sample, device=None) for sample in kept]),
    )


def _answers(loaded: Loaded, way: Way, began: dict[str, float]) -> tuple[int, bool, int, int]:
    """Tokens of the prompt, whether it has a picture, tokens of all answers, and of them in the phase ``decode``."""
    llava = loaded.llava
    turns = fitting(BenchOptions(None, (1,), (1,), way.new_tokens, 1), loaded.room)
    prompts = Prompts(llava.manifest, llava.encoder.tokenizer)
    if turns.has_picture:
        prompt, pictures = prompts.about_picture(turns.prompt_tokens), [prompts.picture(0)]
    else:
        prompt, pictures = prompts.new_text(0, turns.prompt_tokens), []
    wanted = max(_FEWEST, min(way.new_tokens, llava.max_len - turns.prompt_tokens))
    loaded.decoder.laps.clear()
    (answer,) = llava.generate([prompt], [pictures], max_new_tokens=wanted)
    steps = answer.timings.new_tokens - 1
    # The laps before the answer's steps read the prompt, in pieces where it is long.
    laps = loaded.decoder.laps
    first = len(laps) - steps
    began["prefill"] = laps[0].ended - laps[0].whole
    began["decode"] = laps[first - 1].ended
    decoded = steps
    new_tokens = answer.timings.new_tokens
    while time.monotonic() - began["decode"] < way.least:
        (answer,) = llava.generate([prompt], [pictures], max_new_tokens=wanted)  # the cache still has the prompt
        new_tokens += answer.timings.new_tokens
        decoded += answer.timings.new_tokens
    return answer.timings.prompt_tokens, turns.has_picture, new_tokens, decoded


def main() -> None:
    """Read a :class:`Way` from standard input and go it; what cannot be gone is said on standard output, too."""
    way: Way = from_plain(Way, json.loads(sys.stdin.read()), "way")
    try:
        walked = walk(way)
    except OptionError as error:
        _say({"option": error.option, "reason": error.reason})
        return
    except LlavaDeployError as error:
        _say({"error": str(error)})
        return
    _say({"walked": dataclasses.asdict(walked)})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
