"""Choosing the next token from logits: greedy, or drawn after repetition penalty, temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.errors import BackendError, ContractError, OptionError


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, in transformers' meaning and order.

    Attributes:
        temperature: 0 takes the most likely token, and ``top_k``, ``top_p`` and ``seed`` have no effect.
        top_k: draw from the ``top_k`` most likely tokens (and any as likely as the last of them); ``None`` from all.
        top_p: draw from the fewest most likely tokens whose probabilities reach ``top_p``; ``None`` from all.
        repetition_penalty: divides the logit of every token seen before, multiplies it where it is negative
            (https://huggingface.co/papers/1909.05858), in the prompt or the answer, and of the placeholder if there was
            a picture; 1 changes nothing.
        seed: two runs with one seed draw the same; ``None`` draws anew each time.

    Raises:
        OptionError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise OptionError("temperature", f"want a number, 0 (greedy) or more, got {self.temperature!r}")
        if self.top_k is not None and not (type(self.top_k) is int and self.top_k >= 1):
            raise OptionError("top_k", f"want a whole number, 1 or more, got {self.top_k!r}; leave it out for no limit")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise OptionError("top_p", f"want a number above 0, up to 1, got {self.top_p!r}; leave it out for no limit")
        if not (_is_number(self.repetition_penalty) and 1e-6 <= self.repetition_penalty <= 1e6):
            reason = f"want a number from 1e-6 to 1e6 (1 is none), got {self.repetition_penalty!r}"
            raise OptionError("repetition_penalty", reason)
        if self.seed is not None and not (type(self.seed) is int and self.seed >= 0):
            reason = f"want a whole number, 0 or more, got {self.seed!r}; leave it out for another draw each time"
            raise OptionError("seed", reason)


GREEDY = SamplingOptions()


class Sampler:
    """Chooses for the rows of one batch.

    Each row draws from a generator of its own, all with the same seed: what a row draws does not depend on the rows
    beside it, and equal rows draw equally.
    """

    def __init__(self, options: SamplingOptions, rows: int) -> None:
        self._options = options
        self._generators = [np.random.default_rng(options.seed) for _ in range(rows)]

    def choose(self, logits: np.ndarray, history: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """The next token of each row.

        Args:
            logits: float32 [batch, vocab]; not changed.
            history: the token ids before, of each row; ids that are not in the vocabulary count for nothing. Read
                only where there is a repetition penalty.

        Returns:
            int64 [batch]; of equally likely tokens, greedy takes the one with the lowest id.

        Raises:
            BackendError: a row's logits hold a NaN, or no finite greatest value.
            ContractError: another number of rows than the sampler was made for.
        """
        rows = len(self._generators)
        if logits.ndim != 2 or len(logits) != rows or len(history) != rows:
            found = f"{list(logits.shape)} and {len(history)}"
            raise ContractError(f"sampler: want logits [{rows}, vocab] and {rows} histories, got {found}")
        best: np.ndarray = logits.argmax(axis=1)  # [batch]; the first NaN, where there is one
        greatest = logits[np.arange(rows), best]
        if not np.isfinite(greatest).all():
            row = int(np.flatnonzero(~np.isfinite(greatest))[0])
            raise BackendError(
                f"logits of row {row}: want finite values, found {greatest[row]} at token {best[row]}; the model's "
                "values overflowed or a weight is damaged: try the fp32 export, and llava-deploy verify"
            )
        if self._options.repetition_penalty == 1 and self._options.temperature == 0:
            return best
        for row in range(rows):
            scores = self._penalised(logits[row], history[row])
            best[row] = scores.argmax() if self._options.temperature == 0 else self._draw(scores, row)
        return best

    def _penalised(self, scores: np.ndarray, history: Sequence[int] | np.ndarray) -> np.ndarray:
        penalty = np.float32(self._options.repetition_penalty)
        if penalty == 1:
            return scores
        seen = np.asarray(history, np.int64)
        seen = seen[(seen >= 0) & (seen < len(scores))]
        before, scores = scores[seen], scores.copy()
        scores[seen] = np.where(before < 0, before * penalty, before / penalty)
        return scores

    def _draw(self, scores: np.ndarray, row: int) -> int:
        ids, probabilities = distribution(scores, self._options)
        reached = probabilities.cumsum()
        at = reached.searchsorted(self._generators[row].random() * reached[-1], side="right")
        return int(ids[min(int(at), len(ids) - 1)])


def distribution(scores: np.ndarray, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """What a token is drawn from, after temperature, top-k and top-p (not the repetition penalty).

    Args:
        scores: float32 [vocab], greatest value finite.
        options: temperature above 0.

    Returns:
        ids int64 [kept] and their probabilities float64 [kept], which sum to 1.
    """
    ids = np.arange(len(scores))
    if options.top_k is not None and options.top_k < len(scores):
        least = np.partition(scores, -options.top_k)[-options.top_k]
        ids = np.flatnonzero(scores >= least)
    kept = scores[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # next to no temperature makes a gap infinite, and its weight 0
        weights = np.exp((kept - kept.max()) / options.temperature)
    if options.top_p is not None and options.top_p < 1:
        chosen = _top_p(weights, options.top_p)
        ids, weights = ids[chosen], weights[chosen]
    return ids, weights / weights.sum()


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
