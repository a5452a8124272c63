"""How answers are scored, and what of the shipped model: it needs the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.manifest import Manifest, read_manifest
from llava_deploy.exporter.demo.questions import chances, drawn_questions
from llava_deploy.runtime import Llava
from llava_deploy.runtime.evaluation import EvalOptions, Outcome, Question, Shown, evaluate, normalise, read_questions


class Oracle:
    """Answers with the size and the corner's colour of each picture, in place of a model."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.batches: list[int] = []

    def generate(self, prompts: Sequence[str], images: Sequence[Sequence[Any]], *, max_new_tokens: int) -> list[Any]:
        assert max_new_tokens == 5
        self.batches.append(len(prompts))
        return [SimpleNamespace(text=f" {row[0].size} {row[0].getpixel((0, 0))}") for row in images]


@pytest.fixture
def oracle(demo_bundle: Path) -> Any:
    return Oracle(read_manifest(demo_bundle))


def questions(*answers: str) -> list[Question]:
    picture = Image.new("RGB", (5, 3), (1, 2, 3))
    return [Question(picture, "What?", answer, f"kind {index % 2}") for index, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("A  circle.", "a circle"), ("\nOn the LEFT .", "On the left"), ("ﬁve", "Five."), ("  ", ""), ("3.5.", "3.5")],
)
def test_normalised_equal(said: str, wanted: str) -> None:
    assert normalise(said) == normalise(wanted)


@pytest.mark.parametrize(("said", "wanted"), [("A circle, I think.", "A circle."), ("circle", "a circle"), ("", "no")])
def test_normalised_different(said: str, wanted: str) -> None:
    assert normalise(said) != normalise(wanted)


def test_scores_by_kind_and_in_all(oracle: Any) -> None:
    seen: list[Outcome] = []
    right = "(5, 3) (1, 2, 3)"
    options = EvalOptions(batch=2, max_new_tokens=5)
    report = evaluate(oracle, questions(right, "no", right, right, "no"), options, seen.append)
    assert oracle.batches == [2, 2, 1]
    assert [outcome.number for outcome in seen] == [1, 2, 3, 4, 5]
    assert [outcome.right for outcome in seen] == [True, False, True, True, False]
    assert {kind: (score.asked, score.right) for kind, score in report.kinds.items()} == {
        "kind 0": (3, 2),
        "kind 1": (2, 1),
    }
    assert report.total.accuracy == 0.6
    value = report.to_dict()
    assert [wrong["number"] for wrong in value["wrong"]] == [2, 5]
    assert json.loads(json.dumps(value)) == value


def test_a_blank_picture_has_the_size_and_the_mean(oracle: Any) -> None:
    mean = tuple(round(255 * value) for value in oracle.manifest.image.mean)
    report = evaluate(oracle, questions("x"), EvalOptions(shown=Shown.BLANK, max_new_tokens=5))
    assert report.outcomes[0].said == f"(5, 3) {mean}"


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(InputError, match="batch: want 1 or more"):
        EvalOptions(batch=0)


def test_questions_of_a_file(tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (2, 2)).save(picture)
    data = tmp_path / "questions.jsonl"
    lines = [
        {"image": "pictures/a.png", "question": "What?", "answer": "This."},
        {"image": str(picture), "question": "Où?", "answer": "Là.", "kind": "place", "id": 7},
    ]
    data.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    assert read_questions(data) == [
        Question(picture, "What?", "This.", "all"),
        Question(picture, "Où?", "Là.", "place"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found none"),
        ("\n{", "line 2: not JSON"),
        ("[1]", r"line 1: want \{"),
        ('{"image": "a.png", "question": "What?"}', "found 'answer': None"),
        ('{"image": "a.png", "question": " ", "answer": "x"}', "found 'question': ' '"),
        ('{"image": "a.png", "question": "q", "answer": 3}', "found 'answer': 3"),
        ('{"image": "a.png", "question": "q", "answer": "x"}', r"want a picture at .*a\.png, found none"),
    ],
)
def test_a_file_that_is_not_questions(text: str, said: str, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_questions(data)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        read_questions(data)


def test_drawn_questions_are_balanced_and_the_same_again() -> None:
    first, again, other = drawn_questions(3, 0), drawn_questions(3, 0), drawn_questions(3, 1)
    texts = [[(q.text, q.answer, q.kind) for q in drawn] for drawn in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert {kind: [q.kind for q in first].count(kind) for kind in chances()} == dict.fromkeys(chances(), 3)


def test_the_shipped_model_is_right_and_needs_the_picture(demo_bundle: Path) -> None:
    llava = Llava.load(demo_bundle, threads=1)
    asked = drawn_questions(30, 0)
    seen = evaluate(llava, asked, EvalOptions(batch=20))
    assert {kind: score.accuracy for kind, score in seen.kinds.items() if score.accuracy < 0.9} == {}
    assert seen.total.accuracy >= 0.95
    blank = evaluate(llava, asked, EvalOptions(shown=Shown.BLANK, batch=20))
    chance = sum(chances().values()) / len(chances())
    # 150 guesses: a standard deviation is 3 %.
    assert abs(blank.total.accuracy - chance) < 0.12
