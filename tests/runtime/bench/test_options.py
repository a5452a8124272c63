"""What of the options fits, and which cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llava_deploy.engines.errors import OptionError
from llava_deploy.runtime.bench.options import QUICK, STANDARD, BenchOptions, Room, fitting

LLAVA = Room(max_len=4096, longest_prompt=4096, patches=576)


def test_all_of_the_standard_fits_a_llava() -> None:
    turns = fitting(STANDARD, LLAVA)
    assert (turns.prompt_tokens, turns.has_picture) == (616, True)
    assert (turns.contexts, turns.batches, turns.new_tokens) == ((64, 512, 2000), (1, 2, 4, 8), 64)
    assert turns.remarks == ()


def test_numbers_are_sorted_and_once() -> None:
    turns = fitting(replace(STANDARD, contexts=(512, 64, 512), batches=(4, 1, 4)), LLAVA)
    assert (turns.contexts, turns.batches) == ((64, 512), (1, 4))


@pytest.mark.parametrize("slots", [16, 17, 31, 43, 44, 45, 63, 64, 65, 100, 127, 128, 129, 1000])
def test_whatever_the_context_something_is_measured_and_fits(slots: int) -> None:
    turns = fitting(STANDARD, Room(slots, slots, 36))
    assert turns.contexts
    assert all(context + turns.new_tokens <= slots for context in turns.contexts)
    assert turns.prompt_tokens <= slots
    assert turns.has_picture == (slots >= 36 + 8)
    assert any("2000 tokens left out" in remark for remark in turns.remarks)
    assert turns.has_picture != any("text only" in remark for remark in turns.remarks)


def test_the_tokenizers_longest_prompt_counts_too() -> None:
    turns = fitting(QUICK, Room(4096, 100, 36))
    assert turns.contexts == (64,)
    assert turns.prompt_tokens == 76
    only = fitting(replace(QUICK, contexts=(512,)), Room(4096, 100, 36))
    assert only.contexts == (100,)
    assert only.remarks[-1] == "context of 100 tokens measured instead, the longest that fits"


def test_a_prompt_that_was_asked_for() -> None:
    assert fitting(replace(STANDARD, prompt_tokens=700), LLAVA).has_picture
    short = fitting(replace(STANDARD, prompt_tokens=100), LLAVA)
    assert (short.prompt_tokens, short.has_picture) == (100, False)
    assert short.remarks == ("text only: a picture takes 576 tokens, the prompt has 100",)
    with pytest.raises(OptionError, match="prompt_tokens: want 1 to 4096"):
        fitting(replace(STANDARD, prompt_tokens=5000), LLAVA)


@pytest.mark.parametrize("room", [Room(15, 15, 36), Room(4096, 15, 36)])
def test_too_little_context(room: Room) -> None:
    with pytest.raises(OptionError, match="max_len: want a context of 16 tokens or more to measure in, found 15"):
        fitting(STANDARD, room)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_tokens", 0),
        ("contexts", (64, 0)),
        ("contexts", ()),
        ("batches", (-1,)),
        ("batches", ()),
        ("new_tokens", 1),
        ("rounds", 0),
        ("rounds", 1 << 21),
    ],
)
def test_numbers_that_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        BenchOptions(**{**vars(STANDARD), name: value})
    assert caught.value.option == name
