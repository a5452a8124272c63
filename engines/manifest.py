"""The manifest of a bundle: what it holds, how its pictures and prompts are prepared, and the sha256 of every file.

``docs/bundle-format.md`` gives the format in one screen. Standard library and NumPy only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.errors import BundleError, ContractError
from llava_deploy.engines.names import AccuracyLevel, Conversation, HeadPrecision, Precision, QuantizationMethod

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
VISION_GRAPH = "vision.onnx"
DECODER_GRAPH = "decoder.onnx"
EMBEDDING_TABLE = "embed_tokens.npy"
TOKENIZER = "tokenizer.json"
_CHUNK = 1 << 20
_MOST = 2**31 - 1
_LAST_FILTER = 5  # of Pillow's
_LONGEST_SIDE = 1 << 16  # pixels


@dataclass(frozen=True)
class ImageRecipe:
    """Everything that turns a picture into ``pixel_values``; the meaning of each step is ``CLIPImageProcessor``'s.

    Order: ``pad_to_square`` (LLaVA's ``image_aspect_ratio: pad``, filled with ``mean`` as 8-bit colour), resize,
    centre crop, times ``rescale_factor``, minus ``mean``, over ``std``.

    Attributes:
        resize: ``("shortest_edge", n)``, ``("exact", height, width)``, or ``None`` for no resize.
        resample: Pillow's number of the filter (3 is bicubic).
        crop: ``(height, width)`` of the centre crop, or ``None``.
        rescale_factor: factor on the 8-bit values; ``None`` leaves them.
        mean: per channel, RGB; ``None`` leaves the values unnormalised.
        std: per channel, RGB.
    """

    pad_to_square: bool
    pad_color: tuple[int, int, int]
    resize: tuple[str, int] | tuple[str, int, int] | None
    resample: int
    crop: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __post_init__(self) -> None:
        sides = [*(self.resize or ())[1:], *(self.crop or ())]
        wrong = {
            "resize": self.resize is not None and self.resize[0] != {2: "shortest_edge", 3: "exact"}[len(self.resize)],
            "resample": not 0 <= self.resample <= _LAST_FILTER,
            "pad_color": not all(0 <= value <= 255 for value in self.pad_color),
            "std": self.std is not None and 0 in self.std,
            "resize and crop": not all(isinstance(side, int) and 1 <= side <= _LONGEST_SIDE for side in sides),
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ContractError(f"image recipe: {name} holds what no picture can be prepared with: {self}")


@dataclass(frozen=True)
class ChatRecipe:
    """How messages become a prompt and a prompt becomes token ids.

    Attributes:
        template: a Jinja chat template, or ``None`` to use the built-in format named ``conversation``.
        conversation: the built-in format, where there is no template.
        placeholder: the text that stands for a picture in a prompt.
        tokenization: ``split`` cuts the prompt at each placeholder and tokenises the pieces on their own, as LLaVA's
            ``tokenizer_image_token`` does; ``added_token`` tokenises the whole prompt, where the placeholder is an
            added token with id ``image_token_id``, as transformers' ``LlavaProcessor`` does.
        image_token_id: id of the placeholder in the vocabulary; ``None`` where it has none.
        bos_token: text of the token that the template may refer to; ``None`` where the tokenizer has none.
        eos_token: likewise.
        stop_token_ids: generation ends after any of these.
        stop_strings: generation ends before any of these texts.
    """

    template: str | None
    conversation: Conversation
    placeholder: str
    tokenization: Literal["split", "added_token"]
    image_token_id: int | None
    bos_token_id: int | None
    bos_token: str | None
    eos_token: str | None
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]


@dataclass(frozen=True)
class SpliceRecipe:
    """``tokenizer_model_max_length`` of LLaVA's config; its padding side is nothing to rows that need no padding."""

    model_max_length: int | None


@dataclass(frozen=True)
class QuantizationRecipe:
    """How the decoder's quantised weights are stored; the graph itself says it of each.

    Attributes:
        method: how they came to be.
        group_size: input features that share a scale, in most of the 4-bit weights; ``None``: all.
        symmetric: most of them have no zero points.
        lm_head: precision of the output layer.
        weights: how many weights are quantised, the output layer's included.
        accuracy_level: what ONNX Runtime is to multiply them in, where nobody says otherwise.
    """

    method: QuantizationMethod
    group_size: int | None
    symmetric: bool
    lm_head: HeadPrecision
    weights: int
    accuracy_level: AccuracyLevel

    def __post_init__(self) -> None:
        for name, value in (("group_size", self.group_size), ("weights", self.weights)):
            if value is not None and not 1 <= value <= _MOST:
                raise ContractError(f"quantization recipe: want {name} of 1 to {_MOST}, found {value}")


@dataclass(frozen=True)
class ModelCard:
    """What the bundle was made from, for people; nothing computes with it."""

    name: str
    layout: str
    vision: str
    projector: str
    decoder: str
    precision: Precision
    parameters: int


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle, by its relative POSIX path."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole of ``manifest.json``."""

    format_version: int
    model: ModelCard
    vision: VisionShape
    decoder: DecoderShape
    image: ImageRecipe
    chat: ChatRecipe
    splice: SpliceRecipe
    quantization: QuantizationRecipe | None
    tools: dict[str, str]
    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        precision = self.model.precision
        if (self.quantization is not None) != precision.startswith("int4"):
            found = "none" if self.quantization is None else "one"
            raise ContractError(f"precision {precision} and {found} of the recipes of quantization: they do not fit")

    def to_json(self) -> str:
        """Text of ``manifest.json``: keys in the order of the classes, so equal manifests are equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    def entry(self, path: str) -> FileEntry:
        """The entry of one file.

        Raises:
            BundleError: the manifest does not list it.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise BundleError(f"{MANIFEST_NAME}: no file {path!r} is listed; export the bundle again")


def read_manifest(bundle: Path) -> Manifest:
    """Read and check ``manifest.json`` of the directory ``bundle``; does not touch the files it lists.

    Raises:
        BundleError: no bundle, not JSON, a field missing, left over or of another type, another format version, or a
            path that is absolute, leaves the bundle, or stands twice.
    """
    where = bundle / MANIFEST_NAME
    if not where.is_file():
        raise BundleError(
            f"{bundle}: want a bundle directory with {MANIFEST_NAME}, found none; "
            "make one with: llava-deploy export CHECKPOINT -o BUNDLE"
        )
    try:
        data = json.loads(where.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not JSON ({error}); export the bundle again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{where}: want format_version {FORMAT_VERSION}, found {version!r}; "
            "export the bundle again with this version of llava-deploy"
        )
    try:
        manifest: Manifest = from_plain(Manifest, data, "manifest")
    except (TypeError, OverflowError, ContractError) as error:
        raise BundleError(f"{where}: {error}; export the bundle again") from error
    seen: set[str] = set()
    for entry in manifest.files:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.path or "\0" in entry.path or not path.parts:
            raise BundleError(f"{where}: file path {entry.path!r} leaves the bundle; do not use this bundle")
        if str(path) in seen:
            raise BundleError(f"{where}: file path {entry.path!r} stands twice; export the bundle again")
        seen.add(str(path))
    return manifest


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe_file(root: Path, path: str) -> FileEntry:
    """The entry for ``root/path`` as it is on the disk now."""
    full = root / path
    return FileEntry(path=path, size=full.stat().st_size, sha256=sha256_of(full))


def from_plain(want: Any, value: Any, where: str) -> Any:
    """``value``, as :func:`json.loads` gives it, as an instance of the annotation ``want``.

    Covers what the manifests use: frozen dataclasses, tuples, dicts, unions, literals and plain scalars.

    Raises:
        TypeError: it does not fit; the message names the place.
    """
    origin, args = typing.get_origin(want), typing.get_args(want)
    if dataclasses.is_dataclass(want) and isinstance(want, type):
        return _instance(want, value, where)
    if origin is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        if len(kinds) == len(value):
            return tuple(from_plain(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {from_plain(args[0], k, where): from_plain(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    elif origin in (typing.Union, types.UnionType):
        return _one_of(want, value, where)
    elif origin is Literal and any(type(value) is type(option) and value == option for option in args):  # True is no 1
        return value
    elif want is float and type(value) in (int, float):
        if math.isfinite(number := float(value)):
            return number
    elif type(value) is want:
        return value
    raise TypeError(f"{where}: want {want}, found {value!r:.80}")


def _one_of(want: Any, value: Any, where: str) -> Any:
    options = typing.get_args(want)
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, options)):
        # With one class among the options, its own error says which of the fields is wrong.
        return from_plain(next(filter(dataclasses.is_dataclass, options)), value, where)
    for option in options:
        with contextlib.suppress(TypeError):
            return from_plain(option, value, where)
    raise TypeError(f"{where}: want {want}, found {value!r:.80}")


def _instance(want: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{where}: want an object, found {type(value).__name__}")
    names = [f.name for f in dataclasses.fields(want)]
    missing, unknown = [n for n in names if n not in value], sorted(set(value) - set(names))
    if missing or unknown:
        raise TypeError(f"{where}: missing {missing}, unknown {unknown}")
    hints = typing.get_type_hints(want)
    return want(**{n: from_plain(hints[n], value[n], f"{where}.{n}") for n in names})
