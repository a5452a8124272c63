"""What a token is drawn from after temperature, top-k and top-p, and the draw.

:func:`distribution` says what is meant, in float64 over the whole vocabulary; :class:`Drawer` draws from it in a fifth
of the time. All but some tens of the 32,000 to 260,000 tokens are next to impossible, so float32 weights of all, in
arrays made once, say where to look, and what is left is computed in float64. Where float32 leaves a doubt, everything
is: the token drawn is the same, always.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llava_deploy.runtime.sampling import SamplingOptions

_GROUP = 128
"""Neighbours whose weights are added up in float32."""

_DOUBT = 8e-6
"""Shares of the whole that float32 weights do not tell apart.

A weight is off by 1.8e-7 of its exponent (three roundings) and by 3e-7 (the function itself), a sum of 128 by 1.1e-6.
The exponents' mean is at most the logarithm of the vocabulary's size, 12.5. So a part of the whole is off by less than
4e-6 of the whole, and the whole by as much.
"""

_CANDIDATES = 256
"""Top-p looks first at tokens that hold a 256th of what may go: all others together are hardly ever more than that."""

_ROWS = 64
"""Scores whose maximum is taken together in the search for the k greatest."""

_TEMPERATURES = (1e-3, 1e3)
"""Outside, float32 has no room for the exponents."""


class Drawer:
    """Draws tokens of one vocabulary.

    Args:
        options: temperature above 0.
        vocab: tokens.
    """

    def __init__(self, options: SamplingOptions, vocab: int) -> None:
        self._options = options
        self._padded = np.zeros(-(-vocab // _GROUP) * _GROUP, np.float32)
        self._weights = self._padded[:vocab]
        self._chosen = np.empty(vocab, bool)

    def draw(self, scores: np.ndarray, random: float) -> int:
        """The token of :func:`distribution` whose share, in the order of its ids, ``random`` falls in.

        Args:
            scores: float32 [vocab], greatest value finite.
            random: from 0 up to, not including, 1.
        """
        options, found = self._options, None
        top_p = _limiting_p(options)
        if _limiting_k(options, len(scores)) is None and _TEMPERATURES[0] <= options.temperature <= _TEMPERATURES[1]:
            sums = self._group_sums(scores)
            if top_p is None:
                token = self._among_all(sums, random)
                if token is not None:
                    return token
            else:
                found = self._nucleus(scores, float(sums.sum(dtype=np.float64)), top_p)
        ids, weights = _kept(scores, options) if found is None else found
        reached = (weights / weights.sum()).cumsum()
        at = reached.searchsorted(random * reached[-1], side="right")
        return int(ids[min(int(at), len(ids) - 1)])

    def _group_sums(self, scores: np.ndarray) -> np.ndarray:
        """Set the float32 weights of all tokens; float32 sums of each group of them."""
        weights = self._weights
        with np.errstate(over="ignore"):
            np.subtract(scores, scores.max(), out=weights)
            np.divide(weights, np.float32(self._options.temperature), out=weights)
        np.exp(weights, out=weights)
        sums: np.ndarray = self._padded.reshape(-1, _GROUP).sum(axis=1)
        return sums

    def _among_all(self, sums: np.ndarray, random: float) -> int | None:
        reached = sums.cumsum(dtype=np.float64)
        target, doubt = random * reached[-1], _DOUBT * reached[-1]
        group = min(int(reached.searchsorted(target, side="right")), len(sums) - 1)
        before = reached[group - 1] if group else 0.0
        inside = before + self._padded[group * _GROUP : (group + 1) * _GROUP].cumsum(dtype=np.float64)
        at = int(inside.searchsorted(target, side="right"))
        if at == _GROUP or inside[at] - target < doubt or target - (inside[at - 1] if at else before) < doubt:
            return None
        return group * _GROUP + at

    def _nucleus(self, scores: np.ndarray, total: float, top_p: float) -> tuple[np.ndarray, np.ndarray] | None:
        """What :func:`_kept` gives, where only top-p takes tokens away; ``None`` where that is in doubt."""
        spare = total * (1 - top_p)
        doubt = _DOUBT * total
        for part in (_CANDIDATES, len(scores)):  # what holds less than an even share of what may go, goes
            bound = spare / part
            np.greater_equal(self._weights, np.float32(bound), out=self._chosen)
            ids = np.flatnonzero(self._chosen)
            weights = _weights(scores[ids], float(scores.max()), self._options.temperature)
            gone = total - float(weights.sum())
            if gone > spare - doubt:
                continue
            order = np.argsort(weights, kind="stable")
            left = gone + weights[order].cumsum()
            at = int(left.searchsorted(spare, side="right"))
            if at == len(left) or left[at] - spare < doubt or spare - (left[at - 1] if at else gone) < doubt:
                return None
            stay = order[at:]
            return (ids[stay], weights[stay]) if weights[order[at]] > bound * (1 + 1e-5) else None
        return None


def distribution(scores: np.ndarray, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """What a token is drawn from, after temperature, top-k and top-p (not the repetition penalty).

    Args:
        scores: float32 [vocab], greatest value finite.
        options: temperature above 0.

    Returns:
        ids int64 [kept] and their probabilities float64 [kept], which sum to 1.
    """
    ids, weights = _kept(scores, options)
    return ids, weights / weights.sum()


def _kept(scores: np.ndarray, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights of :func:`distribution`; 1 is the weight of the most likely token."""
    top_k, top_p = _limiting_k(options, len(scores)), _limiting_p(options)
    ids = np.arange(len(scores)) if top_k is None else _top_k(scores, top_k)
    kept = scores if top_k is None else scores[ids]
    weights = _weights(kept, float(kept.max()), options.temperature)
    if top_p is not None:
        chosen = _top_p(weights, top_p)
        ids, weights = ids[chosen], weights[chosen]
    return ids, weights


