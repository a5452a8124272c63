"""Features that stay on the device go where the splice puts them, whole or in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import PromptError
from llava_deploy.runtime.backend import Placement
from llava_deploy.runtime.generation import prefill
from llava_deploy.runtime.new_tokens import NewTokens, TokenEmbeddings, splice_rows, with_features

PATCHES, HIDDEN, VOCAB = 3, 4, 11
TABLE = np.random.default_rng(0).standard_normal((VOCAB, HIDDEN)).astype(np.float16)


@dataclass(frozen=True)
class OnDevice:
    """Features that only :meth:`numpy` shows."""

    values: np.ndarray

    def numpy(self) -> np.ndarray:
        return self.values.copy()


def embed(ids: np.ndarray) -> np.ndarray:
    return TABLE[ids]


def features(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((PATCHES, HIDDEN)).astype(np.float16)


@dataclass(frozen=True)
class Case:
    """Rows of ids, and the pictures of each: as arrays, and with some of them on the device."""

    ids: list[np.ndarray]
    arrays: list[list[np.ndarray]]
    mixed: list[list[np.ndarray | OnDevice]]

    def tokens(self) -> NewTokens:
        lengths = [len(ids) + (PATCHES - 1) * len(row) for ids, row in zip(self.ids, self.arrays, strict=True)]
        return NewTokens(*splice_rows(self.ids, self.mixed, PATCHES, embed), 0, np.array(lengths))

    def want(self) -> np.ndarray:
        return splice_rows(self.ids, self.arrays, PATCHES, embed)[0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = st.one_of(st.integers(0, VOCAB - 1), st.just(IMAGE_TOKEN_INDEX))
    ids = draw(st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    arrays = [[features(rng) for _ in range(row.count(IMAGE_TOKEN_INDEX))] for row in ids]
    mixed = [[OnDevice(one) if draw(st.booleans()) else one for one in row] for row in arrays]
    return Case([np.array(row) for row in ids], arrays, mixed)


@given(cases())
def test_on_the_device_is_where_the_splice_puts_them(case: Case) -> None:
    tokens, want = case.tokens(), case.want()
    np.testing.assert_array_equal(tokens.on_host(), want)
    assert tokens.inputs_embeds.dtype == want.dtype
    assert len(tokens.pictures) == sum(isinstance(one, OnDevice) for row in case.mixed for one in row)
    for one in tokens.pictures:
        assert not tokens.inputs_embeds[one.row, one.at : one.at + one.count].any()


@given(cases(), st.integers(0, 8), st.integers(1, 9))
def test_what_comes_after_some_tokens_and_parts_of_it(case: Case, known: int, size: int) -> None:
    tokens, want = case.tokens(), case.want()
    known = min(known, want.shape[1] - 1)
    rest = tokens.after(known)
    assert rest.start == known
    np.testing.assert_array_equal(rest.lengths, tokens.lengths - known)
    np.testing.assert_array_equal(rest.on_host(), want[:, known:])
    parts = [with_features(*rest.part(at, at + size)) for at in range(0, want.shape[1] - known, size)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), want[:, known:])


class Recorder:
    """A decoder that keeps what it is given; logits are each row's embedding at its last index."""

    max_len = 64

    def __init__(self, max_seq: int) -> None:
        self.max_seq = max_seq
        self.starts: list[list[int]] = []

    def begin(self, batch: int) -> None:
        """There is no cache."""

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: tuple[Placement, ...] = (),
    ) -> np.ndarray:
        assert inputs_embeds.shape[1] <= self.max_seq
        self.starts.append(write_indices.tolist())
        whole = with_features(inputs_embeds, pictures)
        return whole[np.arange(len(whole)), last_index].astype(np.float32)


@given(cases(), st.integers(1, 9))
def test_prefill_gives_each_piece_its_pictures(case: Case, max_seq: int) -> None:
    tokens, want = case.tokens(), case.want()
    decoder = Recorder(max_seq)
    logits = prefill(decoder, tokens)
    np.testing.assert_array_equal(logits, want[np.arange(len(want)), tokens.lengths - 1].astype(np.float32))
    assert decoder.starts == [[at] * len(want) for at in range(0, want.shape[1], max_seq)]


def test_one_picture_twice_is_two_placements() -> None:
    one = OnDevice(features(np.random.default_rng(1)))
    _, pictures = splice_rows([np.array([IMAGE_TOKEN_INDEX, 5, IMAGE_TOKEN_INDEX])], [[one, one]], PATCHES, embed)
    assert pictures == (Placement(0, 0, one, 0, PATCHES), Placement(0, PATCHES + 1, one, 0, PATCHES))


@pytest.mark.parametrize("count", [0, 2])
def test_embeddings_without_pictures_are_not_copied(count: int) -> None:
    embeds = np.zeros((1, 4, HIDDEN), np.float16)
    pictures = (Placement(0, 1, OnDevice(np.ones((PATCHES, HIDDEN), np.float16)), 1, count),) if count else ()
    assert (with_features(embeds, pictures) is embeds) == (count == 0)
    assert not embeds.any()


def test_chosen_tokens_are_looked_up_in_one_array() -> None:
    embeddings = TokenEmbeddings(TABLE, 3)
    first = embeddings.of([4, 0, VOCAB - 1])
    np.testing.assert_array_equal(first, TABLE[[4, 0, VOCAB - 1]][:, None])
    assert embeddings.of([7, 7, 1]) is first
    np.testing.assert_array_equal(first, TABLE[[7, 7, 1]][:, None])
    for wrong in (-1, VOCAB):
        with pytest.raises(PromptError, match=f"token id {wrong} is outside the vocabulary of {VOCAB}"):
            embeddings.of([1, wrong, 2])
