"""A Llama's ``tokenizer.model`` (sentencepiece, BPE with byte fallback) as a ``tokenizers.Tokenizer``.

Checkpoints of the original layout have no ``tokenizer.json``. The file is a protocol buffer, of which few fields
matter; they are read here, so that neither sentencepiece nor protobuf is needed.

Sources: sentencepiece, ``src/sentencepiece_model.proto``; protobuf's wire format; transformers,
``convert_slow_tokenizer.py`` (``LlamaConverter``) for the steps around the BPE model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llava_deploy.engines.errors import CheckpointError

PrefixSpace = Literal["every_segment", "first_segment"]
"""Where a space is put in front: at the text and after each special token (``legacy``), or at the text only."""

_SPACE = "▁"
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # SentencePiece.Type; 1 is a normal piece
_BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What is read of a ``ModelProto``."""

    pieces: tuple[Piece, ...]
    model_type: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(path: Path) -> SentencePieceModel:
    """Read a ``tokenizer.model``.

    Raises:
        CheckpointError: damaged, or not a sentencepiece model.
    """
    try:
        return _parse(path.read_bytes())
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model ({error}); fetch the file again") from error


def to_tokenizer(path: Path, prefix_space: PrefixSpace) -> Tokenizer:
    """The tokenizer of a Llama's ``tokenizer.model``, without BOS or EOS around texts.

    Raises:
        CheckpointError: damaged, or a model other than Llama's kind.
    """
    model = read_model(path)
    step = "put a tokenizer.json beside it"
    if model.model_type != _BPE:
        raise CheckpointError(f"{path}: want a BPE model, found one of type {model.model_type}; {step}")
    if model.charsmap or model.remove_extra_whitespaces or not model.add_dummy_prefix:
        raise CheckpointError(f"{path}: want Llama's text normalisation, found another; {step}")
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = [piece.text for piece in model.pieces if piece.kind == _UNKNOWN]
    if len(unknown) != 1:
        raise CheckpointError(f"{path}: want one piece for unknown text, found {len(unknown)}; fetch the file again")
    bpe = models.BPE(ids, _merges(model.pieces, ids), unk_token=unknown[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if prefix_space == "every_segment":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    else:
        # Metaspace puts no space in front of one that is there; LlamaTokenizer does.
        tokenizer.normalizer = normalizers.Replace(Regex(r"\A "), "  ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([_added(p) for p in model.pieces if p.kind in (_UNKNOWN, _CONTROL)])
    tokenizer.add_tokens([_added(p) for p in model.pieces if p.kind == _USER_DEFINED])
    return tokenizer


def _added(piece: Piece) -> AddedToken:
    return AddedToken(piece.text, normalized=False, special=piece.kind != _USER_DEFINED)


def _merges(pieces: tuple[Piece, ...], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; the higher the piece's score, the earlier the merge."""
    merges = [
        (-piece.score, -cut, piece.text[:cut], piece.text[cut:])
        for piece in pieces
        if piece.kind not in (_UNKNOWN, _CONTROL, _BYTE)
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in ids and piece.text[cut:] in ids
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(dict(_fields(_bytes(value)))))
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("no pieces in it")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=int(trainer.get(3, 1)),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _piece(values: dict[int, int | bytes]) -> Piece:
    (score,) = struct.unpack("<f", _bytes(values.get(2, b"\0\0\0\0")))
    return Piece(_bytes(values[1]).decode() if 1 in values else "", score, int(values.get(3, 1)))


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a text should be")  # noqa: TRY004 (the file is wrong, not the caller)
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields: varints as int, everything else as its bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("it is cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
