"""Training conversations about scenes, in the vicuna_v1 format, as token ids and labels."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from llava_deploy.engines.contract import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_deploy.exporter.demo.scenes import (
    DESCRIBE,
    NAME_COLOURS,
    Form,
    Question,
    Scene,
    Thing,
    describe,
    name_colours,
    questions,
)
from llava_deploy.exporter.demo.tokens import BOS, EOS, SYSTEM, token_id

# What takes longest to learn is asked most.
ALL_FORMS = {Form.SHAPE: 3, Form.COLOUR: 3, Form.COUNT: 2, Form.POSITION: 2, Form.RELATION: 4}
RELATIONS_FIRST = {Form.SHAPE: 2, Form.COLOUR: 2, Form.COUNT: 1, Form.POSITION: 1, Form.RELATION: 8}


@dataclass(frozen=True)
class Course:
    """What the conversations of a batch are like.

    The shares are of turns that ask for the whole picture: what is in it, and which colour each shape has.  In those
    answers one word tells where to look for the next one, so they are learned soonest.
    """

    rows: int
    pictures: int  # in each conversation
    turns: int  # about each picture
    describing: float
    naming: float
    weights: Mapping[Form, int]  # how often each form is asked, in all other turns


@dataclass(frozen=True)
class Conversation:
    """Token ids with IMAGE_TOKEN_INDEX where a picture goes, and labels that are IGNORE_INDEX but for the answers.

    `mentions` holds the index of each token that completes an object's name in a question, with that object.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    mentions: tuple[tuple[int, Thing], ...]


class ConversationWriter:
    """Writes conversations with one tokenizer; the pieces they are made of recur, so each is encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bos = token_id(tokenizer, BOS)
        self._eos = token_id(tokenizer, EOS)
        self._encode = lru_cache(maxsize=None)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    def write(self, scenes: tuple[Scene, ...], course: Course, rng: random.Random) -> Conversation:
        """A conversation about the scenes; each scene's picture comes with the first question about it."""
        ids = [self._bos]
        labels = [IGNORE_INDEX]
        mentions: list[tuple[int, Thing]] = []
        before = f"{SYSTEM} " if rng.random() < 0.5 else ""
        for scene in scenes:
            for turn in range(course.turns):
                question, answer, about = _ask(scene, course, rng)
                if turn == 0:
                    said = [
                        *self._encode(f"{before}USER: "),
                        IMAGE_TOKEN_INDEX,
                        *self._encode(f"\n{question} ASSISTANT:"),
                    ]
                else:
                    said = self._encode(f"{before}USER: {question} ASSISTANT:")
                found = 0
                for word, thing in about:
                    found = said.index(self._encode(f" {word}")[0], found + 1)
                    mentions.append((len(ids) + found, thing))
                reply = [*self._encode(f" {answer}"), self._eos]
                ids += [*said, *reply]
                labels += [IGNORE_INDEX] * len(said) + reply
                before = ""
        return Conversation(tuple(ids), tuple(labels), tuple(mentions))


def _ask(scene: Scene, course: Course, rng: random.Random) -> tuple[str, str, tuple[tuple[str, Thing], ...]]:
    lot = rng.random()
    if lot < course.describing:
        return DESCRIBE, describe(scene), ()
    if lot < course.describing + course.naming:
        return NAME_COLOURS, name_colours(scene), ()
    found: list[Question] = []
    while not found:
        form = rng.choices(tuple(course.weights), tuple(course.weights.values()))[0]
        found = questions(scene, form)
    question = rng.choice(found)
    return question.text, question.answer, question.about
