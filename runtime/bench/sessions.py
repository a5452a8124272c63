"""A bundle loaded as :meth:`Llava.load` loads it, with a watch on its decoder, and answers that nothing ends early."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.names import Backend
from llava_deploy.runtime.backend import DecoderSession, Placement
from llava_deploy.runtime.backend_choice import Wanted
from llava_deploy.runtime.bench.options import Room
from llava_deploy.runtime.bundle import Bundle, open_bundle
from llava_deploy.runtime.encoding import PromptEncoder
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.loading import open_sessions


@dataclass(frozen=True)
class Lap:
    """One step of the decoder: when it ended, its seconds, and those of them in the backend."""

    ended: float
    whole: float
    run: float


class TimedDecoder:
    """A decoder's session that keeps the seconds of each step; see :class:`DecoderSession`."""

    def __init__(self, session: DecoderSession) -> None:
        self._session = session
        self.max_len = session.max_len
        self.max_seq = session.max_seq
        self.run_seconds = session.run_seconds
        self.laps: list[Lap] = []
        """Of the steps since somebody cleared it."""

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows; see :class:`DecoderSession`."""
        self._session.begin(batch)

    def clear(self) -> None:
        """Forget what the cache holds; see :class:`DecoderSession`."""
        self._session.clear()

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Run the decoder over new tokens; see :class:`DecoderSession`."""
        began = time.perf_counter()
        logits = self._session.step(inputs_embeds, write_indices, last_index, pictures)
        ended, before = time.perf_counter(), self.run_seconds
        self.run_seconds = self._session.run_seconds
        self.laps.append(Lap(ended, ended - began, self.run_seconds - before))
        return logits


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked.

    Attributes:
        decoder: its decoder.
        backend: what runs it.
        seconds: that loading took.
    """

    llava: Llava
    decoder: TimedDecoder
    backend: Backend
    seconds: float

    @property
    def room(self) -> Room:
        """What it has room for."""
        manifest, max_len = self.llava.manifest, self.llava.max_len
        limit = manifest.splice.model_max_length
        return Room(max_len, max_len if limit is None else min(limit, max_len), manifest.vision.patches)


def load(directory: Path, wanted: Wanted) -> Loaded:
    """Load a bundle; errors as :meth:`Llava.load` has them."""
    began = time.perf_counter()
    bundle = open_bundle(directory)
    sessions = open_sessions(bundle, wanted, Integrity.QUICK)
    decoder = TimedDecoder(sessions.decoder)
    llava = Llava(_endless(bundle), PromptEncoder(bundle, sessions.vision), decoder, sessions.reason)
    return Loaded(llava, decoder, sessions.backend, time.perf_counter() - began)


def _endless(bundle: Bundle) -> Bundle:
    """A bundle whose answers end with their number of tokens alone."""
    chat = replace(bundle.manifest.chat, stop_token_ids=(), stop_strings=())
    return Bundle(bundle.directory, replace(bundle.manifest, chat=chat))
