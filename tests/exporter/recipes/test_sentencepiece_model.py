"""``tokenizer.model`` against what sentencepiece itself encodes.

``data/sentencepiece_bpe.*`` are from sentencepiece 0.2: a BPE model of 400 pieces with Llama's options (byte fallback,
identity normalisation, dummy prefix, whitespace kept, digits split, a user-defined ``<im_patch>``) trained on the
Apache licence, and the ids and decoded texts that it gives.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.recipes.sentencepiece_model import PrefixSpace, read_model, to_tokenizer

DATA = Path(__file__).parent / "data"
MODEL = DATA / "sentencepiece_bpe.model"
CASES = json.loads((DATA / "sentencepiece_bpe.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("prefix_space", ["every_segment", "first_segment"])
def test_as_sentencepiece(prefix_space: PrefixSpace) -> None:
    tokenizer = to_tokenizer(MODEL, prefix_space)
    assert tokenizer.get_vocab_size() == 400
    for case in CASES:
        encoded = tokenizer.encode(case["text"], add_special_tokens=False)
        assert encoded.ids == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize(
    ("prefix_space", "tokens"),
    [("every_segment", ["▁a", "</s>", "▁b"]), ("first_segment", ["▁a", "</s>", "b"])],
)
def test_space_after_a_special_token(prefix_space: PrefixSpace, tokens: list[str]) -> None:
    """LlamaTokenizer's ``legacy``."""
    assert to_tokenizer(MODEL, prefix_space).encode("a</s>b").tokens == tokens


def test_special_and_user_defined_tokens() -> None:
    tokenizer = to_tokenizer(MODEL, "first_segment")
    ids = tokenizer.encode("a<im_patch>b</s>").ids
    assert tokenizer.token_to_id("<im_patch>") in ids
    assert "<im_patch>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert "</s>" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, -3])
def test_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: "):
        to_tokenizer(path, "every_segment")


@pytest.mark.parametrize("data", [b"\xff" * 40, b'{"version": "1.0"}', b"\x0b", b"\x08\x01", b"\x0a\x02\x08\x01"])
def test_something_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        read_model(path)


def message(field: int, value: bytes | int) -> bytes:
    """One protobuf field."""
    if isinstance(value, int):
        return bytes([field << 3, value])
    return bytes([field << 3 | 2, len(value)]) + value


UNKNOWN = message(1, message(1, b"<unk>") + message(3, 2))
PIECE = message(1, message(1, b"a") + b"\x15" + struct.pack("<f", -1.5))
BPE = message(2, message(3, 2))
LLAMA = message(3, message(3, 1) + message(4, 0))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([UNKNOWN, PIECE, message(2, message(3, 1)), LLAMA], "want a BPE model"),
        ([UNKNOWN, PIECE, BPE, message(3, message(2, b"map") + message(4, 0))], "normalisation"),
        ([UNKNOWN, PIECE, BPE, message(3, message(3, 1))], "normalisation"),
        ([UNKNOWN, PIECE, BPE, message(3, message(3, 0) + message(4, 0))], "normalisation"),
        ([PIECE, BPE, LLAMA], "one piece for unknown text"),
    ],
)
def test_models_of_another_kind(tmp_path: Path, parts: list[Any], reason: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(parts))
    with pytest.raises(CheckpointError, match=reason):
        to_tokenizer(path, "every_segment")


def test_scores_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(UNKNOWN + PIECE + BPE + LLAMA)
    assert [(piece.text, piece.score) for piece in read_model(path).pieces] == [("<unk>", 0.0), ("a", -1.5)]
