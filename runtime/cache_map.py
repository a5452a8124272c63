"""The slots that the runtime writes to, kept in a cache that can only be appended to.

The runtime says which slot a row's new tokens go to, and writes over slots that it has no use for any more. A growing
cache takes the new keys and values of all rows behind what it holds already, at one place for all. So between a row's
slots there are places that nothing looks at any more: the mask says which is which. From time to time the cache is
packed, so that it never gets longer than the slots there are.

Place 0 of the cache is never visible: a backend wants a past that is not empty, also before the first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.backend import step_positions

_NOWHERE = np.iinfo(np.int64).max
"""Slot of a place that no token may look at: greater than every position."""

_WASTE = 64
"""Places that may lie idle before a cache is packed for that alone; or a quarter of the cache, where that is more."""


@dataclass(frozen=True)
class Run:
    """Neighbouring places of one row that move together."""

    row: int
    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Packing:
    """How the places move; what no run fills may hold any numbers that are finite.

    Attributes:
        past_len: the cache's places before and after.
        runs: moves that are left to do, by row and target; none where nothing is kept.
    """

    past_len: tuple[int, int]
    runs: tuple[Run, ...]


class CacheMap:
    """Which place of a growing cache holds which slot of which row.

    A row's tokens are written without a gap: from slot ``write_indices[b]`` on, where all slots before it were written
    earlier. What the row held from that slot on is gone.

    Args:
        batch: rows.
        max_len: slots of each; the cache never has more than ``max_len`` places before a step, ``max_len + 1`` after.
    """

    def __init__(self, batch: int, max_len: int) -> None:
        self.batch = batch
        self.past_len = 1
        """Places of the cache, place 0 included."""
        self._max_len = max_len
        self._slots = np.full((batch, max_len + 1), _NOWHERE)  # [batch, places]

    def packing(self, write_indices: np.ndarray, seq: int) -> Packing | None:
        """What is to move before a step, if anything: because there is no room, or too much lies idle.

        Args:
            write_indices: int64 ``[batch]``, the slot of each row's first new token.
            seq: new tokens of each row.

        Raises:
            BackendError: a slot outside the cache, or one behind a gap.
        """
        self._check(write_indices, seq)
        packed = 1 + int(write_indices.max())
        idle = self.past_len - packed
        fits = self.past_len + seq <= self._max_len + 1 and idle <= max(_WASTE, self.past_len // 4)
        if not idle or (fits and packed > 1):  # where nothing is kept, packing costs nothing
            return None
        runs = [run for row in range(len(self._slots)) for run in self._runs(row, int(write_indices[row]))]
        return Packing((self.past_len, packed), tuple(runs))

    def packed(self, packing: Packing) -> None:
        """The places were moved."""
        slots = np.full_like(self._slots, _NOWHERE)
        for run in packing.runs:
            slots[run.row, run.target : run.target + run.count] = self._slots[
                run.row, run.source : run.source + run.count
            ]
        self._slots = slots
        self.past_len = packing.past_len[1]

    def mask(self, write_indices: np.ndarray, seq: int) -> np.ndarray:
        """Bool ``[batch, 1, seq, past_len + seq]``: what each new token of the next step sees."""
        positions = step_positions(write_indices, seq)
        old = self._slots[:, : self.past_len]
        old = np.where(old < write_indices[:, None], old, _NOWHERE)
        slots = np.concatenate([old, positions], axis=1)  # [batch, past_len + seq]
        return slots[:, None, None, :] <= positions[:, None, :, None]

    def written(self, write_indices: np.ndarray, seq: int) -> None:
        """The step was run, and the cache has grown by its tokens."""
        old = self._slots[:, : self.past_len]
        old[old >= write_indices[:, None]] = _NOWHERE
        self._slots[:, self.past_len : self.past_len + seq] = step_positions(write_indices, seq)
        self.past_len += seq

    def _runs(self, row: int, kept: int) -> Iterator[Run]:
        """Where the first ``kept`` slots of a row are; they go to the places from 1 on.

        They lie in their order, as what comes after a slot is gone when that is written again.
        """
        places = np.flatnonzero(self._slots[row, : self.past_len] < kept)
        target = 1
        for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
            if len(run):
                yield Run(row, int(run[0]), target, len(run))
                target += len(run)

    def _check(self, write_indices: np.ndarray, seq: int) -> None:
        if write_indices.min() < 0 or write_indices.max() + seq > self._max_len:
            wanted = f"{int(write_indices.min())} to {int(write_indices.max()) + seq - 1}"
            raise BackendError(
                f"the cache has slots 0 to {self._max_len - 1}, and {wanted} are to be written; this is a bug in "
                "llava-deploy"
            )
        known = (self._slots[:, : self.past_len] < write_indices[:, None]).sum(axis=1)
        if (known != write_indices).any():
            row = int(np.flatnonzero(known != write_indices)[0])
            raise BackendError(
                f"row {row} of the cache: want slots 0 to {int(write_indices[row]) - 1} written before the next, found "
                f"{int(known[row])} of them; this is a bug in llava-deploy"
            )
