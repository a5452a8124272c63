"""How near a bundle stays to another one, token by token, along the other one's greedy answers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llava_deploy.engines.errors import BackendError, LlavaDeployError
from llava_deploy.runtime.evaluation import AskedBatch
from llava_deploy.runtime.llava import Llava

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Agreement:
    """Two bundles compared after each prefix of the first one's greedy answers (teacher forcing).

    Attributes:
        tokens: prefixes compared, the empty one of each answer included and the whole answer not: as many as the
            answers have tokens, the one that ends an answer included. A prompt's own positions do not count.
        agreeing: after how many of them both would choose the same token.
        mean_kl: mean over them of KL(first || second) of the next-token distributions, in nats; 0 where there are none.
    """

    tokens: int
    agreeing: int
    mean_kl: float

    @property
    def share(self) -> float:
        """Share of agreeing tokens; 1 where there are none."""
        return self.agreeing / self.tokens if self.tokens else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "share": self.share}


class Reference:
    """A bundle's greedy answers, and its log-probabilities of the next token after each of their prefixes.

    The answers are in memory. The log-probabilities, float32 ``[tokens, vocab]``, are in a temporary file (in
    ``TMPDIR``) that is gone when the object is closed, or the process ended: 128 kB a token where the vocabulary has
    32,000. They are written and read one token of a batch at a time, in the same order.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._answers: list[list[tuple[int, ...]]] = []

    def close(self) -> None:
        """Give the temporary file back."""
        with contextlib.suppress(OSError):  # what could not be written for want of room is tried again here
            self._file.close()

    def record(self, llava: Llava, asked: AskedBatch) -> None:
        """Keep what the first bundle says; call it with every batch, in order.

        Raises:
            LlavaDeployError: the temporary file has no room.
            BackendError: logits that are not numbers.
        """
        answers = [answer.token_ids for answer in asked.answers]
        self._answers.append(answers)
        for log_probs in _log_probs_along(llava, asked, answers):
            try:
                self._file.write(log_probs.tobytes())
                self._file.flush()
            except OSError as error:
                raise LlavaDeployError(
                    f"the temporary file for {log_probs.shape[-1]:,} log-probabilities a token cannot be written "
                    f"({error.strerror}) in {tempfile.gettempdir()}; ask fewer questions, or set TMPDIR to a directory "
                    "with more room"
                ) from error

    def answers(self) -> Iterator[list[tuple[int, ...]]]:
        """The answers of each batch, from the first one on; :meth:`read` starts there too."""
        self._file.seek(0)
        return iter(self._answers)

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next log-probabilities, float32 of this shape.

        Raises:
            LlavaDeployError: there are no more: not the batches that were recorded.
        """
        data = self._file.read(int(np.prod(shape)) * _FLOAT32.itemsize)
        try:
            return np.frombuffer(data, _FLOAT32).reshape(shape)
        except ValueError as error:
            raise LlavaDeployError(
                f"want log-probabilities {list(shape)} of the first bundle, found {len(data):,} bytes; "
                "this is a bug in llava-deploy"
            ) from error


class AgreementMeter:
    """Compares a bundle with a reference whose every batch is recorded."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._answers = reference.answers()
        self._tokens = 0
        self._agreeing = 0
        self._kl = 0.0

    def add(self, llava: Llava, asked: AskedBatch) -> None:
        """Compare along the reference's answers to a batch; call it with every batch, in the reference's order.

        Raises:
            BackendError: logits that are not numbers.
        """
        for found in _log_probs_along(llava, asked, next(self._answers)):
            want = self._reference.read(found.shape)
            self._tokens += len(found)
            self._agreeing += int((found.argmax(axis=1) == want.argmax(axis=1)).sum())
            self._kl += float(kl_divergence(want, found).sum())

    def result(self) -> Agreement:
        """Over all that was added."""
        return Agreement(self._tokens, self._agreeing, self._kl / self._tokens if self._tokens else 0.0)


def kl_divergence(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """KL(first || second) of each row, in nats, float64 ``[rows]``; never below 0.

    ``sum p (log p - log q) - p + q``: each term is 0 or more, and ``q - p`` sums to what rounding left of 1 - 1, so
    that distributions which are nearly equal are no difference of large numbers.

    Args:
        first: log-probabilities float32 ``[rows, vocab]``; ``-inf`` is a probability of 0.
        second: likewise.
    """
    log_p, log_q = first.astype(np.float64), second.astype(np.float64)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore", over="ignore"):  # only where p is 0
        gap = log_p - log_q
        terms = np.where(p > 0, p * (gap + np.expm1(-gap)), np.exp(log_q))
    summed: np.ndarray = terms.sum(axis=1)
    return summed


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits ``[rows, vocab]`` to log-probabilities, float32, computed in float64.

    Raises:
        BackendError: a row holds a NaN, or no finite greatest value.
    """
    scores = logits.astype(np.float64)
    greatest = scores.max(axis=1, keepdims=True)  # NaN where there is one
    if not np.isfinite(greatest).all():
        found = greatest[~np.isfinite(greatest)][0]
        raise BackendError(
            f"logits: want finite values, found {found}; the model's values overflowed or a weight is damaged: try the "
            "fp32 export, and llava-deploy verify"
        )
    scores -= greatest
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores.astype(_FLOAT32)


def _log_probs_along(llava: Llava, asked: AskedBatch, answers: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """After 0, 1, 2, … tokens of the answers: float32 ``[rows whose answer has more, vocab]``."""
    for count, logits in enumerate(llava.logits_along(asked.prompts, asked.pictures, answers)):
        yield log_softmax(logits[[count < len(answer) for answer in answers]])
