"""What the runtime remembers between calls: pictures, their features, and which tokens the cache holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

from llava_deploy.engines.names import FEATURES_KEPT
from llava_deploy.runtime.backend import ImageFeatures

_SOURCES_KEPT = 4 * FEATURES_KEPT
"""One picture may come from several, and what is kept of each is small."""

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class _Recent(Generic[_Key, _Value]):
    """The values that were used last; the one used longest ago goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[_Key, _Value] = OrderedDict()

    def get(self, key: _Key) -> _Value | None:
        """The value, where it is known."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: _Key, value: _Value) -> None:
        """Keep a value."""
        self._values[key] = value
        while len(self._values) > self._most:
            self._values.popitem(last=False)


class FeatureCache(_Recent[bytes, ImageFeatures]):
    """Image features ``[patches, hidden]`` by picture digest: a picture of an earlier turn is not encoded again."""

    def __init__(self) -> None:
        super().__init__(FEATURES_KEPT)

    def put(self, key: bytes, value: ImageFeatures) -> None:
        """Keep a picture's features; an array as a copy, as a view would keep all that was encoded with it."""
        super().put(key, value.copy() if isinstance(value, np.ndarray) else value)


class KnownPictures(_Recent[Hashable, bytes]):
    """Digests by :func:`~llava_deploy.runtime.pictures.source_key`: what was decoded once is not decoded again."""

    def __init__(self) -> None:
        super().__init__(_SOURCES_KEPT)


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
