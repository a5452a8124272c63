"""Choosing the next token from logits: greedy, or drawn after repetition penalty, temperature, top-k and top-p."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.errors import BackendError, ContractError, OptionError
from llava_deploy.runtime.drawing import Drawer


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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
    """Chooses for the rows of one batch, and remembers what it chose.

    Each row draws from a generator of its own, all with the same seed: what a row draws does not depend on the rows
    beside it, and equal rows draw equally.

    Args:
        options: how.
        seen: for each row, the token ids before the first that is chosen; ids that are not in the vocabulary count for
            nothing. Read only where there is a repetition penalty.
    """

    def __init__(self, options: SamplingOptions, seen: Sequence[Sequence[int] | np.ndarray]) -> None:
        self._options = options
        self._prompts = seen
        self._greedy = options.repetition_penalty == 1 and options.temperature == 0
        self._shape: tuple[int, int] | None = None
        """Of all logits, which the first ones tell."""
        self._logits: np.ndarray | None = None
        """The last ones, which are looked at through the view: a decoder fills the same array at every step."""
        self._view = memoryview(b"")
        self._greatest = np.empty(len(seen), np.intp)
        self._chosen = self._greatest.data

    def choose(self, logits: np.ndarray) -> list[int]:
        """The next token of each row.

        Args:
            logits: float32 [batch, vocab]; not changed.

        Returns:
            One a row; of equally likely tokens, greedy takes the one with the lowest id.

        Raises:
            BackendError: a row's logits hold a NaN, or no finite greatest value.
            ContractError: another number of rows than the sampler was made for, or of tokens than at first.
        """
        # Behind a decode step each function of NumPy takes 5 to 20 µs, whatever it computes: argmax alone is one of it.
        if logits is not self._logits:
            self._take_up(logits)
        logits.argmax(1, self._greatest)  # the first NaN, where there is one
        chosen: list[int] = self._chosen.tolist()
        for row, token in enumerate(chosen):
            if not -math.inf < self._view[row, token] < math.inf:
                raise BackendError(
                    f"logits of row {row}: want finite values, found {logits[row, token]} at token {token}; the "
                    "model's values overflowed or a weight is damaged: try the fp32 export, and llava-deploy verify"
                )
        if self._greedy:
            return chosen
        return [self._draw(logits[row], row) for row in range(len(chosen))]

    def _take_up(self, logits: np.ndarray) -> None:
        """Look at another array than before; errors as :meth:`choose` has them."""
        rows = len(self._prompts)
        if self._shape is None and logits.ndim == 2:
            self._shape = (rows, logits.shape[1])
            self._prepare(logits.shape[1])
        if logits.shape != self._shape:
            want = f"[{rows}, {'vocab' if self._shape is None else self._shape[1]}]"
            raise ContractError(f"sampler: want logits {want}, got {list(logits.shape)}")
        self._logits, self._view = logits, logits.data

    def _prepare(self, vocab: int) -> None:
        if self._options.repetition_penalty != 1:
            self._seen = [_Seen(ids, vocab) for ids in self._prompts]
            self._penalised = np.empty(vocab, np.float32)
        if self._options.temperature != 0:
            self._drawer = Drawer(self._options, vocab)
            self._generators = [np.random.default_rng(self._options.seed) for _ in self._prompts]

    def _draw(self, scores: np.ndarray, row: int) -> int:
        penalty = self._options.repetition_penalty
        if penalty != 1:
            np.copyto(self._penalised, scores)
            scores = self._penalised
            penalise(scores, self._seen[row].ids, penalty)
        if self._options.temperature == 0:
            token = int(scores.argmax())
        else:
            token = self._drawer.draw(scores, self._generators[row].random())
        if penalty != 1:
            self._seen[row].add(token)
        return token


def penalise(scores: np.ndarray, ids: np.ndarray, penalty: float) -> None:
    """Apply a repetition penalty to the scores, float32 [vocab], of some tokens, each given once."""
    factor, before = np.float32(penalty), scores[ids]
    scores[ids] = np.where(before < 0, before * factor, before / factor)


class _Seen:
    """The tokens that a row has had, each once."""

    def __init__(self, ids: Sequence[int] | np.ndarray, vocab: int) -> None:
        seen = np.unique(np.asarray(ids, np.int64))
        seen = seen[(seen >= 0) & (seen < vocab)]
        self._known = set(seen.tolist())
        self._ids = np.concatenate([seen, np.zeros(256, np.int64)])

    @property
    def ids(self) -> np.ndarray:
        """int64 [seen]; valid until the next is added."""
        return self._ids[: len(self._known)]

    def add(self, token: int) -> None:
        """One more."""
        if token in self._known:
            return
        if len(self._known) == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[len(self._known)] = token
        self._known.add(token)
