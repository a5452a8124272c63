"""Prompts and pictures to the embeddings that the decoder reads: tokenise, encode the pictures, splice."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import BundleError, PromptError
from llava_deploy.engines.manifest import EMBEDDING_TABLE, TOKENIZER
from llava_deploy.runtime.backend import VisionSession
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.context import FeatureCache
from llava_deploy.runtime.pictures import PictureSource, load_picture, picture_digest
from llava_deploy.runtime.preprocess import preprocess_batch
from llava_deploy.runtime.splice import SpliceOptions, splice
from llava_deploy.runtime.tokenize import tokenize_prompt

PICTURES_AT_ONCE = 16
"""Pictures in one run of the vision graph: bounds its activations, whatever the number of pictures."""


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of prompts, ready for the decoder, and the seconds that it took.

    Attributes:
        inputs_embeds: ``[batch, seq, hidden]`` in the decoder's dtype, rows padded right.
        lengths: int64 ``[batch]``, each row's own tokens.
        text_ids: each row's token ids without its pictures.
        slots: what each token of the first row was computed from: its id, or its picture's digest and feature row.
    """

    inputs_embeds: np.ndarray
    lengths: np.ndarray
    text_ids: list[list[int]]
    slots: list[Hashable]
    preprocess_seconds: float
    vision_seconds: float
    splice_seconds: float


