"""Prefill, then one token a step for every row, until each has finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.errors import LlavaDeployError, OptionError, PromptError
from llava_deploy.runtime.answers import FinishReason
from llava_deploy.runtime.backend import DecoderSession
from llava_deploy.runtime.new_tokens import NewTokens
from llava_deploy.runtime.sampling import Sampler
from llava_deploy.runtime.textstream import TextStream


@dataclass(frozen=True)
class GenerationLimits:
    """When an answer ends: after ``max_new_tokens``, or after any of ``stop_token_ids``."""

    max_new_tokens: int
    stop_token_ids: frozenset[int]

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise OptionError("max_new_tokens", f"want 1 or more, got {self.max_new_tokens!r}")


class Row:
    """One answer in the making."""

    def __init__(self, text: TextStream, length: int) -> None:
        self.text = text
        self.length = length
        """Slots of the cache that are this row's: the index that its next key goes to."""
        self.new_tokens: list[int] = []
        self.new_text: list[str] = []
        """What each of them made certain, often nothing."""
        self.finish_reason: FinishReason | None = None

    def accept(self, token: int, limits: GenerationLimits, max_len: int) -> None:
        """Take the chosen token; set ``finish_reason`` where it is the last."""
        self.new_tokens.append(token)
        text = ""
        reason: FinishReason | None = None
        if token in limits.stop_token_ids:
            reason = "stop"
        else:
            text = self.text.push(token)
            if self.text.finished:
                reason = "stop"
            elif len(self.new_tokens) == limits.max_new_tokens:
                reason = "length"
            elif self.length == max_len:
                reason = "context"
        if reason is not None:
            text += self.text.flush()
            # What was held back may have been the whole of a stop string.
            self.finish_reason = "stop" if self.text.finished else reason
        self.new_text.append(text)

    def ended(self) -> FinishReason:
        """Why it ended.

        Raises:
            LlavaDeployError: it has not.
        """
        if self.finish_reason is None:
            raise LlavaDeployError("an answer was taken before it had ended; this is a bug in llava-deploy")
        return self.finish_reason


class Generation:
    """The run of one batch.

    ``prefill_seconds`` and ``decode_seconds`` are set as it goes; time between steps, when the caller has the tokens,
    is not in them. ``first_token_at`` is the reading of ``time.perf_counter`` when the first token was chosen.
    """

    def __init__(self, decoder: DecoderSession, sampler: Sampler, limits: GenerationLimits, rows: list[Row]) -> None:
        self.rows = rows
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.first_token_at = 0.0
        self._decoder = decoder
        self._sampler = sampler
        self._limits = limits
        self._running = len(rows)

    def steps(
        self,
        prompts: NewTokens,
        embed: Callable[[list[int]], np.ndarray],
        on_written: Callable[[int], None],
    ) -> Iterator[None]:
        """Yield after every token that was chosen for the rows still running.

        Args:
            prompts: what the cache does not hold of them yet.
            embed: a token id a row to embeddings ``[batch, 1, hidden]``, of use until the next call.
            on_written: called with the first row's token after each decode step that wrote it into the cache.
        """
        began = time.perf_counter()
        chosen = self._choose(prefill(self._decoder, prompts))
        self.first_token_at = time.perf_counter()
        self.prefill_seconds = self.first_token_at - began
        yield
        rows, decoder, last_slot = self.rows, self._decoder, self._decoder.max_len - 1
        write, last_index = np.zeros((2, len(rows)), np.int64)
        slots = write.data  # behind a step of the decoder, a number goes in sooner than through NumPy
        while self._running:
            began = time.perf_counter()
            for index, row in enumerate(rows):
                # A row that has finished writes again to its last slot, which nothing will read.
                slots[index] = min(row.length, last_slot)
                if row.finish_reason is None:
                    row.length += 1
            logits = decoder.step(embed(chosen), write, last_index)
            on_written(chosen[0])
            chosen = self._choose(logits)
            self.decode_seconds += time.perf_counter() - began
            yield

    def _choose(self, logits: np.ndarray) -> list[int]:
        chosen = self._sampler.choose(logits)
        for index, row in enumerate(self.rows):
            if row.finish_reason is None:
                row.accept(chosen[index], self._limits, self._decoder.max_len)
                if row.finish_reason is not None:
                    self._running -= 1
        return chosen


def prefill(decoder: DecoderSession, prompts: NewTokens) -> np.ndarray:
    """Write prompts into the cache, some tokens at a time, and give the logits after each row's last one.

    Args:
        decoder: has a cache for the batch, and all of the prompts in it that comes before these tokens.
        prompts: the rest of them.

    Returns:
        float32 ``[batch, vocab]``.
    """
    batch, seq, _ = prompts.inputs_embeds.shape
    logits = np.empty((0, 0), np.float32)
    for at in range(0, seq, decoder.max_seq):
        piece, pictures = prompts.part(at, at + decoder.max_seq)
        last = prompts.lengths - 1 - at
        ends = (last >= 0) & (last < piece.shape[1])
        found = decoder.step(piece, np.full(batch, prompts.start + at), np.where(ends, last, 0), pictures)
        if not logits.size:
            logits = np.empty(found.shape, found.dtype)
        logits[ends] = found[ends]
    return logits


def logits_along(
    decoder: DecoderSession,
    prompts: NewTokens,
    answers: Sequence[Sequence[int]],
    embed: Callable[[list[int]], np.ndarray],
) -> Iterator[np.ndarray]:
    """Read answers that are given, and yield the logits after each of their prefixes (teacher forcing).

    Args:
        decoder: as for :func:`prefill`, also ``prompts``.
        prompts: see there.
        answers: token ids for each row.
        embed: a token id a row to embeddings ``[batch, 1, hidden]``, of use until the next call.

    Yields:
        float32 ``[batch, vocab]``, valid until the next: after the prompts, then after one more token of each answer,
        as often as the longest answer has tokens. A row whose answer has no more holds nothing of use.

    Raises:
        PromptError: not an answer a row, or one that is empty, too long for the context, or not in the vocabulary.
    """
    lengths = prompts.start + prompts.lengths
    if len(answers) != len(lengths):
        raise PromptError(f"answers: want one a prompt, {len(lengths)}, got {len(answers)}")
    for index, (answer, most) in enumerate(zip(answers, (decoder.max_len + 1 - lengths).tolist(), strict=True)):
        if not 1 <= len(answer) <= most:
            raise PromptError(f"answer {index}: want 1 to {most} tokens, which fit the context, got {len(answer)}")
    yield prefill(decoder, prompts)
    write, last_index = np.zeros((2, len(answers)), np.int64)
    for count in range(1, max(map(len, answers))):
        # A row whose answer has no more writes its last token again, to the same slot.
        last = np.array([min(count, len(answer)) - 1 for answer in answers])
        tokens = [answer[at] for answer, at in zip(answers, last.tolist(), strict=True)]
        np.add(lengths, last, out=write)
        yield decoder.step(embed(tokens), write, last_index)
