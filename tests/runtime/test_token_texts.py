"""Which tokens need no decoding."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llava_deploy.runtime.textstream import TextStream
from llava_deploy.runtime.token_texts import TokenTexts

WORDS = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "b", "cé", "�", "</w>"]
FUSED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def tokenizer_with(decoder: decoders.Decoder | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(WORDS)}, [], unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def test_what_tokens_add() -> None:
    tokenizer = tokenizer_with(decoders.Sequence(FUSED))
    texts = TokenTexts(tokenizer)
    found = {word: texts.plain(index) for index, word in enumerate([*WORDS, "<s>"])}
    assert {word: text for word, text in found.items() if text is not None and not word.startswith("<")} == {
        "▁": " ",
        "▁a": " a",
        "b": "b",
        "cé": "cé",
    }
    assert found["<0x41>"] is None  # a run of bytes is read as a whole
    assert found["<s>"] is None
    assert texts.plain(99_999) is None


def test_halves_of_characters_are_not_certain() -> None:
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.decoder = decoders.ByteLevel()
    texts = TokenTexts(tokenizer)
    found = [texts.plain(token) for token in range(tokenizer.get_vocab_size())]
    assert sorted(text for text in found if text is not None) == [chr(byte) for byte in range(128)]


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder("</w>"),
        decoders.CTC(),
        decoders.Sequence([*FUSED[:3], decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("▁", " ")]),
    ],
)
def test_tokens_that_change_with_their_neighbours_have_no_text_of_their_own(decoder: decoders.Decoder | None) -> None:
    texts = TokenTexts(tokenizer_with(decoder))
    assert texts.anchor is None
    assert [texts.plain(token) for token in range(len(WORDS))] == [None] * len(WORDS)


def test_most_tokens_are_only_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = TokenTexts(tokenizer_with(decoders.Sequence(FUSED)))
    word = {word: index for index, word in enumerate(WORDS)}
    stream = TextStream(texts)
    ids = [word["▁a"], *[word["b"], word["▁a"]] * 50, word["<0xC3>"], word["<0xA9>"], word["b"], word["b"]]
    decoded: list[list[int]] = []
    decode = TokenTexts.decode

    def counting(self: TokenTexts, ids: list[int]) -> str:
        decoded.append(ids)
        return decode(self, ids)

    monkeypatch.setattr(TokenTexts, "decode", counting)
    text = "".join([*(stream.push(token) for token in ids), stream.flush()])
    assert text == "a" + "b a" * 50 + "ébb"
    assert len(decoded) == 2
