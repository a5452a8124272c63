"""Token ids to text as they come: whole characters only, and nothing that may turn out to be a stop string.

``tokenizers.decoders.DecodeStream`` does not serve: with byte fallback it gives text that the decoded whole does not
have (a run of bytes that ends up invalid decodes to replacement characters throughout), raises on some sequences, and
keeps the last, incomplete character for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_deploy.engines.errors import PromptError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "�"
# An incomplete UTF-8 sequence has 3 bytes at most, and a token one byte at least.
_LOOK_BACK = 4
_LONGEST_WINDOW = 8


class TextStream:
    """The text of one answer.

    The pieces and the flush together are ``tokenizer.decode(ids, skip_special_tokens=True)``, cut before the stop
    string that is complete first. A run of byte-fallback tokens (``<0xE2>``) is held back until it ends, as only then
    it is known whether it is text.

    Args:
        tokenizer: of the model.
        stop_strings: texts that end the answer and do not belong to it.

    Raises:
        PromptError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        if isinstance(stop_strings, str) or not all(isinstance(stop, str) and stop for stop in stop_strings):
            raise PromptError(f"stop strings: want a list of texts, none of them empty, got {stop_strings!r}")
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._byte_tokens = {tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} - {None}
        self._stops = tuple(stop_strings)
        # The last tokens, and how many characters of their own decoding were passed on. Whatever comes before them
        # does not change how what follows them decodes.
        self._window: list[int] = []
        self._passed = 0
        self._held = ""
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether a stop string was found; whatever comes after it is dropped."""
        return self._finished

    def push(self, token_id: int) -> str:
        """The text that is certain now, often none or more than one token's."""
        if self._finished or token_id in self._special:
            return ""
        if self._tokenizer.id_to_token(token_id) is None:
            return ""  # as decode: ids outside the vocabulary have no text
        self._window.append(token_id)
        if token_id in self._byte_tokens:
            return ""
        text = self._decode(self._window)
        # Bytes that are not yet a character decode to exactly one replacement character, at the end.
        certain = len(text) - text.endswith(_REPLACEMENT)
        new, self._passed = text[self._passed : certain], max(self._passed, certain)
        if len(self._window) > _LONGEST_WINDOW:
            self._shorten(len(text) - self._passed)
        return self._pass_on(new)

    def flush(self) -> str:
        """The end of the text, when no token comes any more; incomplete characters become U+FFFD, as in ``decode``."""
        if self._finished:
            return ""
        text = self._decode(self._window)[self._passed :]
        self._window, self._passed = [], 0
        new = self._pass_on(text) + self._held
        self._held = ""
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _shorten(self, pending: int) -> None:
        last = self._window[-_LOOK_BACK:]
        text = self._decode(last)
        # Some decoders strip a space where the text begins: a window without text would have them strip the next token.
        if len(text) > pending:
            self._window, self._passed = last, len(text) - pending

    def _pass_on(self, new: str) -> str:
        """Add to what is held back; give what cannot be the beginning of a stop string."""
        text = self._held + new
        ends = []
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                ends.append((start + len(stop), start))
        if ends:
            self._finished, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
