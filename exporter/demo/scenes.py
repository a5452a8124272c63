"""Drawn pictures with questions that need them: what the shipped tiny LLaVA learns, and what it is measured on.

A scene is one to five objects in the cells of a 3 x 3 grid, each a shape in a colour, no colour twice.  What is said
about it (cell, shape and colour of every object) is its *layout*; jitter, sizes, turns and shades are drawn on top.

* **Never seen in training**: a layout belongs to one split, decided by its sha256, and `random_scene` hands out only
  layouts of the split it is asked for.  No held-out layout can occur in training, in any rendering.
* **Answers need the picture**: `examples` picks the answer first, every answer of a kind equally often, and then looks
  for a scene that fits.  Given a question's text every answer of its kind is equally likely, so
  `chance(kind)` is exact and whoever cannot see the picture does not beat it.

Pillow and the standard library only: a machine without torch measures a bundle with this module.  Random numbers come
from `random.Random`, so a seed gives the same scenes on every platform.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from PIL import Image

from llava_deploy.exporter.demo.drawing import Brush, Colour, paint

KINDS = ("shape", "colour", "count", "position", "relation")

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 90, 220),
    "yellow": (245, 215, 50),
    "purple": (140, 60, 190),
    "orange": (245, 130, 25),
}
MOST_OBJECTS = 5
# The model is taught these too; they are no KIND, since they have no fixed set of answers.
DESCRIBE = "What is in the picture?"
NAME_COLOURS = "Which colour is each shape?"

_NUMBERS = ("One.", "Two.", "Three.", "Four.", "Five.")
_PLACES = (
    "At the top left.",
    "At the top.",
    "At the top right.",
    "On the left.",
    "In the centre.",
    "On the right.",
    "At the bottom left.",
    "At the bottom.",
    "At the bottom right.",
)  # indexed by cell, row by row
_RELATIONS = ("To the left.", "To the right.", "Above.", "Below.")
_HELD_OUT_SHARE = 8  # one layout in this many is held out


class Split(str, Enum):
    """Which scenes: those the model may be trained on, or those it never sees in training."""

    TRAIN = "train"
    HELD_OUT = "held-out"


class Form(Enum):
    """The form of question of each kind, and every answer there is to it."""

    SHAPE = ("shape", tuple(f"A {shape}." for shape in SHAPES))
    COLOUR = ("colour", tuple(f"It is {colour}." for colour in COLOURS))
    COUNT = ("count", _NUMBERS)
    POSITION = ("position", _PLACES)
    RELATION = ("relation", _RELATIONS)

    @property
    def kind(self) -> str:
        """Its entry in KINDS."""
        return self.value[0]

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer, each as likely as any other in `examples`."""
        return self.value[1]


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene; `cell` counts the 3 x 3 grid row by row."""

    cell: int
    shape: str
    colour: str

    @property
    def name(self) -> str:
        """What a question calls it: no colour occurs twice in a scene, so this names one object."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A layout, ordered by cell, and the seed of everything else about its picture."""

    things: tuple[Thing, ...]
    look: int

    @property
    def split(self) -> Split:
        """Decided by the layout alone."""
        text = ";".join(f"{thing.cell},{thing.name}" for thing in self.things)
        held_out = hashlib.sha256(text.encode()).digest()[0] % _HELD_OUT_SHARE == 0
        return Split.HELD_OUT if held_out else Split.TRAIN

    def picture(self) -> Image.Image:
        """The scene as an RGB picture; the same scene gives the same picture."""
        look = random.Random(self.look)
        base = look.uniform(195, 245) if look.random() < 0.7 else look.uniform(25, 70)
        top = _nearby((base, base, base), 10, look)
        bottom = _nearby(top, 18, look)
        brushes = []
        for thing in self.things:
            radius = look.uniform(0.095, 0.14)
            row, column = divmod(thing.cell, 3)
            centre = ((column + 0.5) / 3 + look.uniform(-0.04, 0.04), (row + 0.5) / 3 + look.uniform(-0.04, 0.04))
            colour = _nearby(COLOURS[thing.colour], 12, look)
            brushes.append(Brush(thing.shape, colour, centre, radius, look.uniform(-14, 14)))
        return paint(top, bottom, tuple(brushes))


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one right answer.

    `about` holds, in order, the objects that the text names, each with the word that completes its name.
    """

    form: Form
    text: str
    answer: str
    about: tuple[tuple[str, Thing], ...]


@dataclass(frozen=True)
class Example:
    """A picture, a question, its answer, and the kind of question (one of KINDS)."""

    picture: Image.Image
    question: str
    answer: str
    kind: str
    scene: Scene


def _nearby(colour: tuple[float, float, float], spread: float, rng: random.Random) -> Colour:
    red, green, blue = (min(255, max(0, round(value + rng.uniform(-spread, spread)))) for value in colour)
    return red, green, blue


def random_scene(split: Split, rng: random.Random) -> Scene:
    """A random scene of `split`: one to five objects."""
    while True:
        cells = sorted(rng.sample(range(9), rng.randint(1, MOST_OBJECTS)))
        colours = rng.sample(tuple(COLOURS), len(cells))
        things = tuple(Thing(cell, rng.choice(SHAPES), colour) for cell, colour in zip(cells, colours, strict=True))
        scene = Scene(things, rng.getrandbits(48))
        if scene.split is split:
            return scene


def _relation(of: Thing, to: Thing) -> str | None:
    """None where two objects share neither row nor column: then the answer would be a matter of opinion."""
    (row, column), (other_row, other_column) = divmod(of.cell, 3), divmod(to.cell, 3)
    if row == other_row:
        return "To the left." if column < other_column else "To the right."
    if column == other_column:
        return "Above." if row < other_row else "Below."
    return None


def questions(scene: Scene, form: Form) -> list[Question]:
    """Every question of `form` that has exactly one right answer in `scene`."""
    things = scene.things
    shapes = [thing.shape for thing in things]
    if form is Form.SHAPE:
        return [
            Question(form, f"What shape is the {t.colour} object?", f"A {t.shape}.", (("object", t),)) for t in things
        ]
    if form is Form.COLOUR:
        lone = [thing for thing in things if shapes.count(thing.shape) == 1]
        return [Question(form, f"What colour is the {t.shape}?", f"It is {t.colour}.", ((t.shape, t),)) for t in lone]
    if form is Form.COUNT:
        return [Question(form, "How many objects are there?", _NUMBERS[len(things) - 1], ())]
    if form is Form.POSITION:
        return [Question(form, f"Where is the {t.name}?", _PLACES[t.cell], ((t.shape, t),)) for t in things]
    pairs = [(of, to, _relation(of, to)) for of in things for to in things if of is not to]
    return [
        Question(
            form,
            f"Where is the {of.name} relative to the {to.name}?",
            answer,
            ((of.shape, of), (to.shape, to)),
        )
        for of, to, answer in pairs
        if answer is not None
    ]


def describe(scene: Scene) -> str:
    """The answer to DESCRIBE: every object and its place, in reading order."""
    names = [
        f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.name} {_PLACES[thing.cell].rstrip('.').lower()}"
        for thing in scene.things
    ]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{text[0].upper()}{text[1:]}."


def name_colours(scene: Scene) -> str:
    """The answer to NAME_COLOURS: every shape that occurs once, followed at once by its colour."""
    shapes = [thing.shape for thing in scene.things]
    ordered = sorted(scene.things, key=lambda thing: SHAPES.index(thing.shape))
    text = ", ".join(f"a {thing.shape} {thing.colour}" for thing in ordered if shapes.count(thing.shape) == 1)
    return f"{text[0].upper()}{text[1:]}." if text else "I see no shape once."


def asked(split: Split, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[Scene, Question]]:
    """Endless scenes with a question each, the kinds in turn; `examples` without the drawing.

    Within a kind every answer comes equally often, in an order shuffled anew each round, so answers are balanced given
    the question.  The same arguments give the same questions.
    """
    rng = random.Random(f"{split.value}/{seed}")
    forms = [form for kind in kinds for form in Form if form.kind == kind]
    answers = {form: _shuffled_forever(form.answers, rng) for form in forms}
    while True:
        for form in forms:
            answer = next(answers[form])
            found: list[Question] = []
            while not found:
                scene = random_scene(split, rng)
                found = [question for question in questions(scene, form) if question.answer == answer]
            yield scene, rng.choice(found)


def examples(split: Split, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Iterator[Example]:
    """Endless examples, the kinds in turn and the answers balanced as `asked` says, the pictures drawn."""
    for scene, question in asked(split, seed, kinds):
        yield Example(scene.picture(), question.text, question.answer, question.form.kind, scene)


def _shuffled_forever(items: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    order = list(items)
    while True:
        rng.shuffle(order)
        yield from order


def chance(kind: str) -> float:
    """The share of right answers that guessing without the picture gives for `kind` in `examples`."""
    (form,) = (form for form in Form if form.kind == kind)
    return 1 / len(form.answers)


def checkpoint_dir() -> Path:
    """The directory of the shipped checkpoint, in llava-hf layout."""
    return Path(__file__).parent / "checkpoint"
