"""Prompts and pictures to the embeddings that the decoder reads: tokenise, encode the pictures, splice."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from llava_deploy.engines.arrays import mapped_array
from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import BundleError, PromptError
from llava_deploy.engines.manifest import EMBEDDING_TABLE, TOKENIZER
from llava_deploy.runtime.backend import ImageFeatures, VisionSession
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.context import FeatureCache, KnownPictures
from llava_deploy.runtime.new_tokens import NewTokens, TokenEmbeddings, require_in_vocabulary, splice_rows
from llava_deploy.runtime.pictures import (
    PictureSource,
    TakenPicture,
    load_picture,
    pixels_digest,
    source_key,
    take_picture,
)
from llava_deploy.runtime.preprocess import preprocess_batch
from llava_deploy.runtime.token_texts import TokenTexts
from llava_deploy.runtime.tokenize import tokenize_prompt


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of prompts, ready for the decoder, and the seconds that it took.

    Attributes:
        tokens: all of them, none in the cache.
        seen_ids: each row's token ids, a picture as the placeholder's id where that has one: what transformers' logits
            processors see of a prompt.
        slots: what each token of the first row was computed from: its id, or its picture's digest and feature row.
        vision_clocks: tell the seconds of the tower's runs that a device may still be at work on.
    """

    tokens: NewTokens
    seen_ids: list[list[int]]
    slots: list[Hashable]
    preprocess_seconds: float
    vision_seconds: float
    splice_seconds: float
    vision_clocks: tuple[Callable[[], float], ...]

    def vision_lag(self) -> float:
        """Seconds of ``vision_clocks`` that are not in ``vision_seconds``; 0 where there is no device."""
        return max(0.0, sum(clock() for clock in self.vision_clocks) - self.vision_seconds)


class _Laps:
    """A stopwatch over the parts of one call, which take turns."""

    def __init__(self) -> None:
        self.seconds = {"preprocess": 0.0, "vision": 0.0, "splice": 0.0}
        self.clocks: list[Callable[[], float]] = []
        self._began = time.perf_counter()

    def end(self, part: str) -> None:
        """What passed since the last lap was this part's."""
        now = time.perf_counter()
        self.seconds[part] += now - self._began
        self._began = now


