"""How often a bundle answers right: questions about pictures, each with the one answer that counts."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from llava_deploy.engines.errors import InputError, OptionError
from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.runtime.answers import Answer
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.pictures import PictureSource, load_picture
from llava_deploy.runtime.prompt import render_chat

NORMALISATION = "exact match after: Unicode NFKC, lower case, single spaces, no full stop at the end"
"""What :func:`normalise` does, for people."""

_MID_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Question:
    """A question about one picture; ``kind`` groups the scores."""

    picture: PictureSource
    text: str
    answer: str
    kind: str


class Shown(Enum):
    """What the model gets to see: the picture, or one of its size in a single colour, the recipe's mean."""

    PICTURE = "picture"
    BLANK = "blank"


@dataclass(frozen=True)
class EvalOptions:
    """How questions are put: ``batch`` of them at once, ``max_new_tokens`` for each answer; decoding is greedy."""

    shown: Shown = Shown.PICTURE
    batch: int = 1
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise OptionError("batch", f"want 1 or more questions at once, got {self.batch}")


@dataclass(frozen=True)
class AskedBatch:
    """Questions put at once, as the model got them: a prompt and a list of pictures each; and what it answered."""

    prompts: Sequence[str]
    pictures: Sequence[Sequence[PictureSource]]
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Outcome:
    """One question and what was said; ``number`` counts from 1."""

    number: int
    kind: str
    question: str
    answer: str
    said: str

    @property
    def right(self) -> bool:
        """Whether the two are equal once normalised."""
        return normalise(self.said) == normalise(self.answer)


@dataclass(frozen=True)
class Score:
    """Right answers among those asked."""

    asked: int
    right: int

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 where nothing was asked."""
        return self.right / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class EvalReport:
    """Every outcome, in the order asked, and the seconds that answering took."""

    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def total(self) -> Score:
        """Over all kinds."""
        return _score(self.outcomes)

    @property
    def kinds(self) -> dict[str, Score]:
        """Kind to score, in the order in which kinds were first asked."""
        names = dict.fromkeys(outcome.kind for outcome in self.outcomes)
        return {name: _score([o for o in self.outcomes if o.kind == name]) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; ``wrong`` lists every answer that did not count."""
        return {
            "accuracy": self.total.accuracy,
            "asked": self.total.asked,
            "right": self.total.right,
            "kinds": {name: {**asdict(score), "accuracy": score.accuracy} for name, score in self.kinds.items()},
            "counts_as_right": NORMALISATION,
            "seconds": self.seconds,
            "wrong": [asdict(outcome) for outcome in self.outcomes if not outcome.right],
        }


def normalise(text: str) -> str:
    """The form in which answers are compared; see :data:`NORMALISATION`."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).removesuffix(".").rstrip()


def evaluate(
    llava: Llava,
    questions: Iterable[Question],
    options: EvalOptions,
    on_answer: Callable[[Outcome], None] = lambda _: None,
    on_batch: Callable[[AskedBatch], None] = lambda _: None,
) -> EvalReport:
    """Ask every question on its own, through the model's chat template.

    Args:
        llava: the bundle.
        questions: taken ``options.batch`` at a time.
        options: how they are put.
        on_answer: called after each question.
        on_batch: called after each batch, before its ``on_answer``; its time is not in the report's seconds.

    Raises:
        PictureError: a picture that cannot be used.
        PromptError: a question longer than the context.
    """
    seconds = 0.0
    outcomes: list[Outcome] = []
    for asked in _batches(questions, options.batch):
        began = time.perf_counter()
        pictures = [[_shown(question.picture, options.shown, llava.manifest.image)] for question in asked]
        prompts = [
            render_chat(
                [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": q.text}]}],
                llava.manifest.chat,
            )
            for (p,), q in zip(pictures, asked, strict=True)
        ]
        answers = llava.generate(prompts, pictures, max_new_tokens=options.max_new_tokens)
        seconds += time.perf_counter() - began
        on_batch(AskedBatch(prompts, pictures, answers))
        for question, said in zip(asked, answers, strict=True):
            outcome = Outcome(len(outcomes) + 1, question.kind, question.text, question.answer, said.text.strip())
            outcomes.append(outcome)
            on_answer(outcome)
    return EvalReport(tuple(outcomes), seconds)


def read_questions(path: Path) -> list[Question]:
    """Read questions from JSON Lines: objects with ``image``, ``question``, ``answer`` and perhaps ``kind``.

    A relative ``image`` is looked for beside the file; empty lines do not count. Pictures are not opened yet.

    Raises:
        InputError: no such file, no questions in it, or a line that is not such an object or names no picture; the
            message has the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); want a file of JSON lines") from error
    questions = [_question(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise InputError(f"{path}: want one question a line, found none")
    return questions


def _question(line: str, path: Path, number: int) -> Question:
    where = f"{path}, line {number}"
    wanted = 'want {"image": path, "question": text, "answer": text} and perhaps "kind": text'
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); {wanted}") from error
    if not isinstance(data, dict):
        raise InputError(f"{where}: {wanted}, found {line.strip():.60}")
    values = {"kind": "all", **data}
    for key in ("image", "question", "answer", "kind"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise InputError(f"{where}: {wanted}, found {key!r}: {values.get(key)!r:.60}")
    picture = path.parent / values["image"]
    if not picture.is_file():
        raise InputError(f"{where}: want a picture at {picture}, found none; relative paths start from {path.parent}")
    return Question(picture, values["question"], values["answer"], values["kind"])


def _shown(source: PictureSource, shown: Shown, recipe: ImageRecipe) -> PictureSource:
    if shown is Shown.PICTURE:
        return source
    color = _MID_GREY if recipe.mean is None else tuple(round(255 * value) for value in recipe.mean)
    return Image.new("RGB", load_picture(source).size, color)


def _batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    rest = iter(questions)
    while batch := list(islice(rest, size)):
        yield batch


def _score(outcomes: Sequence[Outcome]) -> Score:
    return Score(len(outcomes), sum(outcome.right for outcome in outcomes))
