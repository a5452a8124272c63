"""Everything in turn, round by round, through the calls that users make: :meth:`Llava.generate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llava_deploy.engines.errors import BackendError, OptionError
from llava_deploy.runtime.bench.memory import PeakWatch
from llava_deploy.runtime.bench.options import Turns
from llava_deploy.runtime.bench.prompts import Prompts
from llava_deploy.runtime.bench.sessions import Loaded

_FEW = 2
"""Tokens of an answer that warms up: a step is like the next."""


@dataclass(frozen=True)
class FirstSample:
    """One first token; see :class:`~llava_deploy.runtime.bench.report.FirstToken`."""

    prompt_tokens: int
    preprocess: float
    vision: float
    splice: float
    prefill: float
    rest: float
    total: float


@dataclass(frozen=True)
class DecodeSample:
    """One batch of answers.

    Attributes:
        context: tokens of each prompt.
        seconds: from the first token to the end of the call.
        steps: of the decoder in these seconds.
        python: of a step, everything but the backend's run: the median, as few steps are interrupted.
    """

    context: int
    seconds: float
    steps: int
    python: float


@dataclass(frozen=True)
class Measured:
    """All samples.

    Attributes:
        decode: by context, one row.
        batches: by rows.
        bandwidth: bytes a second.
    """

    first: list[FirstSample]
    decode: dict[int, list[DecodeSample]]
    batches: dict[int, list[DecodeSample]]
    bandwidth: list[float]


class Bench:
    """Takes the turns of one model."""

    def __init__(self, loaded: Loaded, turns: Turns, on_turn: Callable[[], None]) -> None:
        """Measure nothing yet; ``on_turn`` is called after each turn, the first token's, a context's, a batch's."""
        self._loaded = loaded
        self._turns = turns
        self._on_turn = on_turn
        self._prompts = Prompts(loaded.llava.manifest, loaded.llava.encoder.tokenizer)
        self._shown = 0
        # One row is measured anyway. More are where the cache has room for them, which is seen when they warm up.
        self._batches = tuple(batch for batch in turns.batches if batch > 1)

    def warm_up(self, watch: PeakWatch) -> list[str]:
        """Take every turn once, for the memory that it wants.

        Returns:
            What cannot be had, a sentence each.
        """
        remarks: list[str] = []
        # A GPU's steps are captured for each bucket of slots; on the CPU a step is like the next.
        tokens = _FEW if self._loaded.backend == "onnxruntime" else self._turns.new_tokens
        watch.phase("one prompt")
        for context in reversed(self._turns.contexts):
            self._loaded.llava.generate([self._prompts.text(context)], max_new_tokens=tokens)
            self._on_turn()
        self.first_token()
        self._on_turn()
        shortest = [self._prompts.text(self._turns.contexts[0])]
        can = []
        for batch in self._batches:
            watch.phase(f"batch of {batch}")
            try:
                self._loaded.llava.generate(shortest * batch, max_new_tokens=tokens)
            except (BackendError, OptionError) as error:  # no memory, or more rows than an engine takes
                remarks.append(f"batch of {batch} left out: {error}")
            else:
                can.append(batch)
            self._on_turn()
        self._batches = tuple(can)
        return remarks

    def run(self, rounds: int, read: Callable[[], Sequence[float]]) -> Measured:
        """Measure.

        Args:
            rounds: how often everything takes its turn.
            read: measures the memory's bandwidth, bytes a second.
        """
        contexts = self._turns.contexts
        found = Measured([], {context: [] for context in contexts}, {batch: [] for batch in self._batches}, [])
        for _ in range(rounds):
            found.bandwidth.extend(read())
            for context in reversed(contexts):  # what the cache holds of the longer serves the shorter
                found.decode[context].append(self.decode(context, 1))
                self._on_turn()
            # Not right after a batch: the cache of one row would have to be made anew first.
            found.first.append(self.first_token())
            self._on_turn()
            for batch in self._batches:
                found.batches[batch].append(self.decode(contexts[0], batch))
                self._on_turn()
        return found

    def first_token(self) -> FirstSample:
        """One prompt that nothing is known of, with a new picture where there is one."""
        self._shown += 1
        laps = self._loaded.decoder.laps
        laps.clear()
        if self._turns.has_picture:
            prompt = self._prompts.about_picture(self._turns.prompt_tokens)
            pictures = [self._prompts.picture(self._shown)]
        else:
            prompt, pictures = self._prompts.new_text(self._shown, self._turns.prompt_tokens), []
        answer = self._loaded.llava.generate([prompt], [pictures], max_new_tokens=1)[0]
        taken = answer.timings
        python = sum(lap.whole - lap.run for lap in laps)
        prefill = max(0.0, taken.prefill - python)
        known = taken.preprocess + taken.vision + taken.splice + prefill
        return FirstSample(
            prompt_tokens=taken.prompt_tokens,
            preprocess=taken.preprocess,
            vision=taken.vision,
            splice=taken.splice,
            prefill=prefill,
            rest=max(0.0, taken.ttft - known),
            total=taken.ttft,
        )

    def decode(self, context: int, batch: int) -> DecodeSample:
        """Answers of so many tokens to ``batch`` equal prompts."""
        prompts = [self._prompts.text(context)] * batch
        self._loaded.decoder.laps.clear()
        began = time.perf_counter()
        answer = self._loaded.llava.generate(prompts, max_new_tokens=self._turns.new_tokens)[0]
        seconds = time.perf_counter() - began - answer.timings.ttft
        steps = answer.timings.new_tokens - 1
        laps = self._loaded.decoder.laps[-steps - 1 :]
        python = statistics.median(lap.ended - before.ended - lap.run for before, lap in pairwise(laps))
        return DecodeSample(answer.timings.prompt_tokens, seconds, steps, python)
