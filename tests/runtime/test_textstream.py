"""The streamed pieces are the decoded whole, for every kind of tokenizer and any sequence of tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llava_deploy.engines.errors import PromptError
from llava_deploy.runtime.textstream import TextStream
from llava_deploy.runtime.token_texts import TokenTexts

EURO, FACE = "€", "👩‍🚀"


def byte_level():
    """GPT-2 style: tokens are runs of bytes, some of them halves of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def token(text):
        ((word, _),) = letters.pre_tokenize_str(text)
        return word

    words = [token(w) for w in ("the", " cat", EURO, "\n\n", "�")]
    euro, face = token(EURO), token("👩")
    words += [euro[:2], euro[1:], euro[2:] + euro[:1], face[:3], face[3:] + "a", "</"]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(alphabet + words))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<added>"])
    return tokenizer


def byte_fallback():
    """Llama style: sentencepiece with byte tokens for what the vocabulary lacks."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", "▁a", "b", "c", "é", "�", "▁</", "s", ">"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<added>"])
    return tokenizer


def metaspace():
    words = ["▁a", "b", "▁", "▁▁c", "<unk>"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece():
    words = ["a", "##b", ".", "'", "s", "[UNK]", "do", "n't"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def no_decoder():
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))


KINDS = {f.__name__: f() for f in (byte_level, byte_fallback, metaspace, wordpiece, no_decoder)}


def run(tokenizer, ids, stops=()):
    stream = TextStream(TokenTexts(tokenizer), stops)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.flush()], stream


def cut(text, stops):
    """The text before the stop string that is complete first, found one character at a time."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def draw_ids(draw, tokenizer, longest):
    size = tokenizer.get_vocab_size()
    pool = draw.sample(range(size), min(size, draw.choice([2, 4, 400])))
    return [draw.choice(pool) for _ in range(draw.randrange(longest))]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_decoded_whole(kind):
    tokenizer, draw = KINDS[kind], random.Random(0)
    for _ in range(1000):
        ids = draw_ids(draw, tokenizer, 40)
        pieces, stream = run(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True), ids
        assert not stream.finished


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_decoded_whole_cut_at_the_stop_string(kind):
    tokenizer, draw = KINDS[kind], random.Random(1)
    stopped = 0
    for _ in range(1000):
        ids = draw_ids(draw, tokenizer, 40)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        stops = []
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(text) + 1)
            part = text[at : at + draw.randrange(1, 6)]
            stops.append((part if part else "zz") + draw.choice(["", "", "", "z"]))
        pieces, stream = run(tokenizer, ids, stops)
        assert ("".join(pieces), stream.finished) == cut(text, stops), (ids, stops)
        stopped += stream.finished
    assert 150 < stopped < 1000


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_characters_are_never_cut(kind):
    tokenizer = KINDS[kind]
    text = f"a{EURO}b {FACE} ż c" * 5
    if kind == "byte_level":
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ((word, _),) = letters.pre_tokenize_str(text)
        ids = [tokenizer.token_to_id(letter) for letter in word]
    else:
        ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        ids.insert(len(text[:5].encode()), tokenizer.token_to_id("b"))
    pieces, _ = run(tokenizer, ids)
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(ids)
    if kind == "byte_level":
        assert pieces[0] == "a"
        assert pieces[1:4] == ["", "", EURO]


def test_text_comes_as_soon_as_it_is_certain():
    tokenizer = KINDS["byte_fallback"]
    ids = [tokenizer.token_to_id(t) for t in ("▁a", "b", "<0xE2>", "<0x82>", "<0xAC>", "c", "▁", "▁a", "</s>", "b")]
    pieces, _ = run(tokenizer, ids)
    assert pieces == ["a", "b", "", "", "", "€c", " ", " a", "", "b", ""]


def test_text_that_may_begin_a_stop_string_is_held_back():
    tokenizer = KINDS["no_decoder"]
    stream = TextStream(TokenTexts(tokenizer), ["b b a"])
    assert [stream.push(token) for token in (0, 1, 1, 1, 0, 0)] == ["a", " ", "", "b ", "", ""]
    assert stream.finished
    assert stream.flush() == ""
    again = TextStream(TokenTexts(tokenizer), ["b b a"])
    assert [again.push(token) for token in (0, 1, 1)] == ["a", " ", ""]
    assert again.flush() == "b b"
    assert not again.finished


def test_a_stop_string_completed_by_the_flush_is_removed():
    tokenizer = KINDS["byte_fallback"]
    ids = [tokenizer.token_to_id(t) for t in ("b", "<0x0A>")]
    pieces, stream = run(tokenizer, ids, ["\n"])
    assert "".join(pieces) == "b"
    assert stream.finished


def test_an_incomplete_character_at_the_end_is_replaced_as_decode_does():
    tokenizer = KINDS["byte_level"]
    ids = [tokenizer.token_to_id("the"), tokenizer.token_to_id("â")]
    pieces, _ = run(tokenizer, ids)
    assert pieces == ["the", "", "�"]


def test_ids_outside_the_vocabulary_have_no_text():
    tokenizer = KINDS["byte_level"]
    assert run(tokenizer, [tokenizer.token_to_id("the"), 99_999])[0] == ["the", "", ""]


@pytest.mark.parametrize("tokens", [["ÿ"], ["â", "the"], [" cat"], ["<s>"]])
def test_the_cost_of_a_token_does_not_grow(tokens):
    tokenizer = KINDS["byte_level"]
    ids = [tokenizer.token_to_id(t if t != " cat" else "Ġcat") for t in tokens]

    decoded = []

    class Counting(TextStream):
        def _decode(self, ids):
            decoded.append(len(ids))
            return super()._decode(ids)

    stream = Counting(TokenTexts(tokenizer))
    for _ in range(2000):
        for token in ids:
            stream.push(token)
    assert sum(decoded) <= 2000 * len(ids) * 20


@pytest.mark.parametrize("stops", ["\n", [""], ["a", ""], [3]])
def test_stop_strings_are_checked(stops):
    with pytest.raises(PromptError, match="none of them empty"):
        TextStream(TokenTexts(KINDS["no_decoder"]), stops)
