"""What the runtime remembers between calls: image features, and which tokens the cache holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FEATURES_KEPT = 16
"""Pictures whose features are kept; the one used longest ago goes first."""


class FeatureCache:
    """Image features by picture, so that a picture of an earlier turn is not encoded again."""

    def __init__(self) -> None:
        self._features: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def features(
        self, wanted: Mapping[bytes, Image.Image], encode: Callable[[list[Image.Image]], np.ndarray]
    ) -> dict[bytes, np.ndarray]:
        """Features ``[patches, hidden]`` of pictures by digest; ``encode`` gets the unknown ones, in one call."""
        unknown = [digest for digest in wanted if digest not in self._features]
        if unknown:
            encoded = encode([wanted[digest] for digest in unknown])  # [unknown, patches, hidden]
            self._features.update(zip(unknown, encoded, strict=True))
        for digest in wanted:
            self._features.move_to_end(digest)
        found = {digest: self._features[digest] for digest in wanted}
        while len(self._features) > FEATURES_KEPT:
            self._features.popitem(last=False)
        for digest in unknown if len(unknown) > 1 else ():
            if digest in self._features:  # as a view, it would keep the features of all that came with it
                self._features[digest] = self._features[digest].copy()
        return found


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

    def extend(self, slots: Sequence[Hashable]) -> None:
        """More slots were written."""
        self._slots.extend(slots)
