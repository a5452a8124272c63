"""Training conversations about scenes, in the vicuna_v1 format, as token ids and labels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from llava_deploy.engines.contract import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_deploy.exporter.demo.scenes import DESCRIBE, Form, Question, Scene, describe, questions
from llava_deploy.exporter.demo.tokens import BOS, EOS, SYSTEM, token_id

# Counting and telling where things are take longest to learn, so they are asked most.
_WEIGHTS = {Form.SHAPE: 3, Form.COLOUR: 2, Form.COUNT_ALL: 2, Form.COUNT_SHAPE: 4, Form.POSITION: 4, Form.RELATION: 5}


@dataclass(frozen=True)
class Conversation:
    """Token ids with IMAGE_TOKEN_INDEX where a picture goes, and labels that are IGNORE_INDEX but for the answers."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


class ConversationWriter:
    """Writes conversations with one tokenizer; the pieces they are made of recur, so each is encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bos = token_id(tokenizer, BOS)
        self._eos = token_id(tokenizer, EOS)
        self._encode = lru_cache(maxsize=None)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    def write(self, scenes: tuple[Scene, ...], turns: int, describing: float, rng: random.Random) -> Conversation:
        """A conversation of `turns` questions about each scene; each scene's picture comes with its first question.

        `describing` is the share of turns that ask for the whole picture and not for one thing.
        """
        ids = [self._bos]
        labels = [IGNORE_INDEX]
        before = f"{SYSTEM} " if rng.random() < 0.5 else ""
        for scene in scenes:
            for turn in range(turns):
                question, answer = _ask(scene, describing, rng)
                if turn == 0:
                    said = [
                        *self._encode(f"{before}USER: "),
                        IMAGE_TOKEN_INDEX,
                        *self._encode(f"\n{question} ASSISTANT:"),
                    ]
                else:
                    said = self._encode(f"{before}USER: {question} ASSISTANT:")
                reply = [*self._encode(f" {answer}"), self._eos]
                ids += [*said, *reply]
                labels += [IGNORE_INDEX] * len(said) + reply
                before = ""
        return Conversation(tuple(ids), tuple(labels))


def _ask(scene: Scene, describing: float, rng: random.Random) -> tuple[str, str]:
    if rng.random() < describing:
        return DESCRIBE, describe(scene)
    found: list[Question] = []
    while not found:
        form = rng.choices(tuple(_WEIGHTS), tuple(_WEIGHTS.values()))[0]
        found = questions(scene, form)
    question = rng.choice(found)
    return question.text, question.answer
