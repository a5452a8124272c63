"""Token ids to text as they come: whole characters only, and nothing that may turn out to be a stop string.

``tokenizers.decoders.DecodeStream`` does not serve: with byte fallback it gives text that the decoded whole does not
have (a run of bytes that ends up invalid decodes to replacement characters throughout), raises on some sequences, and
keeps the last, incomplete character for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_deploy.engines.errors import PromptError
from llava_deploy.runtime.token_texts import REPLACEMENT, TokenTexts

# An incomplete UTF-8 sequence has 3 bytes at most, and a token one byte at least.
_LOOK_BACK = 4
_LONGEST_WINDOW = 8


class TextStream:
    """The text of one answer.

    The pieces and the flush together are ``tokenizer.decode(ids, skip_special_tokens=True)``, cut before the stop
    string that is complete first. A run of byte-fallback tokens (``<0xE2>``) is held back until it ends, as only then
    it is known whether it is text. A token costs the same wherever it stands in the answer, and most cost a look-up.

    Args:
        texts: of the model's tokenizer.
        stop_strings: texts that end the answer and do not belong to it.

    Raises:
        PromptError: a stop string is empty.
    """

    def __init__(self, texts: TokenTexts, stop_strings: Sequence[str] = ()) -> None:
        if isinstance(stop_strings, str) or not all(isinstance(stop, str) and stop for stop in stop_strings):
            raise PromptError(f"stop strings: want a list of texts, none of them empty, got {stop_strings!r}")
        self._texts = texts
        self._known = texts.known
        self._stops = tuple(stop_strings)
        # The last tokens, and how many characters of their own decoding were passed on. Whatever comes before them
        # does not change how what follows them decodes.
        self._window: list[int] = []
        self._passed = 0
        # The text ends in a whole character and all of it was passed on: the anchor may stand for it.
        self._whole = False
        self._held = ""
        self.finished = False
        """Whether a stop string was found; whatever comes after it is dropped."""

    def push(self, token_id: int) -> str:
        """The text that is certain now, often none or more than one token's."""
        if self._whole and (plain := self._known.get(token_id) or self._texts.plain(token_id)):
            return self._pass_on(plain) if self._stops else plain
        if self.finished or token_id in self._texts.special:
            return ""
        if self._texts.tokenizer.id_to_token(token_id) is None:
            return ""  # as decode: ids outside the vocabulary have no text
        if self._whole:
            self._restart()
        self._window.append(token_id)
        if token_id in self._texts.byte_tokens:
            return ""
        text = self._decode(self._window)
        # Bytes that are not yet a character decode to exactly one replacement character, at the end.
        certain = len(text) - text.endswith(REPLACEMENT)
        new, self._passed = text[self._passed : certain], max(self._passed, certain)
        self._whole = self._texts.anchor is not None and 0 < certain == len(text)
        if len(self._window) > _LONGEST_WINDOW:
            self._shorten(len(text) - self._passed)
        return self._pass_on(new)

    def flush(self) -> str:
        """The end of the text, when no token comes any more; incomplete characters become U+FFFD, as in ``decode``."""
        if self.finished:
            return ""
        text = "" if self._whole else self._decode(self._window)[self._passed :]
        self._window, self._passed, self._whole = [], 0, False
        new = self._pass_on(text) + self._held
        self._held = ""
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._texts.decode(ids)

    def _restart(self) -> None:
        """What comes next is read behind the anchor."""
        if self._texts.anchor is not None:
            self._window, self._passed, self._whole = [self._texts.anchor], self._texts.anchor_length, False

    def _shorten(self, pending: int) -> None:
        last = self._window[-_LOOK_BACK:]
        text = self._decode(last)
        # Some decoders strip a space where the text begins: a window without text would have them strip the next token.
        if len(text) > pending:
            self._window, self._passed = last, len(text) - pending

    def _pass_on(self, new: str) -> str:
        """Add to what is held back; give what cannot be the beginning of a stop string."""
        if not self._stops:
            return new
        text = self._held + new
        ends = []
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                ends.append((start + len(stop), start))
        if ends:
            self.finished, self._whole, self._held = True, False, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
