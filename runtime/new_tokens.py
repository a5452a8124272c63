"""What the decoder is to read of a batch of prompts: embeddings, and the pictures' features that stay on the device.

Where features go is the splice's to say. For features on the device it runs a second time, over the numbers of their
rows instead of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_deploy.engines.errors import PromptError
from llava_deploy.runtime.backend import DeviceFeatures, ImageFeatures, Placement
from llava_deploy.runtime.splice import SpliceOptions, splice


@dataclass(frozen=True)
class NewTokens:
    """Tokens that the cache does not hold yet.

    Attributes:
        inputs_embeds: ``[batch, seq, hidden]`` in the decoder's dtype, rows padded right, zeros where features go that
            are on the device.
        pictures: those features.
        start: slot of the first token of every row: what is before it is in the cache.
        lengths: int64 ``[batch]``, each row's own tokens of ``seq``, 1 at least.
    """

    inputs_embeds: np.ndarray
    pictures: tuple[Placement, ...]
    start: int
    lengths: np.ndarray

    def after(self, count: int) -> NewTokens:
        """Without the first tokens of every row, which are in the cache."""
        embeds, pictures = self.part(count, self.inputs_embeds.shape[1])
        return NewTokens(embeds, pictures, self.start + count, self.lengths - count)

    def part(self, first: int, stop: int) -> tuple[np.ndarray, tuple[Placement, ...]]:
        """Embeddings ``[batch, stop - first, hidden]`` of some of ``seq``, and what goes between them."""
        cut = []
        for one in self.pictures:
            begin, end = max(one.at, first), min(one.at + one.count, stop)
            if begin < end:
                cut.append(replace(one, at=begin - first, first=one.first + begin - one.at, count=end - begin))
        return self.inputs_embeds[:, first:stop], tuple(cut)

    def on_host(self) -> np.ndarray:
        """``inputs_embeds`` with the features in it; waits for the device where there are any."""
        return with_features(self.inputs_embeds, self.pictures)


class TokenEmbeddings:
    """Embeddings of one token a row, in an array that is filled anew at every step: a backend may bind it once.

    Args:
        table: ``[vocab, hidden]``.
        batch: rows.
    """

    def __init__(self, table: np.ndarray, batch: int) -> None:
        self._table = table
        self._ids = np.zeros(batch, np.intp)
        self._set_id = self._ids.data
        self._rows = np.zeros((batch, table.shape[1]), table.dtype)
        self._embeds = self._rows[:, None]

    def of(self, tokens: Sequence[int]) -> np.ndarray:
        """Ids, one a row, to ``[batch, 1, hidden]``; valid until the next call.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        require_in_vocabulary(tokens, len(self._table))
        for row, token in enumerate(tokens):
            self._set_id[row] = token
        # The ids are in bounds; checked again ("raise"), they would be gathered in a copy.
        self._table.take(self._ids, 0, self._rows, "clip")
        return self._embeds


def require_in_vocabulary(tokens: Sequence[int], vocab: int) -> None:
    """Refuse ids without an embedding.

    Raises:
        PromptError: an id outside the vocabulary.
    """
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
        wrong = next(token for token in tokens if not 0 <= token < vocab)
        raise PromptError(
            f"token id {wrong} is outside the vocabulary of {vocab}; the tokenizer and the model differ: "
            "export the bundle from a checkpoint whose tokenizer is its own"
        )


def with_features(inputs_embeds: np.ndarray, pictures: Sequence[Placement]) -> np.ndarray:
    """``inputs_embeds [batch, seq, hidden]``, in a copy with the features in their places where there are any."""
    if not pictures:
        return inputs_embeds
    embeds = inputs_embeds.copy()
    for one in pictures:
        embeds[one.row, one.at : one.at + one.count] = one.features.numpy()[one.first : one.first + one.count]
    return embeds


def splice_rows(
    ids: Sequence[np.ndarray],
    features: Sequence[Sequence[ImageFeatures]],
    patches: int,
    embed: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, tuple[Placement, ...]]:
    """Prompts with their pictures' features in the place of the placeholders.

    Args:
        ids: int64 ``[n]`` of each row, with a placeholder for each of its pictures.
        features: those of each row's pictures.
        patches: rows of a picture's features.
        embed: int64 ids ``[n]`` to embeddings ``[n, hidden]``.

    Returns:
        ``inputs_embeds [batch, seq, hidden]``, rows padded right, and what goes into it on the device.
    """
    nothing = embed(np.zeros(0, np.int64))  # [0, hidden]
    # In the splice, a row of text uses up one picture's place: give it one that is empty.
    runs: list[ImageFeatures] = [run for row in features for run in (row or [nothing])]
    unknown = np.broadcast_to(np.zeros_like(nothing, shape=(1, nothing.shape[1])), (patches, nothing.shape[1]))
    embeds = _splice(ids, [run if isinstance(run, np.ndarray) else unknown for run in runs], embed)
    on_device = {index: run for index, run in enumerate(runs) if not isinstance(run, np.ndarray)}
    if not on_device:
        return embeds, ()
    numbers = [
        np.zeros((len(run), 1), np.int64)
        if isinstance(run, np.ndarray)
        else 1 + index * patches + np.arange(patches, dtype=np.int64)[:, None]
        for index, run in enumerate(runs)
    ]
    spliced = _splice(ids, numbers, lambda text: np.zeros((len(text), 1), np.int64))
    return embeds, tuple(_placements(spliced[..., 0], on_device, patches))


def _splice(
    ids: Sequence[np.ndarray], runs: Sequence[np.ndarray], embed: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    longest = max(map(len, ids))
    batch = np.zeros((len(ids), longest), np.int64)
    mask = np.zeros((len(ids), longest), bool)
    for index, row in enumerate(ids):
        batch[index, : len(row)] = row
        mask[index, : len(row)] = True
    return splice(batch, None, mask, None, runs, embed=embed, options=SpliceOptions()).inputs_embeds


def _placements(numbers: np.ndarray, on_device: Mapping[int, DeviceFeatures], patches: int) -> Iterator[Placement]:
    """Read the numbers ``[batch, seq]``: 0, or 1 + the number of a row, as if every run had ``patches`` rows."""
    for row, line in enumerate(numbers):
        places = np.flatnonzero(line)
        pictures, firsts = np.divmod(line[places] - 1, patches)
        for index in np.unique(pictures).tolist():
            mine = np.flatnonzero(pictures == index)  # a picture's rows lie together
            yield Placement(row, int(places[mine[0]]), on_device[index], int(firsts[mine[0]]), len(mine))
