"""Prompts of a wanted number of tokens, and pictures that nobody has seen."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.manifest import Manifest
from llava_deploy.runtime.tokenize import tokenize_prompt

_WORDS = "what is in the picture and where is it".split()


class Prompts:
    """Text for one model.

    A longer text begins with the shorter ones, so that the cache holds the shorter where it holds the longer.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self._chat = manifest.chat
        self._vision = manifest.vision
        self._tokenizer = tokenizer
        self._made: dict[tuple[str, int], str] = {}

    def text(self, tokens: int) -> str:
        """The longest text of at most so many tokens, or else a single word."""
        return self._longest("", tokens)

    def new_text(self, number: int, tokens: int) -> str:
        """The same, with another beginning for each number."""
        return self._longest(f"{number} ", tokens)

    def about_picture(self, tokens: int) -> str:
        """A placeholder and the longest text with which it is at most so many tokens, or else a single word."""
        return self._longest(f"{self._chat.placeholder}\n", tokens)

    def picture(self, number: int) -> Image.Image:
        """Noise of the size that the tower takes; each number is another picture."""
        size = (self._vision.image_height, self._vision.image_width, 3)
        return Image.fromarray(np.random.default_rng(number).integers(0, 256, size, np.uint8))

    def _longest(self, start: str, tokens: int) -> str:
        if (start, tokens) not in self._made:
            self._made[start, tokens] = self._searched(start, tokens)
        return self._made[start, tokens]

    def _searched(self, start: str, tokens: int) -> str:
        low, high = 1, max(1, tokens)  # a word is a token at least
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._count(_worded(start, middle)) <= tokens else (low, middle - 1)
        return _worded(start, low)

    def _count(self, prompt: str) -> int:
        ids = tokenize_prompt(prompt, self._tokenizer, self._chat)
        return len(ids) + int((ids == IMAGE_TOKEN_INDEX).sum()) * (self._vision.patches - 1)


def _worded(start: str, words: int) -> str:
    return start + " ".join(_WORDS[at % len(_WORDS)] for at in range(words))
