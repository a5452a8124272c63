"""One question, one answer: the text as it comes, or one JSON object."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.manifest import ChatRecipe
from llava_deploy.runtime.answers import Answer, FinishReason, Piece, Timings
from llava_deploy.runtime.generation import GenerationLimits
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.pictures import PictureSource
from llava_deploy.runtime.prompt import render_chat
from llava_deploy.runtime.sampling import SamplingOptions


class Template(Enum):
    """What is put around a prompt: the model's own format, or nothing."""

    MODEL = "model"
    RAW = "raw"


class Output(Enum):
    """What standard output gets: the answer's text as it comes, or all there is to know of it at the end."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is made; see :meth:`Llava.generate`.

    Raises:
        InputError: ``max_new_tokens`` below 1, here and not only when the model is loaded.
    """

    max_new_tokens: int
    sampling: SamplingOptions
    stop: tuple[str, ...]

    def __post_init__(self) -> None:
        GenerationLimits(self.max_new_tokens, frozenset())


@dataclass(frozen=True)
class Request:
    """One question; a :attr:`Template.RAW` prompt has a placeholder for each picture."""

    prompt: str
    pictures: Sequence[PictureSource]
    template: Template


def prompt_of(request: Request, recipe: ChatRecipe) -> str:
    """The request's prompt as the model reads it.

    Raises:
        PromptError: placeholders in its text, but not one for each picture.
    """
    if request.template is Template.RAW:
        return request.prompt
    parts = [{"type": "image", "image": picture} for picture in request.pictures]
    return render_chat([{"role": "user", "content": [*parts, {"type": "text", "text": request.prompt}]}], recipe)


def write_text(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def run_request(
    llava: Llava, request: Request, options: AnswerOptions, output: Output, say: Callable[[str], None]
) -> None:
    """Answer on standard output; ``say`` gets what is no part of the answer.

    Raises:
        PictureError: a picture that cannot be used.
        PromptError: more or fewer pictures than placeholders, or a prompt longer than the context.
    """
    if output is Output.TEXT:
        answer = answer_request(llava, request, options, write_text)
        write_text("\n")
        for note in closing_notes(answer.finish_reason, answer.timings, llava.max_len):
            say(note)
        return
    answer = answer_request(llava, request, options, lambda _: None)
    rate = answer.timings.decode_tokens_per_second
    value = {**dataclasses.asdict(answer), "decode_tokens_per_second": rate, "backend": llava.backend}
    write_text(json.dumps(value, ensure_ascii=False) + "\n")


def answer_request(llava: Llava, request: Request, options: AnswerOptions, write: Callable[[str], None]) -> Answer:
    """Answer a request; ``write`` gets the text as it comes. Errors as :func:`run_request`."""
    pieces = llava.stream(
        prompt_of(request, llava.manifest.chat),
        request.pictures,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        stop=options.stop,
    )
    return gathered(pieces, write)


def gathered(pieces: Iterator[Piece], write: Callable[[str], None]) -> Answer:
    """The whole answer of its pieces; ``write`` gets the text as it comes, and ends the answer by raising.

    Raises:
        BackendError: the pieces end without a reason.
    """
    said: list[str] = []
    ids: list[int] = []
    last = None
    for last in pieces:
        # Many models begin with a space, which is no part of what they say.
        text = last.text if said else last.text.lstrip()
        ids += last.token_ids
        if text:
            said.append(text)
            write(text)
    if last is None or last.finish_reason is None or last.timings is None:
        raise BackendError("the answer ended without a reason; run it again with --debug and report it")
    return Answer(tuple(ids), "".join(said), last.finish_reason, last.timings)


def closing_notes(reason: FinishReason, timings: Timings, max_len: int) -> list[str]:
    """What to say of a finished answer: why it is cut off, where it is, and how long it took."""
    known = f", {timings.reused_tokens} of them known" if timings.reused_tokens else ""
    rate = f", then {timings.decode_tokens_per_second:.0f} tokens/s" if timings.new_tokens > 1 else ""
    speed = (
        f"{_tokens(timings.new_tokens)}, the first after {1000 * timings.ttft:.0f} ms{rate}; "
        f"prompt of {_tokens(timings.prompt_tokens)}{known}"
    )
    if reason == "length":
        return [f"cut off after {_tokens(timings.new_tokens)}: --max-new-tokens allows more", speed]
    if reason == "context":
        return [f"cut off: the context of {max_len} tokens is full", speed]
    return [speed]


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
