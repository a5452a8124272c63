"""Tokens whose text is the same wherever they stand, so that most of an answer needs no decoding."""

from __future__ import annotations

import json
import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
_READ_AHEAD = 4096
"""Tokens whose texts are looked up when a tokenizer is loaded: in the order in which BPE learns, the most frequent
come first. These take 4 ms; the others are looked up when they come."""


class TokenTexts:
    """What a tokenizer makes of single tokens; made once a tokenizer and shared by all answers.

    A call of ``decode`` takes a microsecond, but 35 to 45 behind a decode step, which leaves nothing of the tokenizer
    in the processor's caches: a look-up in a dict takes 2 there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.byte_tokens = frozenset({tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} - {None})
        self.anchor = _anchor(tokenizer) if _is_local(tokenizer) else None
        """A token that stands for any text that ends in a whole character; ``None`` where there is no such token."""
        self.anchor_length = 0 if self.anchor is None else len(self.decode([self.anchor]))
        self.known: dict[int, str | None] = {}
        """What :meth:`plain` has found so far."""
        if self.anchor is not None:
            for token in range(min(_READ_AHEAD, tokenizer.get_vocab_size())):
                self.known[token] = self._look_up(token)

    def decode(self, ids: list[int]) -> str:
        """Text of tokens from the start of a text on, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def plain(self, token: int) -> str | None:
        """What the token adds to any text that ends in a whole character; ``None`` where that is not certain."""
        try:
            return self.known[token]
        except KeyError:
            self.known[token] = text = self._look_up(token)
            return text

    def _look_up(self, token: int) -> str | None:
        if self.anchor is None or token in self.special or token in self.byte_tokens:
            return None
        text = self.decode([self.anchor, token])[self.anchor_length :]
        return text if text and REPLACEMENT not in text else None


def _anchor(tokenizer: Tokenizer) -> int | None:
    """A letter that is a token."""
    special = tokenizer.get_added_tokens_decoder()
    ids = ((letter, tokenizer.token_to_id(letter)) for letter in string.ascii_letters)
    return next(
        (i for letter, i in ids if i is not None and i not in special and tokenizer.decode([i]) == letter), None
    )


def _is_local(tokenizer: Tokenizer) -> bool:
    """Whether a token's text depends on none but its neighbours in the same character, and the start of the text.

    True of byte-level BPE (GPT-2, Llama 3) and of sentencepiece's form with byte fallback (Llama 2), which are all that
    LLaVA's models have. What other decoders do with a token may depend on the one beside it.
    """
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return True
    steps = decoder.get("decoders", []) if decoder["type"] == "Sequence" else []
    kinds = [step["type"] for step in steps]
    if "Fuse" not in kinds:
        return False
    # Before Fuse each token is by itself, but for runs of byte tokens; behind it only the text's start may change.
    fuse = kinds.index("Fuse")
    alone = all(kind in ("Replace", "ByteFallback") for kind in kinds[:fuse])
    return alone and all(step["type"] == "Strip" and step["stop"] == 0 for step in steps[fuse + 1 :])