class PromptEncoder:
    """Tokenizer, embedding table and vision graph of a bundle, with the features of the last pictures."""

    def __init__(self, bundle: Bundle, vision: VisionSession) -> None:
        self._manifest = bundle.manifest
        self.vision = vision
        self._features = FeatureCache()
        self._known = KnownPictures()
        self._table = _load_table(bundle)
        self.tokenizer = _load_tokenizer(bundle)
        self.token_texts = TokenTexts(self.tokenizer)

    def embed(self, ids: np.ndarray | list[int]) -> np.ndarray:
        """Ids, int64 ``[n]`` or a list of them, to embeddings ``[n, hidden]``.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        require_in_vocabulary(ids if isinstance(ids, list) else ids.tolist(), len(self._table))
        embedded: np.ndarray = self._table[ids]
        return embedded

    def token_embeddings(self, batch: int) -> TokenEmbeddings:
        """The look-up of the tokens that ``batch`` rows choose."""
        return TokenEmbeddings(self._table, batch)

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
        laps = _Laps()
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
        lengths = [
            self._checked_length(index, tokens, len(sources), limit)
            for index, (tokens, sources) in enumerate(zip(ids, rows, strict=True))
        ]
        laps.end("splice")
        features: dict[bytes, ImageFeatures] = {}
        unknown: dict[bytes, Image.Image] = {}
        digests = [[self._look_at(source, features, unknown) for source in sources] for sources in rows]
        laps.end("preprocess")
        self._encode_pictures(unknown, features, laps)
        wanted = [[features[digest] for digest in row] for row in digests]
        embeds, placements = splice_rows(ids, wanted, self._manifest.vision.patches, self.embed)
        slots = self._slots(ids[0], digests[0])
        laps.end("splice")
        return EncodedBatch(
            tokens=NewTokens(embeds, placements, 0, np.array(lengths)),
            seen_ids=[self._seen(row) for row in ids],
            slots=slots,
            preprocess_seconds=laps.seconds["preprocess"],
            vision_seconds=laps.seconds["vision"],
            splice_seconds=laps.seconds["splice"],
            vision_clocks=tuple(laps.clocks),
        )

    def _look_at(
        self, source: PictureSource, features: dict[bytes, ImageFeatures], unknown: dict[bytes, Image.Image]
    ) -> bytes:
        """Digest of a picture, which goes to ``features`` with what is known, or else to ``unknown``.

        It is decoded, or copied, only where its features are not known, or not that it is the one that they are of.
        """
        key = None if isinstance(source, TakenPicture) else source_key(source)
        seen = pixels_digest(source)
        digest = source.digest if isinstance(source, TakenPicture) else seen
        if digest is None:
            digest = self._known.get(key)
        found = None if digest is None else self._features.get(digest)
        if digest is None or (found is None and digest not in unknown):
            taken = take_picture(source) if seen is None else TakenPicture(load_picture(source), seen)
            digest, found = taken.digest, self._features.get(taken.digest)
            unknown[digest] = taken.image
        if found is not None:
            features[digest] = found
            unknown.pop(digest, None)
        if key is not None:
            self._known.put(key, digest)
        return digest

    def _encode_pictures(
        self, unknown: Mapping[bytes, Image.Image], features: dict[bytes, ImageFeatures], laps: _Laps
    ) -> None:
        """Add the features ``[patches, hidden]`` of pictures, encoded some at a time."""
        digests = list(unknown)
        for at in range(0, len(digests), self.vision.max_images):
            group = digests[at : at + self.vision.max_images]
            pixels = self.pixels([unknown[digest] for digest in group])
            laps.end("preprocess")
            encoded = self.vision.encode(pixels)  # [group, patches, hidden]
            for digest, found in zip(group, encoded, strict=True):
                features[digest] = found
                self._features.put(digest, found)
            if (clock := self.vision.clock()) is not None:
                laps.clocks.append(clock)
            laps.end("vision")

    def _checked_length(self, index: int, ids: np.ndarray, pictures: int, limit: int) -> int:
        """Tokens of a row once its pictures are in it.

        Raises:
            PromptError: empty, more or fewer pictures than placeholders, or longer than what is allowed.
        """
        placeholders = int((ids == IMAGE_TOKEN_INDEX).sum())
        if placeholders != pictures:
            raise PromptError(
                f"prompt {index}: {placeholders} placeholders {self._manifest.chat.placeholder!r} and {pictures} "
                "pictures; want as many of one as of the other"
            )
        if not len(ids):
            raise PromptError(f"prompt {index}: want text or a picture, got nothing")
        patches = self._manifest.vision.patches
        length = len(ids) + placeholders * (patches - 1)
        model_max = self._manifest.splice.model_max_length
        found = f"prompt {index}: {length} tokens" + (f" ({patches} a picture)" if pictures else "")
        if model_max is not None and length > model_max:
            raise PromptError(
                f"{found}, but the model's tokenizer_model_max_length is {model_max}; shorten it or give fewer pictures"
            )
        if length > limit:
            raise PromptError(
                f"{found}, but the context holds {limit}; shorten it, give fewer pictures, or load the bundle with a "
                "larger max_len (--max-len) where the model and its engine allow"
            )
        return length

    def _seen(self, ids: np.ndarray) -> list[int]:
        placeholder = self._manifest.chat.image_token_id
        text: list[int] = ids[ids != IMAGE_TOKEN_INDEX].tolist()
        return text if placeholder is None or len(text) == len(ids) else [*text, placeholder]

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
    shape = bundle.manifest.decoder
    size = (shape.vocab_size, shape.hidden_size)
    return mapped_array(bundle.path(EMBEDDING_TABLE), shape.dtype, size, remedy="export the bundle again")
