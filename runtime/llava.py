"""The model, ready to answer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llava_deploy.engines.errors import BackendError, InputError, OptionError
from llava_deploy.engines.integrity import Integrity
from llava_deploy.engines.names import AccuracyLevel
from llava_deploy.runtime.answers import Answer, Piece, Timings
from llava_deploy.runtime.backend import DecoderSession
from llava_deploy.runtime.backend_choice import BackendName, Wanted
from llava_deploy.runtime.bundle import Bundle, open_bundle
from llava_deploy.runtime.context import CachedContext
from llava_deploy.runtime.encoding import EncodedBatch, PromptEncoder
from llava_deploy.runtime.generation import Generation, GenerationLimits, Row, logits_along
from llava_deploy.runtime.loading import open_sessions
from llava_deploy.runtime.pictures import PictureSource
from llava_deploy.runtime.prompt import images_of, render_chat
from llava_deploy.runtime.sampling import GREEDY, Sampler, SamplingOptions
from llava_deploy.runtime.textstream import TextStream

DEFAULT_NEW_TOKENS = 256
_T = TypeVar("_T")


class Llava:
    """A bundle, loaded. Not for use by several threads at once; a new call ends a stream that is still running."""

    def __init__(self, bundle: Bundle, encoder: PromptEncoder, decoder: DecoderSession, backend: str) -> None:
        self.manifest = bundle.manifest
        self.directory = bundle.directory
        self.backend = backend
        """A sentence for people: which backend runs, and why a better one does not."""
        self.encoder = encoder
        self.decoder = decoder
        self._context = CachedContext()
        self._call = 0

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: BackendName = "auto",
        max_len: int | None = None,
        threads: int | None = None,
        accuracy_level: AccuracyLevel | None = None,
        integrity: Integrity = Integrity.QUICK,
    ) -> Llava:
        """Load a bundle.

        Args:
            path: the bundle's directory.
            backend: ``onnxruntime`` (on the CPU, through the engine that ``build`` made or the canonical graphs),
                ``onnxruntime-cuda``, ``tensorrt`` or ``tensorrt-rtx`` (on the GPU, through the engine that ``build``
                made), or ``auto``: the best of them that the bundle has an engine for and that runs here, said in
                :attr:`backend`.
            max_len: slots of the KV cache, the longest context; all of a TensorRT engine's, or else
                :data:`~llava_deploy.runtime.loading.DEFAULT_MAX_LEN` or the model's limit.
            threads: of one operator of ONNX Runtime; ``None``: one a physical core.
            accuracy_level: what ONNX Runtime multiplies int4 weights in, instead of what the manifest or the engine
                says: 4 rounds the activations to int8, 1 keeps them float32.
            integrity: how closely the files are held against the manifest.

        Raises:
            BundleError: the bundle is damaged or of another format.
            BackendError: the backend that is asked for is not installed or does not run on this machine, or it cannot
                load the graphs.
            OptionError: ``max_len`` is outside what the model or the engine allows, ``threads`` is no number of
                threads, the backend is not known, an accuracy level that is none, or for a bundle in which nothing is
                quantised, or an option of ONNX Runtime for another backend.
        """
        wanted = Wanted(backend, max_len, threads, accuracy_level)
        bundle = open_bundle(Path(path), integrity)
        sessions = open_sessions(bundle, wanted, integrity)
        return cls(bundle, PromptEncoder(bundle, sessions.vision), sessions.decoder, sessions.reason)

    @property
    def max_len(self) -> int:
        """Slots of the KV cache: prompt, image features and answer together."""
        return self.decoder.max_len

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[PictureSource]] | None = None,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: SamplingOptions = GREEDY,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """Answer a batch of prompts, taken as they are: no template is applied.

        Args:
            prompts: texts with one ``<image>`` for each picture, anywhere.
            images: the pictures of each prompt; ``None`` where no prompt has any.
            max_new_tokens: an answer's longest.
            sampling: how tokens are chosen; greedy by default.
            stop: texts that end an answer and are not part of it, beside the model's own.

        Raises:
            PromptError: no prompt, more or fewer pictures than placeholders, or a prompt longer than the context.
            PictureError: a picture that cannot be used.
        """
        began = time.perf_counter()
        limits = GenerationLimits(max_new_tokens, frozenset(self.manifest.chat.stop_token_ids))
        batch = self.encoder.encode(prompts, images, self.decoder.max_len)
        generation, reused = self._start(batch, limits, sampling, stop)
        for _ in self._steps(generation, batch, reused, self._call):
            pass
        return [
            Answer(
                token_ids=tuple(row.new_tokens),
                text="".join(row.new_text),
                finish_reason=row.ended(),
                timings=_timings(generation, batch, index, reused, began),
            )
            for index, row in enumerate(generation.rows)
        ]

    def stream(
        self,
        prompt: str,
        images: Sequence[PictureSource] = (),
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: SamplingOptions = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Answer one prompt, taken as it is, as it comes; arguments and errors as in :meth:`generate`.

        The start that the prompt shares with the previous call's context is not computed again. Errors in the arguments
        are raised here, not at the first piece.
        """
        began = time.perf_counter()
        limits = GenerationLimits(max_new_tokens, frozenset(self.manifest.chat.stop_token_ids))
        batch = self.encoder.encode([prompt], [images], self.decoder.max_len)
        generation, reused = self._start(batch, limits, sampling, stop)
        return self._pieces(generation, batch, reused, began, self._call)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: SamplingOptions = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Answer the last message of a conversation, as it comes.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": ...}`` with a text, or with parts
                ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": picture}``. Pass the whole
                conversation at every turn: what the cache still holds of it is not computed again.
            max_new_tokens: see :meth:`generate`, also for ``sampling`` and ``stop``.
            sampling: see there.
            stop: see there.
        """
        prompt = render_chat(messages, self.manifest.chat)
        return self.stream(prompt, images_of(messages), max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)

    def logits_along(
        self, prompts: Sequence[str], images: Sequence[Sequence[PictureSource]] | None, answers: Sequence[Sequence[int]]
    ) -> Iterator[np.ndarray]:
        """Read answers that are given, and yield what the model expects after each of their prefixes (teacher forcing).

        Args:
            prompts: see :meth:`generate`, also for ``images``.
            images: see there.
            answers: token ids of each prompt's answer, one at least.

        Yields:
            Logits ``[batch, vocab]``: see :func:`~llava_deploy.runtime.generation.logits_along`, also for errors.
        """
        batch = self.encoder.encode(prompts, images, self.decoder.max_len)
        reused = self._claim_cache(batch)
        call, rest = self._call, batch.tokens.after(reused)
        embed = self.encoder.token_embeddings(len(rest.lengths)).of
        along = self._or_cleared(logits_along(self.decoder, rest, answers, embed))
        for count, logits in enumerate(along):
            if len(rest.lengths) == 1:
                self._context.extend((answers[0][count - 1],) if count else batch.slots[reused:])
            yield logits
            self._require_latest(call)

    def _start(
        self, batch: EncodedBatch, limits: GenerationLimits, sampling: SamplingOptions, stop: Sequence[str]
    ) -> tuple[Generation, int]:
        """Set up the run of a batch; how many tokens at its start the cache holds already."""
        if isinstance(stop, str) or not isinstance(stop, Sequence):
            raise OptionError("stop", f"want a list of texts, got {stop!r}; put a single one into a list")
        if not isinstance(sampling, SamplingOptions):
            raise InputError(f"sampling: want SamplingOptions, got {type(sampling).__name__}; make one of its values")
        stops = (*self.manifest.chat.stop_strings, *stop)
        rows = [Row(TextStream(self.encoder.token_texts, stops), length) for length in batch.tokens.lengths.tolist()]
        sampler = Sampler(sampling, batch.seen_ids)
        reused = self._claim_cache(batch)
        return Generation(self.decoder, sampler, limits, rows), reused

    def _claim_cache(self, batch: EncodedBatch) -> int:
        """Take the cache for a new call; how many tokens at the batch's start it holds already."""
        self._call += 1
        single = len(batch.tokens.lengths) == 1
        if not single:
            self._context.clear()  # first: the old cache is gone even where there is no room for the new one
        self.decoder.begin(len(batch.tokens.lengths))
        return self._context.reuse(batch.slots) if single else 0

    def _steps(self, generation: Generation, batch: EncodedBatch, reused: int, call: int) -> Iterator[None]:
        """Run the generation of the call numbered ``call`` and keep the record of what a one-row cache holds."""
        # Here too: by the first step of a stream that waited, the tokens it wanted to reuse may be overwritten.
        self._require_latest(call)
        single = len(generation.rows) == 1
        written = self._context.append if single else _ignore
        embed = self.encoder.token_embeddings(len(generation.rows)).of
        steps = self._or_cleared(generation.steps(batch.tokens.after(reused), embed, written))
        next(steps)
        if single:
            self._context.extend(batch.slots[reused:])
        yield
        self._require_latest(call)
        for _ in steps:
            yield
            self._require_latest(call)

    def _or_cleared(self, steps: Iterator[_T]) -> Iterator[_T]:
        """Run the decoder; where it fails, or gives what is no number, nothing of the cache is used again."""
        try:
            yield from steps
        except BackendError:
            self._context.clear()
            self.decoder.clear()
            raise

    def _require_latest(self, call: int) -> None:
        if call != self._call:
            raise BackendError(
                "another answer was started while this one was streaming, and they share one KV cache; "
                "finish one before the next, or load the bundle once for each"
            )

    def _pieces(
        self, generation: Generation, batch: EncodedBatch, reused: int, began: float, call: int
    ) -> Iterator[Piece]:
        row = generation.rows[0]
        ids: tuple[int, ...] = ()
        for _ in self._steps(generation, batch, reused, call):
            ids += (row.new_tokens[-1],)
            text = row.new_text[-1]
            if not text and row.finish_reason is None:
                continue  # half a character, or the beginning of a stop string
            done = row.finish_reason is not None
            timings = _timings(generation, batch, 0, reused, began) if done else None
            yield Piece(ids, text, row.finish_reason, timings)
            ids = ()


def _ignore(token: int) -> None:
    """Of several rows nothing is reused."""


def _timings(generation: Generation, batch: EncodedBatch, row: int, reused: int, began: float) -> Timings:
    lag = batch.vision_lag()  # the first step has waited for the tower
    return Timings(
        preprocess=batch.preprocess_seconds,
        vision=batch.vision_seconds + lag,
        splice=batch.splice_seconds,
        prefill=max(0.0, generation.prefill_seconds - lag),
        decode=generation.decode_seconds,
        ttft=generation.first_token_at - began,
        prompt_tokens=int(batch.tokens.lengths[row]),
        reused_tokens=reused,
        new_tokens=len(generation.rows[row].new_tokens),
    )
