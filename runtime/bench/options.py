"""What is measured, and what of it fits the context."""

from __future__ import annotations

from dataclasses import dataclass

from llava_deploy.engines.errors import OptionError

LEAST_SLOTS = 16
"""Of the KV cache: below it there is nothing to measure."""

QUESTION_TOKENS = 40
"""Of text beside the picture, where nobody says how long the prompt is."""

_LEAST_TEXT = 8
_MOST = 1 << 20


@dataclass(frozen=True)
class BenchOptions:
    """What is asked for.

    Attributes:
        prompt_tokens: of the prompt whose first token is timed, its picture included; ``None``: a picture and a
            question.
        contexts: tokens in the cache behind which decoding is timed, one row.
        batches: rows at once, at the shortest of the contexts.
        new_tokens: of each answer.
        rounds: how often everything takes its turn.
    """

    prompt_tokens: int | None
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    rounds: int

    def __post_init__(self) -> None:
        prompt = () if self.prompt_tokens is None else (self.prompt_tokens,)
        counts = {"prompt_tokens": prompt, "contexts": self.contexts, "batches": self.batches, "rounds": (self.rounds,)}
        for name, values in counts.items():
            for value in values:
                if not 1 <= value <= _MOST:
                    raise OptionError(name, f"want 1 to {_MOST}, got {value}")
        for name, values in (("contexts", self.contexts), ("batches", self.batches)):
            if not values:
                raise OptionError(name, "want one number at least, got none")
        if not 2 <= self.new_tokens <= _MOST:
            reason = f"want 2 to {_MOST}, as tokens after the first are timed, got {self.new_tokens}"
            raise OptionError("new_tokens", reason)


STANDARD = BenchOptions(None, (64, 512, 2000), (1, 2, 4, 8), 64, 3)
"""Where nobody says otherwise."""

QUICK = BenchOptions(None, (64, 512), (1, 4), 16, 1)
"""For a look."""


@dataclass(frozen=True)
class Room:
    """What a loaded bundle has room for.

    Attributes:
        max_len: slots of the KV cache.
        longest_prompt: tokens of a prompt.
        patches: tokens that a picture takes.
    """

    max_len: int
    longest_prompt: int
    patches: int


@dataclass(frozen=True)
class Turns:
    """What is measured; see :class:`BenchOptions`.

    Attributes:
        prompt_tokens: of the prompt whose first token is timed.
        has_picture: it has one.
        contexts: in ascending order, one at least.
        batches: in ascending order.
        new_tokens: of each answer.
        remarks: what was left out or done otherwise, a sentence each.
    """

    prompt_tokens: int
    has_picture: bool
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    remarks: tuple[str, ...]


def fitting(options: BenchOptions, room: Room) -> Turns:
    """What of the options fits.

    Raises:
        OptionError: next to no cache, or a prompt longer than what fits.
    """
    slots = min(room.max_len, room.longest_prompt)
    if slots < LEAST_SLOTS:
        raise OptionError("max_len", f"want a context of {LEAST_SLOTS} tokens or more to measure in, found {slots}")
    remarks = []
    new_tokens = min(options.new_tokens, room.max_len // 2)
    if new_tokens < options.new_tokens:
        remarks.append(f"answers of {new_tokens} tokens instead of {options.new_tokens}: {_slots(room)}")
    prompt_tokens, has_picture, remark = _prompt(options.prompt_tokens, room)
    remarks += [remark] if remark else []
    longest = min(room.longest_prompt, room.max_len - new_tokens)
    wanted = sorted(set(options.contexts))
    contexts = [context for context in wanted if context <= longest]
    remarks += [
        f"context of {context} tokens left out: with {new_tokens} new ones at most {longest} fit"
        for context in wanted
        if context > longest
    ]
    if not contexts:
        contexts = [longest]
        remarks.append(f"context of {longest} tokens measured instead, the longest that fits")
    batches = tuple(sorted(set(options.batches)))
    return Turns(prompt_tokens, has_picture, tuple(contexts), batches, new_tokens, tuple(remarks))


def _prompt(wanted: int | None, room: Room) -> tuple[int, bool, str]:
    """Tokens of the prompt, whether it has a picture, and what is to be said of it."""
    most = min(room.longest_prompt, room.max_len)
    if wanted is not None and wanted > most:
        raise OptionError("prompt_tokens", f"want 1 to {most}, which is what fits, got {wanted}")
    least = room.patches + _LEAST_TEXT
    takes = f"a picture takes {room.patches} tokens"
    if wanted is not None:
        text_only = wanted < least
        return wanted, not text_only, f"text only: {takes}, the prompt has {wanted}" if text_only else ""
    if least > most:
        return min(QUESTION_TOKENS, most), False, f"text only: {takes}, and {_slots(room)}"
    return min(room.patches + QUESTION_TOKENS, most), True, ""


def _slots(room: Room) -> str:
    return f"the context has {min(room.max_len, room.longest_prompt)} (--max-len)"
