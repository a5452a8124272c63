"""What a model is asked: three conversations, each with simpler forms for models that do not take the fullest."""

from __future__ import annotations

from dataclasses import dataclass

from llava_deploy.engines.goldens import GoldenMessage, GoldenPart
from llava_deploy.exporter.goldens.pictures import golden_pictures

PICTURE = GoldenPart(None)
"""Where the next picture goes."""


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question.

    Attributes:
        name: of the golden.
        messages: by turns the user's and the assistant's, the last one the user's.
        pictures: PNG files, in the order of the messages' pictures.
    """

    name: str
    messages: tuple[GoldenMessage, ...]
    pictures: tuple[bytes, ...]


def questions(image_size: int) -> tuple[tuple[Question, ...], ...]:
    """Each golden's forms, the fullest first; the same ones every time."""
    colour, portrait, grey = golden_pictures(image_size)
    one = "one-picture"
    two = "two-pictures"
    text = "text-only"
    compare = _user("First look at this:", PICTURE, "Now at this one:", PICTURE, "What is in the picture?")
    return (
        (
            Question(one, (_user(PICTURE, "What shape is the blue object?"),), (colour,)),
            Question(one, (_user(PICTURE, "What?"),), (colour,)),
            Question(one, (_user(PICTURE),), (colour,)),
        ),
        (
            Question(
                two,
                (compare, _assistant("A purple cross and an orange triangle."), _user("Which colour is each shape?")),
                (portrait, grey),
            ),
            Question(two, (compare,), (portrait, grey)),
            Question(two, (_user(PICTURE, PICTURE, "What?"),), (portrait, grey)),
        ),
        (
            Question(text, (_user("How many objects are there in a pair of shapes?"),), ()),
            Question(text, (_user("Hello"),), ()),
        ),
    )


def _user(*parts: str | GoldenPart) -> GoldenMessage:
    return GoldenMessage("user", tuple(GoldenPart(part) if isinstance(part, str) else part for part in parts))


def _assistant(text: str) -> GoldenMessage:
    return GoldenMessage("assistant", (GoldenPart(text),))
