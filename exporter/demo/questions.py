"""The drawn, held-out questions in the form in which a bundle is evaluated on them."""

from __future__ import annotations

from itertools import islice

from PIL import Image

from llava_deploy.engines.errors import InputError
from llava_deploy.exporter.demo.scenes import KINDS, Split, chance, examples
from llava_deploy.runtime.evaluation import Question


def drawn_questions(per_kind: int, seed: int) -> list[Question]:
    """``per_kind`` questions of every kind, about pictures never seen in training; a seed gives the same ones.

    Raises:
        InputError: ``per_kind`` is below 1.
    """
    if per_kind < 1:
        raise InputError(f"per-kind: want 1 question or more of each kind, got {per_kind}")
    drawn = islice(examples(Split.HELD_OUT, seed), per_kind * len(KINDS))
    return [Question(example.picture, example.question, example.answer, example.kind) for example in drawn]


def chances() -> dict[str, float]:
    """Kind to the accuracy of guessing without the picture."""
    return {kind: chance(kind) for kind in KINDS}


def drawn_picture() -> Image.Image:
    """A picture never seen in training; always the same one."""
    return next(examples(Split.HELD_OUT)).picture
