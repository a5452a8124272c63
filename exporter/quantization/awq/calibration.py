"""Calibration prompts: what the decoder is shown while its scales are searched.

They go the way that a question to the model goes: its chat template, its tokenizer, its picture settings, the splice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import InputError, LlavaDeployError, OptionError, PromptError
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.demo.scenes import DESCRIBE, Split, describe, examples
from llava_deploy.runtime.pictures import PictureSource, load_picture
from llava_deploy.runtime.preprocess import preprocess_batch
from llava_deploy.runtime.prompt import images_of, render_chat
from llava_deploy.runtime.tokenize import tokenize_prompt

DEMO = "demo"
"""The word that stands for the built-in set, instead of a file."""

DEMO_SAMPLES = 64

_LINE = 'want {"messages": [{"role": "user", "content": text or parts}, ...]} or {"text": text}'


@dataclass(frozen=True)
class CalibrationSample:
    """One prompt, tokenised, its pictures ready for the vision tower.

    Attributes:
        origin: file and line, for messages.
        ids: int64 ``[tokens]`` with IMAGE_TOKEN_INDEX for each picture.
        pixels: float32 ``[pictures, 3, height, width]``.
    """

    origin: str
    ids: np.ndarray
    pixels: np.ndarray


def calibration_samples(calibration: str | None, checkpoint: Checkpoint) -> tuple[CalibrationSample, ...]:
    """The samples that ``--calibration`` names: a file, or the word ``demo`` for the drawn pictures.

    Raises:
        InputError: nothing is named, or as :func:`read_calibration`.
    """
    if calibration is None:
        raise OptionError(
            "calibration",
            "want a file of JSON lines, messages with pictures like those that the model will be asked about, or the "
            f"word {DEMO} for drawn pictures, which suit the tiny model of this package; AWQ searches with them",
        )
    return demo_calibration(checkpoint) if calibration == DEMO else read_calibration(Path(calibration), checkpoint)


def demo_calibration(checkpoint: Checkpoint, count: int = DEMO_SAMPLES) -> tuple[CalibrationSample, ...]:
    """Drawn pictures with questions and answers, the same ones every time, of those that training may use."""
    maker = _Maker(checkpoint)
    samples = []
    for number, example in enumerate(islice(examples(Split.TRAIN), count), 1):
        asked: list[dict[str, Any]] = [{"type": "image", "image": example.picture}, {"type": "text", "text": DESCRIBE}]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": describe(example.scene)},
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": example.answer},
        ]
        samples.append(maker.conversation(messages, f"drawn picture {number}"))
    return tuple(samples)


def read_calibration(path: Path, checkpoint: Checkpoint) -> tuple[CalibrationSample, ...]:
    """Read samples from JSON Lines: ``{"messages": [...]}`` or ``{"text": ...}``; empty lines do not count.

    Messages have the form that the runtime's ``chat`` takes, with a path (relative to the file) or a ``data:`` URI for
    a picture; the last may be the assistant's. A text is taken as it is, without the template.

    Raises:
        InputError: no such file, no sample in it, or a line that is of another form, names a picture that cannot be
            used, has more pictures than places for them, or comes to nothing; the message has the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 text ({error}); want a file of JSON lines, or the word {DEMO!r}"
        ) from error
    maker = _Maker(checkpoint)
    samples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                samples.append(_sample(line, path.parent, where, maker))
            except LlavaDeployError as error:
                if str(error).startswith(where):
                    raise
                raise InputError(f"{where}: {error}") from error
    if not samples:
        raise InputError(f"{path}: want a calibration sample a line, found none; {_LINE}")
    return tuple(samples)


def _sample(line: str, directory: Path, where: str, maker: _Maker) -> CalibrationSample:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); {_LINE}") from error
    if isinstance(data, dict) and set(data) == {"text"} and isinstance(data["text"], str) and data["text"].strip():
        return maker.prompt(data["text"], (), where)
    if not isinstance(data, dict) or set(data) != {"messages"} or not isinstance(data["messages"], list):
        raise InputError(f"{where}: {_LINE}, found {line.strip():.60}")
    if not data["messages"]:
        raise InputError(f"{where}: want one message at least, found none; {_LINE}")
    return maker.conversation([_with_paths(message, directory) for message in data["messages"]], where)


def _with_paths(message: Any, directory: Path) -> Any:
    """A message with its pictures' paths as seen from here; what has another form is left for the runtime to refuse."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_with_path(part, directory) for part in message["content"]]}


def _with_path(part: Any, directory: Path) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    source = part.get("image")
    if not isinstance(source, str):
        raise PromptError(f"want a picture's path or data URI, found {source!r:.60}; write one")
    if source[:5].lower() == "data:" or "://" in source:
        return part
    picture = directory / source
    try:
        found = picture.is_file()
    except OSError as error:
        raise PromptError(f"want a picture at {picture!s:.200}, found {error.strerror}; correct the path") from error
    if not found:
        raise PromptError(f"want a picture at {picture}, found none; relative paths start from {directory}")
    return {**part, "image": str(picture)}


class _Maker:
    """Makes samples with one checkpoint's tokenizer and recipes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = Tokenizer.from_buffer(checkpoint.tokenizer_json)

    def conversation(self, messages: Sequence[Mapping[str, Any]], origin: str) -> CalibrationSample:
        """Messages through the chat template; an assistant's message at the end follows its prompt."""
        chat = self._checkpoint.chat
        *before, last = messages
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            return self.prompt(render_chat(messages, chat), images_of(messages), origin)
        answer = last.get("content")
        if not isinstance(answer, str):
            raise PromptError(f"message {len(before)}: want the assistant's content as text, found {answer!r:.60}")
        prompt = render_chat(before, chat)
        gap = "" if prompt[-1:].isspace() else " "
        return self.prompt(f"{prompt}{gap}{answer}{chat.eos_token or ''}", images_of(before), origin)

    def prompt(self, prompt: str, pictures: Sequence[PictureSource], origin: str) -> CalibrationSample:
        """A prompt as it is, with its pictures."""
        chat, size = self._checkpoint.chat, self._checkpoint.config.vision.image_size
        ids = tokenize_prompt(prompt, self._tokenizer, chat)
        places = int((ids == IMAGE_TOKEN_INDEX).sum())
        if places != len(pictures):
            raise PromptError(
                f"{places} placeholders {chat.placeholder!r} and {len(pictures)} pictures; want as many of one as of "
                "the other"
            )
        if not len(ids):
            raise PromptError("want text or a picture, got nothing")
        vocab = self._checkpoint.config.decoder.vocab_size
        if ids.max() >= vocab:
            raise PromptError(f"token id {ids.max()} is outside the vocabulary of {vocab}; is the tokenizer its own?")
        pixels = np.empty((len(pictures), 3, size, size), np.float32)
        preprocess_batch([load_picture(picture) for picture in pictures], self._checkpoint.image, pixels)
        return CalibrationSample(origin, ids, pixels)
