"""Goldens: questions with the answers that PyTorch gave, stage by stage, as a bundle carries them.

``docs/bundle-format.md`` gives the files. Recorded where the bundle is made, replayed where it runs, without PyTorch.
Standard library and NumPy only.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from llava_deploy.engines.arrays import mapped_array
from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.manifest import Manifest
from llava_deploy.engines.plain import from_plain

GOLDENS = "goldens"
GOLDENS_FILE = f"{GOLDENS}/goldens.json"
GOLDENS_FORMAT_VERSION = 1

GoldenArray: TypeAlias = Literal["pixel_values", "image_features", "inputs_embeds", "logits"]
"""What is kept of a golden beside its text, each in a ``.npy`` file; the first two only where it has pictures."""

_REMEDY = "record them again with: llava-deploy record CHECKPOINT BUNDLE"


@dataclass(frozen=True)
class GoldenPart:
    """A part of a message: its text, or ``None`` for the next picture."""

    text: str | None


@dataclass(frozen=True)
class GoldenMessage:
    """A message, its content always as parts."""

    role: Literal["system", "user", "assistant"]
    content: tuple[GoldenPart, ...]


@dataclass(frozen=True)
class Golden:
    """One question and PyTorch's answer.

    Attributes:
        name: for people, ``one-picture``; also the name of its directory, ``goldens/one-picture/``.
        messages: the conversation, as :meth:`Llava.chat` takes it.
        pictures: paths in the bundle of its pictures, PNG, in the order of their placeholders.
        prompt: the text that the model's template makes of ``messages``.
        input_ids: of the prompt, :data:`~llava_deploy.engines.contract.IMAGE_TOKEN_INDEX` where a picture goes.
        token_ids: the greedy answer, its stop token included where it came to one.
    """

    name: str
    messages: tuple[GoldenMessage, ...]
    pictures: tuple[str, ...]
    prompt: str
    input_ids: tuple[int, ...]
    token_ids: tuple[int, ...]

    def path(self, array: GoldenArray) -> str:
        """The array's path in the bundle."""
        return f"{GOLDENS}/{self.name}/{array}.npy"

    def shape(self, array: GoldenArray, manifest: Manifest) -> tuple[int, ...]:
        """What the array's shape has to be.

        ``pixel_values [pictures, 3, height, width]``, ``image_features [pictures, patches, hidden]``,
        ``inputs_embeds [seq, hidden]`` of the whole spliced prompt, and ``logits [tokens, vocab]`` that each of
        ``token_ids`` was chosen from.
        """
        vision, decoder, count = manifest.vision, manifest.decoder, len(self.pictures)
        text = sum(token != IMAGE_TOKEN_INDEX for token in self.input_ids)
        shapes: dict[GoldenArray, tuple[int, ...]] = {
            "pixel_values": (count, 3, vision.image_height, vision.image_width),
            "image_features": (count, vision.patches, vision.hidden_size),
            "inputs_embeds": (text + count * vision.patches, decoder.hidden_size),
            "logits": (len(self.token_ids), decoder.vocab_size),
        }
        return shapes[array]


@dataclass(frozen=True)
class Goldens:
    """The whole of ``goldens/goldens.json``.

    Attributes:
        tools: versions of what recorded them.
        decoder_weights: what PyTorch's decoder was given: the ``checkpoint``'s weights, or those that a quantised
            bundle's ``stored`` integers stand for, so that what quantisation costs is not taken for a fault.
        goldens: one at least, their names all different.
    """

    format_version: int
    tools: dict[str, str]
    decoder_weights: Literal["checkpoint", "stored"]
    goldens: tuple[Golden, ...]

    def to_json(self) -> str:
        """Text of ``goldens.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def has_goldens(manifest: Manifest) -> bool:
    """Whether a bundle carries goldens."""
    return any(entry.path == GOLDENS_FILE for entry in manifest.files)


def golden_dtype(manifest: Manifest) -> np.dtype:
    """Of the arrays but ``pixel_values``, which are float32: float32 of an fp32 bundle, float16 of the others."""
    return np.dtype(np.float32 if manifest.model.precision == "fp32" else np.float16)


def read_goldens(bundle: Path, manifest: Manifest) -> Goldens:
    """Read ``goldens.json`` of a bundle whose files were held against its manifest already.

    Raises:
        BundleError: the bundle has no goldens, or they are not of this form.
    """
    if not has_goldens(manifest):
        raise BundleError(
            f"{bundle}: want goldens, the answers of PyTorch to compare with, found none; "
            f"record them where the checkpoint is, with: llava-deploy record CHECKPOINT {bundle}"
        )
    where = bundle / GOLDENS_FILE
    try:
        goldens: Goldens = from_plain(Goldens, json.loads(where.read_text(encoding="utf-8")), "goldens")
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{where}: cannot be read ({error}); {_REMEDY}") from error
    if goldens.format_version != GOLDENS_FORMAT_VERSION:
        raise BundleError(
            f"{where}: want format_version {GOLDENS_FORMAT_VERSION}, found {goldens.format_version}; {_REMEDY}"
        )
    names = [golden.name for golden in goldens.goldens]
    if not names or len({*names}) != len(names):
        raise BundleError(f"{where}: want goldens of different names, found {names}; {_REMEDY}")
    listed = {entry.path for entry in manifest.files}
    for golden in goldens.goldens:
        found = sum(token == IMAGE_TOKEN_INDEX for token in golden.input_ids)
        parts = sum(part.text is None for message in golden.messages for part in message.content)
        if not len(golden.pictures) == found == parts or not golden.token_ids:
            raise BundleError(
                f"{where}: golden {golden.name!r} has {len(golden.pictures)} pictures, {parts} in its messages, "
                f"{found} in its ids, and {len(golden.token_ids)} tokens of an answer; {_REMEDY}"
            )
        missing = sorted({*golden.pictures} - listed)
        if missing:
            raise BundleError(f"{where}: golden {golden.name!r} wants {missing}, which the manifest lacks; {_REMEDY}")
    return goldens


def read_golden_array(bundle: Path, manifest: Manifest, golden: Golden, array: GoldenArray) -> np.ndarray:
    """One array of a golden, of the shape that :meth:`Golden.shape` says.

    Raises:
        BundleError: the manifest does not list it, or it is no such array.
    """
    path = bundle / manifest.entry(golden.path(array)).path
    want = golden.shape(array, manifest)
    dtype = np.dtype(np.float32) if array == "pixel_values" else golden_dtype(manifest)
    return mapped_array(path, dtype, want, remedy=_REMEDY)