def _limiting_k(options: SamplingOptions, vocab: int) -> int | None:
    """Top-k, where it takes tokens away."""
    return options.top_k if options.top_k is not None and options.top_k < vocab else None


def _limiting_p(options: SamplingOptions) -> float | None:
    """Top-p, likewise."""
    return options.top_p if options.top_p is not None and options.top_p < 1 else None


def _weights(scores: np.ndarray, greatest: float, temperature: float) -> np.ndarray:
    with np.errstate(over="ignore"):  # next to no temperature makes a gap infinite, and its weight 0
        weights: np.ndarray = np.exp((scores.astype(np.float64) - greatest) / temperature)
    return weights


def _top_k(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Ids of the ``top_k`` greatest scores, and of any as great as the least of them."""
    ids, columns = None, len(scores) // _ROWS
    if top_k <= columns:
        # Of so many scores' maxima, the k-th greatest is no greater than the k-th greatest score.
        maxima = scores[: _ROWS * columns].reshape(_ROWS, columns).max(axis=0)
        ids = np.flatnonzero(scores >= np.partition(maxima, -top_k)[-top_k])
    kept = scores if ids is None else scores[ids]
    greatest = np.flatnonzero(kept >= np.partition(kept, -top_k)[-top_k])
    return greatest if ids is None else ids[greatest]


def _top_p(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Positions that are left when the least likely, up to 1 - top_p of the whole, are taken away; one at least."""
    spare = weights.sum() * (1 - top_p)
    # Weights below their even share of what may go all go, whatever their order: the sort sees only the others.
    others = np.flatnonzero(weights >= spare / len(weights) * (1 - 1e-9))
    gone = weights.sum() - weights[others].sum()
    ascending = others[np.argsort(weights[others], kind="stable")]
    stay = gone + weights[ascending].cumsum() > spare
    stay[-1] = True
    left: np.ndarray = ascending[stay]
    return left
