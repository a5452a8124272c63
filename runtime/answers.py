"""What the runtime gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "context"]
"""``stop``: a stop token or string; ``length``: ``max_new_tokens``; ``context``: the cache is full."""


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds; of the whole batch, where there is one.

    Attributes:
        preprocess: pictures loaded, resized and normalised.
        vision: tower and projector, on a GPU by its own clock; 0 where every picture was known from an earlier call.
        splice: prompt tokenised, embeddings looked up, image features put between them.
        prefill: decoder over the prompt, first token chosen.
        decode: all later tokens.
        ttft: time to first token, from the call on.
        prompt_tokens: rows of the spliced prompt, image features included.
        reused_tokens: of those, the ones whose keys and values were still in the cache.
        new_tokens: tokens chosen.
    """

    preprocess: float
    vision: float
    splice: float
    prefill: float
    decode: float
    ttft: float
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first; 0 where there is none."""
        return (self.new_tokens - 1) / self.decode if self.new_tokens > 1 and self.decode else 0.0


@dataclass(frozen=True)
class Answer:
    """One finished answer; ``token_ids`` end with the stop token where one ended it, ``text`` never shows it."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    timings: Timings


class Piece(NamedTuple):
    """A part of an answer as it streams: whole characters, and the tokens chosen since the piece before.

    ``finish_reason`` and ``timings`` are ``None`` but in the last piece.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    timings: Timings | None