class PromptEncoder:
    """Tokenizer, embedding table and vision graph of a bundle, with the features of the last pictures."""

    def __init__(self, bundle: Bundle, vision: VisionSession) -> None:
        self._manifest = bundle.manifest
        self.vision = vision
        self._features = FeatureCache()
        self._table = _load_table(bundle)
        self.tokenizer = _load_tokenizer(bundle)
        self._preprocess_seconds = 0.0

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """int64 ids ``[n]`` to embeddings ``[n, hidden]``.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        vocab = len(self._table)
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
            wrong = int(ids[(ids < 0) | (ids >= vocab)][0])
            raise PromptError(
                f"token id {wrong} is outside the vocabulary of {vocab}; the tokenizer and the model differ: "
                "export the bundle from a checkpoint whose tokenizer is its own"
            )
        embedded: np.ndarray = self._table[ids]
        return embedded

    def pixels(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures to float32 ``pixel_values [pictures, 3, height, width]``."""
        shape = self._manifest.vision
        pixels = np.empty((len(pictures), 3, shape.image_height, shape.image_width), np.float32)
        preprocess_batch(pictures, self._manifest.image, pixels)
        return pixels

    def encode(
        self, prompts: Sequence[str], images: Sequence[Sequence[PictureSource]] | None, limit: int
    ) -> EncodedBatch:
        """Turn prompts and their pictures into embeddings.

        Args:
            prompts: texts with one placeholder for each picture.
            images: the pictures of each prompt; ``None`` where there are none.
            limit: tokens that fit the cache.

        Raises:
            PromptError: no prompt, more or fewer pictures than placeholders, or a prompt longer than the context.
            PictureError: a picture that cannot be used.
        """
        began = time.perf_counter()
        require_list("prompts", prompts, "texts")
        if not prompts:
            raise PromptError("prompts: want one at least, got none")
        rows: Sequence[Sequence[PictureSource]] = [()] * len(prompts) if images is None else images
        require_list("images", rows, "lists of pictures, one list a prompt")
        for index, row in enumerate(rows):
            require_list(f"images of prompt {index}", row, "pictures")
        if len(rows) != len(prompts):
            raise PromptError(f"images: want one list of pictures a prompt, {len(prompts)}, got {len(rows)}")
        ids = [tokenize_prompt(prompt, self.tokenizer, self._manifest.chat) for prompt in prompts]
        for index, (tokens, sources) in enumerate(zip(ids, rows, strict=True)):
            self._check_row(index, tokens, len(sources), limit)
        tokenized = time.perf_counter() - began
        pictures = [[load_picture(source) for source in sources] for sources in rows]
        loaded = time.perf_counter() - began - tokenized
        self._preprocess_seconds = 0.0
        at = time.perf_counter()
        digests = [[picture_digest(picture) for picture in row] for row in pictures]
        wanted = {d: p for found, row in zip(digests, pictures, strict=True) for d, p in zip(found, row, strict=True)}
        features = self._features.features(wanted, self._encode_pictures)
        vision = time.perf_counter() - at - self._preprocess_seconds
        at = time.perf_counter()
        inputs_embeds, lengths = self._splice(ids, [[features[d] for d in row] for row in digests])
        slots = self._slots(ids[0], digests[0])
        return EncodedBatch(
            inputs_embeds=inputs_embeds,
            lengths=lengths,
            text_ids=[row[row != IMAGE_TOKEN_INDEX].tolist() for row in ids],
            slots=slots,
            preprocess_seconds=loaded + self._preprocess_seconds,
            vision_seconds=vision,
            splice_seconds=tokenized + time.perf_counter() - at,
        )

    def _encode_pictures(self, pictures: list[Image.Image]) -> np.ndarray:
        began = time.perf_counter()
        pixels = self.pixels(pictures)
        self._preprocess_seconds = time.perf_counter() - began
        groups = [pixels[at : at + PICTURES_AT_ONCE] for at in range(0, len(pixels), PICTURES_AT_ONCE)]
        return np.concatenate([self.vision.encode(group) for group in groups])  # [pictures, patches, hidden]

    def _check_row(self, index: int, ids: np.ndarray, pictures: int, limit: int) -> None:
        placeholders = int((ids == IMAGE_TOKEN_INDEX).sum())
        if placeholders != pictures:
            raise PromptError(
                f"prompt {index}: {placeholders} placeholders {self._manifest.chat.placeholder!r} and {pictures} "
                "pictures; want as many of one as of the other"
            )
        if not len(ids):
            raise PromptError(f"prompt {index}: want text or a picture, got nothing")
        length = len(ids) + placeholders * (self._manifest.vision.patches - 1)
        model_max = self._manifest.splice.model_max_length
        if model_max is not None and model_max < limit:
            if length > model_max:
                self._refuse_length(index, length, pictures, f"the model's tokenizer_model_max_length is {model_max}")
        elif length > limit:
            self._refuse_length(index, length, pictures, f"the context holds {limit}")

    def _refuse_length(self, index: int, length: int, pictures: int, limit: str) -> NoReturn:
        each = f" ({self._manifest.vision.patches} a picture)" if pictures else ""
        raise PromptError(
            f"prompt {index}: {length} tokens{each}, but {limit}; shorten it, give fewer pictures, "
            "or load the bundle with a larger max_len where the model allows"
        )

    def _splice(self, ids: list[np.ndarray], features: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        longest = max(len(row) for row in ids)
        batch = np.zeros((len(ids), longest), np.int64)
        mask = np.zeros((len(ids), longest), bool)
        for index, row in enumerate(ids):
            batch[index, : len(row)] = row
            mask[index, : len(row)] = True
        lengths = [
            int((row != IMAGE_TOKEN_INDEX).sum()) + sum(map(len, found))
            for row, found in zip(ids, features, strict=True)
        ]
        # In the splice, a row of text uses up one image's place: give it one that is empty.
        empty = np.zeros((0, self._table.shape[1]), self._table.dtype)
        runs = [run for row in features for run in (row or [empty])]
        spliced = splice(batch, None, mask, None, runs, embed=self.embed, options=SpliceOptions())
        return spliced.inputs_embeds, np.array(lengths)

    def _slots(self, ids: np.ndarray, digests: list[bytes]) -> list[Hashable]:
        patches = range(self._manifest.vision.patches)
        slots: list[Hashable] = []
        remaining = iter(digests)
        for token in ids.tolist():
            if token == IMAGE_TOKEN_INDEX:
                digest = next(remaining)
                slots.extend((digest, patch) for patch in patches)
            else:
                slots.append(token)
        return slots


def require_list(name: str, value: object, kind: str) -> None:
    """Refuse what would be taken apart: the characters of a text, the rows of a picture.

    Raises:
        PromptError: a text, bytes, or no sequence.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise PromptError(f"{name}: want a list of {kind}, got {type(value).__name__}; put a single one into a list")


def _load_tokenizer(bundle: Bundle) -> Tokenizer:
    path = bundle.path(TOKENIZER)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise BundleError(f"{path}: not a tokenizer ({error}); export the bundle again") from error


def _load_table(bundle: Bundle) -> np.ndarray:
    path, shape = bundle.path(EMBEDDING_TABLE), bundle.manifest.decoder
    try:
        # A plain array over the map: a memmap object costs microseconds at every look-up.
        table = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not an array ({error}); export the bundle again") from error
    want = (shape.vocab_size, shape.hidden_size)
    if table.shape != want or table.dtype != np.dtype(shape.dtype):
        found = f"{table.dtype}{list(table.shape)}"
        raise BundleError(f"{path}: want {shape.dtype}{list(want)}, found {found}; export the bundle again")
    return table
