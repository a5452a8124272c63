"""The drawn scenes: the same every time, split for good, and no use to whoever cannot see."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import islice

import pytest

from llava_deploy.exporter.demo.scenes import (
    COLOURS,
    KINDS,
    MOST_OBJECTS,
    SHAPES,
    Form,
    Scene,
    Split,
    Thing,
    asked,
    chance,
    describe,
    examples,
    name_colours,
    questions,
    random_scene,
)


def test_the_same_seed_gives_the_same_examples() -> None:
    first, second = (list(islice(examples(Split.HELD_OUT, seed=3), 10)) for _ in range(2))
    assert [(e.question, e.answer, e.scene) for e in first] == [(e.question, e.answer, e.scene) for e in second]
    assert [e.picture.tobytes() for e in first] == [e.picture.tobytes() for e in second]


def test_another_seed_or_split_gives_other_examples() -> None:
    def scenes(split: Split, seed: int) -> list[Scene]:
        return [scene for scene, _ in islice(asked(split, seed), 20)]

    assert scenes(Split.HELD_OUT, 0) != scenes(Split.HELD_OUT, 1)
    assert not set(scenes(Split.HELD_OUT, 0)) & set(scenes(Split.TRAIN, 0))


def test_no_layout_is_in_both_splits() -> None:
    rng = random.Random(0)
    layouts = {split: {random_scene(split, rng).things for _ in range(4000)} for split in Split}
    assert not layouts[Split.TRAIN] & layouts[Split.HELD_OUT]
    assert all(Scene(things, look).split is split for split in Split for things in layouts[split] for look in (0, 1))


def test_the_held_out_split_has_every_number_of_objects() -> None:
    rng = random.Random(0)
    numbers = Counter(len(random_scene(Split.HELD_OUT, rng).things) for _ in range(1000))
    assert sorted(numbers) == list(range(1, MOST_OBJECTS + 1))


def test_kinds_come_in_turn_and_may_be_chosen() -> None:
    assert [question.form.kind for _, question in islice(asked(Split.TRAIN), 10)] == [*KINDS, *KINDS]
    assert {question.form.kind for _, question in islice(asked(Split.TRAIN, kinds=("count",)), 8)} == {"count"}


def test_every_answer_of_a_form_comes_equally_often() -> None:
    counts: dict[Form, Counter[str]] = defaultdict(Counter)
    for _, question in islice(asked(Split.HELD_OUT), 5 * 360):
        counts[question.form][question.answer] += 1
    assert set(counts) == set(Form)
    for form, answers in counts.items():
        assert set(answers) == set(form.answers)
        assert max(answers.values()) - min(answers.values()) <= 1


def test_a_blind_guesser_who_learnt_the_questions_by_heart_does_not_beat_chance() -> None:
    """It may be below: a layout of one object that training knows well is one that the held-out split lacks."""
    learnt: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in islice(asked(Split.TRAIN), 30_000):
        learnt[question.text][question.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for _, question in islice(asked(Split.HELD_OUT), 10_000):
        guess = learnt[question.text].most_common(1)
        right[question.form.kind].append(bool(guess) and guess[0][0] == question.answer)
    for kind in KINDS:
        assert sum(right[kind]) / len(right[kind]) <= chance(kind) + 0.04


def test_chance_is_one_over_the_number_of_answers() -> None:
    assert [chance(kind) for kind in KINDS] == pytest.approx([1 / 5, 1 / 6, 1 / 5, 1 / 9, 1 / 4])


def test_the_picture_shows_each_object_where_the_layout_says() -> None:
    rng = random.Random(1)
    for _ in range(30):
        scene = random_scene(Split.TRAIN, rng)
        picture = scene.picture()
        assert picture.mode == "RGB"
        step = picture.width / 3
        for thing in scene.things:
            row, column = divmod(thing.cell, 3)
            shown = picture.getpixel((int((column + 0.5) * step), int((row + 0.5) * step)))
            assert isinstance(shown, tuple)
            near = min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(shown, COLOURS[name], strict=True)))
            assert near == thing.colour


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_look_different(shape: str) -> None:
    def drawn(name: str) -> bytes:
        return Scene((Thing(4, name, "red"),), look=5).picture().tobytes()

    assert all(drawn(shape) != drawn(other) for other in SHAPES if other != shape)


def test_questions_about_a_known_scene() -> None:
    scene = Scene((Thing(0, "circle", "red"), Thing(2, "circle", "blue"), Thing(6, "star", "orange")), look=0)
    found = {question.text: question.answer for form in Form for question in questions(scene, form)}
    assert found["What shape is the orange object?"] == "A star."
    assert found["What colour is the star?"] == "It is orange."
    assert "What colour is the circle?" not in found  # there are two
    assert found["How many objects are there?"] == "Three."
    assert found["Where is the blue circle?"] == "At the top right."
    assert found["Where is the red circle relative to the blue circle?"] == "To the left."
    assert found["Where is the orange star relative to the red circle?"] == "Below."
    assert "Where is the orange star relative to the blue circle?" not in found  # neither row nor column shared
    assert describe(scene) == (
        "A red circle at the top left, a blue circle at the top right and an orange star at the bottom left."
    )
    assert name_colours(scene) == "A star orange."


def test_a_question_says_which_objects_it_is_about() -> None:
    rng = random.Random(3)
    for _ in range(50):
        scene = random_scene(Split.TRAIN, rng)
        for question in (question for form in Form for question in questions(scene, form)):
            words = question.text.rstrip("?").split()
            for word, thing in question.about:
                at = words.index(word)
                assert {thing.shape, thing.colour} & set(words[at - 1 : at + 1])
                words = words[at + 1 :]
            assert len(question.about) == {"count": 0, "relation": 2}.get(question.form.kind, 1)


def test_scenes_need_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, onnx=None, numpy=None)\n"
        "from llava_deploy.exporter.demo.scenes import Split, examples\n"
        "print(next(examples(Split.HELD_OUT)).answer)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
