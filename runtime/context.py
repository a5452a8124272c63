"""What the runtime remembers between calls: pictures, their features, and which tokens the cache holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from llava_deploy.engines.names import FEATURES_KEPT
from llava_deploy.runtime.backend import ImageFeatures


class FeatureCache:
    """Image features ``[patches, hidden]`` by picture digest: a picture of an earlier turn is not encoded again."""

    def __init__(self) -> None:
        self._features: OrderedDict[bytes, ImageFeatures] = OrderedDict()

    def get(self, digest: bytes) -> ImageFeatures | None:
        """What is known of a picture."""
        if digest in self._features:
            self._features.move_to_end(digest)
        return self._features.get(digest)

    def put(self, digest: bytes, features: ImageFeatures) -> None:
        """Keep a picture's features; an array as a copy, as a view would keep all that was encoded with it."""
        self._features[digest] = features.copy() if isinstance(features, np.ndarray) else features
        while len(self._features) > FEATURES_KEPT:
            self._features.popitem(last=False)


class KnownPictures:
    """Digests by :func:`~llava_deploy.runtime.pictures.source_key`: what was decoded once is not decoded again."""

    def __init__(self) -> None:
        self._digests: OrderedDict[Hashable, bytes] = OrderedDict()

    def get(self, key: Hashable) -> bytes | None:
        """Digest of the picture."""
        if key in self._digests:
            self._digests.move_to_end(key)
        return self._digests.get(key)

    def put(self, key: Hashable, digest: bytes) -> None:
        """Keep a picture's digest."""
        self._digests[key] = digest
        while len(self._digests) > 4 * FEATURES_KEPT:
            self._digests.popitem(last=False)


class CachedContext:
    """What each slot of a one-row KV cache was computed from: a token id, or a picture's digest and feature row."""

    def __init__(self) -> None:
        self._slots: list[Hashable] = []

    def clear(self) -> None:
        """The cache was given to other rows."""
        self._slots = []

    def reuse(self, prompt: Sequence[Hashable]) -> int:
        """Take up a new prompt and return how many tokens at its start need no computing.

        At least the last token is computed, for its logits.
        """
        most = min(len(self._slots), len(prompt) - 1)
        same = next((i for i in range(most) if self._slots[i] != prompt[i]), most)
        self._slots = list(prompt[:same])
        return same

    def append(self, slot: Hashable) -> None:
        """One more slot was written."""
        self._slots.append(slot)

    def extend(self, slots: Sequence[Hashable]) -> None:
        """More slots were written."""
        self._slots.extend(slots)
