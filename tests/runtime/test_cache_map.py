"""A cache that only grows, against one that is written in place: the same keys are seen, whatever is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime import cache_map
from llava_deploy.runtime.backend import step_mask
from llava_deploy.runtime.cache_map import CacheMap, Packing, Run

POISON = -1
Step = tuple[list[int], int]
"""Slots of the rows' first new tokens, and how many tokens are new."""


@dataclass
class Both:
    """One number, a new one each time, is written for every token into both caches."""

    batch: int
    max_len: int
    packings: int = 0
    longest: int = 0
    in_place: np.ndarray = field(init=False)
    growing: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.in_place = np.full((self.batch, self.max_len), POISON)
        self.growing = np.full((self.batch, 1), POISON)
        self.map = CacheMap(self.batch, self.max_len)
        self.count = 0

    def step(self, begin: list[int], seq: int) -> None:
        """Write new tokens and compare what each of them sees, in the order of the slots."""
        write = np.array(begin)
        if (packing := self.map.packing(write, seq)) is not None:
            self.pack(packing)
        mask = self.map.mask(write, seq)
        new = self.count + np.arange(self.batch * seq).reshape(self.batch, seq)
        self.count += self.batch * seq
        self.growing = np.concatenate([self.growing, new], axis=1)
        for row, at in enumerate(begin):
            self.in_place[row, at : at + seq] = new[row]
        want = step_mask(write, seq)
        assert mask.shape == (self.batch, 1, seq, self.growing.shape[1])
        assert not mask[..., 0].any()
        for row in range(self.batch):
            for token in range(seq):
                slots = np.flatnonzero(want[row, 0, token])
                seen = self.growing[row, mask[row, 0, token]]
                assert sorted(seen) == sorted(self.in_place[row, slots])
        self.map.written(write, seq)
        self.longest = max(self.longest, self.map.past_len)
        assert self.map.past_len == self.growing.shape[1] <= self.max_len + 1

    def pack(self, packing: Packing) -> None:
        before, after = packing.past_len
        assert before == self.growing.shape[1] > after
        moved = np.full((self.batch, after), POISON)
        for run in packing.runs:
            assert run.count > 0
            assert run.target > 0
            moved[run.row, run.target : run.target + run.count] = self.growing[
                run.row, run.source : run.source + run.count
            ]
        self.growing = moved
        self.map.packed(packing)
        self.packings += 1


@st.composite
def sessions(draw: st.DrawFn) -> tuple[int, int, list[Step]]:
    """Prompts of ragged rows in pieces, answers of different lengths, new prompts that keep a part of the old."""
    batch, max_len = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    known = [0] * batch  # slots of each row that were written without a gap
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, min(max_len - 1, *known))) if draw(st.booleans()) else 0
        lengths = [draw(st.integers(start + 1, max_len)) for _ in range(batch)]
        piece = draw(st.integers(1, 8))
        longest = max(lengths)
        steps += [([at] * batch, min(piece, longest - at)) for at in range(start, longest, piece)]
        known = lengths
        for _ in range(draw(st.integers(0, 12))):
            steps.append(([min(length, max_len - 1) for length in known], 1))
            known = [min(length + draw(st.integers(0, 1)), max_len) for length in known]
    return batch, max_len, steps


@settings(max_examples=150, deadline=None)
@given(sessions(), st.sampled_from([0, 3, 64]))
def test_the_same_keys_are_seen(session: tuple[int, int, list[Step]], waste: int) -> None:
    batch, max_len, steps = session
    both = Both(batch, max_len)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_map, "_WASTE", waste)
        for begin, seq in steps:
            both.step(begin, seq)


def test_a_long_row_that_has_ended_costs_its_neighbour_no_slot() -> None:
    """The short row goes on until its context is full; each step adds a place to both."""
    both = Both(2, 200)
    both.step([0, 0], 150)
    for length in range(10, 200):
        both.step([150, length], 1)
    assert both.longest == 201
    assert 1 <= both.packings <= 3


def test_nothing_moves_while_one_row_only_grows() -> None:
    both = Both(1, 300)
    both.step([0], 100)
    for length in range(100, 300):
        both.step([length], 1)
    assert both.packings == 0
    assert both.longest == 301


def test_a_new_prompt_begins_anew_and_moves_nothing() -> None:
    both = Both(2, 32)
    both.step([0, 0], 5)
    assert both.map.packing(np.array([0, 0]), 3) == Packing((6, 1), ())
    both.step([0, 0], 3)
    assert both.map.past_len == 4


def test_what_a_conversation_keeps_moves_only_when_much_lies_idle() -> None:
    kept = CacheMap(1, 1000)
    kept.written(np.array([0]), 300)
    assert kept.packing(np.array([250]), 10) is None
    assert kept.packing(np.array([100]), 10) == Packing((301, 101), (Run(0, 1, 1, 100),))


def test_runs_follow_the_slots() -> None:
    """The second row's slots lie in two places, between which its padding was."""
    ragged = CacheMap(2, 12)
    ragged.written(np.array([0, 0]), 8)
    for step in range(3):
        ragged.written(np.array([8 + step, 3 + step]), 1)
    packing = ragged.packing(np.array([9, 6]), 3)
    assert packing == Packing((12, 10), (Run(0, 1, 1, 9), Run(1, 1, 1, 3), Run(1, 9, 4, 3)))


def test_a_step_that_failed_leaves_the_map_as_it_was() -> None:
    tried = CacheMap(1, 16)
    tried.written(np.array([0]), 4)
    before = tried.mask(np.array([4]), 1)
    tried.packing(np.array([2]), 3)
    tried.mask(np.array([2]), 3)
    np.testing.assert_array_equal(tried.mask(np.array([4]), 1), before)


@pytest.mark.parametrize(
    ("begin", "seq", "message"),
    [
        ([14], 3, "slots 0 to 15, and 14 to 16 are to be written"),
        ([-1], 1, "-1 to -1 are to be written"),
        ([6], 1, "row 0 of the cache: want slots 0 to 5 written before the next, found 4 of them"),
    ],
)
def test_slots_that_cannot_be(begin: list[int], seq: int, message: str) -> None:
    short = CacheMap(1, 16)
    short.written(np.array([0]), 4)
    with pytest.raises(BackendError, match=message):
        short.packing(np.array(begin), seq)
