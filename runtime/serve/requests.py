"""One line of JSON to a question that is known to be well-formed. Nothing of it is loaded or answered here."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llava_deploy.engines.errors import InputError, OptionError, PictureError, PromptError
from llava_deploy.runtime.prompt import images_of
from llava_deploy.runtime.sampling import SamplingOptions

_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
_KEYS = ("prompt", "messages", "images", "raw", "max_new_tokens", *_SAMPLING, "stop", "stream")
_STOPS, _STOP_LENGTH = 16, 1000
_LARGEST_FILE = 64 << 20


@dataclass(frozen=True)
class Allowed:
    """What a request may ask for.

    Attributes:
        new_tokens: of one answer, at most.
        default_new_tokens: where a request does not say.
        images: of one request, at most.
        pictures: the directory whose files a request may name; ``None``: pictures come as data URIs alone.
        characters: of a request's text, at most: a text is cut into tokens before anybody knows that they are too many,
            and everybody waits meanwhile.
    """

    new_tokens: int
    default_new_tokens: int
    images: int
    pictures: Path | None
    characters: int


@dataclass(frozen=True)
class PictureFile:
    """A file that a request names; read when its question is answered, so that those that wait hold no bytes.

    Attributes:
        directory: the allowed one.
        path: as the request has it.
        name: of the picture, for people.
    """

    directory: Path
    path: str
    name: str

    def read(self) -> bytes:
        """Its bytes; where it lies is asked of the opened file, so that no link can be changed in between.

        Raises:
            PictureError: not there, not in the directory, or not to be read, in the same words: what lies elsewhere is
                nobody's to know; or no file, or too large a one.
        """
        wanted = f"{self.name}: want a picture file below the service's --pictures directory"
        refused = PictureError(f"{wanted}, which the service may read; this path leads to none")
        try:
            handle = os.open(self.directory / self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except (OSError, ValueError):
            raise refused from None
        try:
            if not Path(f"/proc/self/fd/{handle}").readlink().is_relative_to(self.directory.resolve()):
                raise refused
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_FILE:
                raise PictureError(f"{wanted}, of at most {_LARGEST_FILE:,} bytes; this one is not")
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(_LARGEST_FILE)
        except OSError:
            raise refused from None
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Question:
    """What is asked of the model.

    Attributes:
        messages: as :func:`~llava_deploy.runtime.prompt.render_chat` takes them; ``None`` with ``raw``.
        raw: a prompt to take as it is.
        images: of either, data URIs or files, in the order of their placeholders.
        max_new_tokens: of the answer.
        sampling: how tokens are chosen.
        stop: texts that end the answer.
        stream: the text as it comes, instead of all of it at the end.
    """

    messages: list[dict[str, Any]] | None
    raw: str
    images: tuple[str | PictureFile, ...]
    max_new_tokens: int
    sampling: SamplingOptions
    stop: tuple[str, ...]
    stream: bool


def parse_line(line: bytes) -> dict[str, Any]:
    """A line as the JSON object that it must be.

    Raises:
        InputError: it is something else.
    """
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # of depth, Python's own limit
        raise InputError(f"want one JSON object a line, in UTF-8; {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"want one JSON object a line, got {type(value).__name__}")
    return value


def is_health(value: Mapping[str, Any]) -> bool:
    """Whether only the service's own state is asked for: ``{"health": true}`` and nothing else."""
    if "health" in value and value != {"health": True}:
        raise InputError('want {"health": true} by itself; ask the model in a line of its own')
    return "health" in value


def parse_question(value: Mapping[str, Any], allowed: Allowed) -> Question:
    """A request, checked as far as that goes without the model.

    Raises:
        InputError: a key that is not known, or a value of another kind or outside of what is allowed.
        PictureError: too many pictures, or one that is no data URI where no file may be named.
    """
    if unknown := sorted(set(value) - set(_KEYS)):
        raise InputError(f"unknown: {', '.join(unknown)[:200]}; a request has {', '.join(_KEYS)}")
    if ("prompt" in value) == ("messages" in value):
        raise InputError("want either prompt or messages")
    raw = _flag(value, "raw", default=False)
    stream = _flag(value, "stream", default=True)
    new_tokens = value.get("max_new_tokens", allowed.default_new_tokens)
    if type(new_tokens) is not int or not 1 <= new_tokens <= allowed.new_tokens:
        raise OptionError("max_new_tokens", f"want a whole number from 1 to {allowed.new_tokens}, got {new_tokens!r}")
    sampling = SamplingOptions(**{name: value[name] for name in _SAMPLING if name in value})
    messages, images = _asked(value, allowed)
    _require_short(messages, allowed)
    prompt = value.get("prompt", "")
    if raw and "prompt" not in value:
        raise InputError("raw: only a prompt can be taken as it is; leave raw out with messages")
    return Question(None if raw else messages, prompt, images, new_tokens, sampling, _stops(value), stream)


def _asked(value: Mapping[str, Any], allowed: Allowed) -> tuple[list[dict[str, Any]], tuple[str | PictureFile, ...]]:
    """The conversation and its pictures."""
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise PromptError(f"prompt: want text, got {type(value['prompt']).__name__}")
        given = value.get("images", [])
        if not isinstance(given, list):
            raise InputError(f"images: want a list of data URIs, got {type(given).__name__}")
        _require_few(len(given), allowed)
        parts = [{"type": "image", "image": source} for source in given]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": value["prompt"]}]}]
        return messages, _pictures(given, allowed)
    if "images" in value:
        raise InputError('images: with messages, a picture is a part {"type": "image", "image": …} of its message')
    messages = value["messages"]
    found = images_of(messages)  # which also says what is wrong with the form of any message
    _require_few(len(found), allowed)
    return messages, _pictures(found, allowed)


def _require_short(messages: Sequence[Mapping[str, Any]], allowed: Allowed) -> None:
    contents = [message["content"] for message in messages]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    found = sum(len(part.get("text", "")) for content in parts for part in content)
    if found > allowed.characters:
        raise PromptError(f"want at most {allowed.characters:,} characters of text in one request, got {found:,}")


def _require_few(count: int, allowed: Allowed) -> None:
    if count > allowed.images:
        raise PictureError(f"want at most {allowed.images} pictures in one request, got {count}")


def _pictures(sources: Sequence[object], allowed: Allowed) -> tuple[str | PictureFile, ...]:
    return tuple(_picture(source, f"image {index}", allowed) for index, source in enumerate(sources))


def _picture(source: object, name: str, allowed: Allowed) -> str | PictureFile:
    if not isinstance(source, str):
        raise PictureError(f"{name}: want a data URI, got {type(source).__name__}")
    if source[:5].lower() == "data:":
        return source
    if allowed.pictures is None:
        raise PictureError(f"{name}: want a data URI; this service reads no files (serve --pictures DIR lets it)")
    return PictureFile(allowed.pictures, source, name)


def _flag(value: Mapping[str, Any], name: str, *, default: bool) -> bool:
    found = value.get(name, default)
    if not isinstance(found, bool):
        raise InputError(f"{name}: want true or false, got {found!r}"[:200])
    return found


def _stops(value: Mapping[str, Any]) -> tuple[str, ...]:
    stops = value.get("stop", [])
    if not (isinstance(stops, list) and all(isinstance(stop, str) and len(stop) <= _STOP_LENGTH for stop in stops)):
        raise OptionError("stop", f"want a list of texts of at most {_STOP_LENGTH} characters")
    if len(stops) > _STOPS:
        raise OptionError("stop", f"want at most {_STOPS} texts, got {len(stops)}")
    return tuple(stops)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
