"""The manifest of a bundle: what it holds, how its pictures and prompts are prepared, and the sha256 of every file.

``docs/bundle-format.md`` gives the format in one screen. Standard library and NumPy only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.errors import BundleError, ContractError
from llava_deploy.engines.names import AccuracyLevel, Conversation, HeadPrecision, Precision, QuantizationMethod
from llava_deploy.engines.plain import from_plain

FORMAT_VERSION = 2
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
    """The whole of ``manifest.json``.

    Attributes:
        files: every file of the bundle but the manifest itself and what is below ``engines/``.
        left_out: files that an archive was made without, the graphs; an engine still says by them what it is of.
    """

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
    left_out: tuple[FileEntry, ...]

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
        if any(entry.path == path for entry in self.left_out):
            raise BundleError(
                f"{MANIFEST_NAME}: {path} was left out when this bundle was packed, and is needed here; pack it again "
                "with its graphs or, only to run it, with an engine that fits this machine"
            )
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
    return parse_manifest(where.read_bytes(), where=str(where))


def parse_manifest(content: bytes, *, where: str) -> Manifest:
    """The manifest that the bytes of a ``manifest.json`` are; ``where`` it is begins an error's message.

    Raises:
        BundleError: as :func:`read_manifest`.
    """
    try:
        data = json.loads(content.decode("utf-8"))
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
    require_paths((*manifest.files, *manifest.left_out), where=where)
    return manifest


def require_paths(files: Iterable[FileEntry], *, where: str) -> None:
    """Refuse paths that cannot be trusted with a directory to write or read below.

    Raises:
        BundleError: a path is absolute, leaves the directory, is not written the plain way, or stands twice.
    """
    seen: set[str] = set()
    for entry in files:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.path or "\0" in entry.path or not path.parts:
            raise BundleError(f"{where}: file path {entry.path!r} leaves the bundle; do not use this bundle")
        if str(path) in seen:
            raise BundleError(f"{where}: file path {entry.path!r} stands twice; export the bundle again")
        if str(path) != entry.path or not entry.path.isprintable():
            raise BundleError(f"{where}: want a plain relative path, found {entry.path!r}; export the bundle again")
        seen.add(str(path))


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
